// Answers a trace's steps with an index of this process, on one thread or several.
#ifndef KVSEEK_CLI_LIBRARY_SEARCH_H_
#define KVSEEK_CLI_LIBRARY_SEARCH_H_

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cli/evaluation.h"
#include "cli/trace.h"
#include "index/key_index.h"
#include "index/reuse.h"

namespace kvseek::cli {

/// Runs the pieces of searches on a fixed number of threads, the calling one included. Not
/// thread-safe.
class PieceRunner {
 public:
  /// REQUIRES: threads >= 1.
  explicit PieceRunner(int threads);
  ~PieceRunner();
  PieceRunner(const PieceRunner&) = delete;
  PieceRunner& operator=(const PieceRunner&) = delete;

  index::SearchResult Search(const index::KeyIndex& index, const index::KvView& view,
                             const index::SearchQuery& query, const index::SearchOptions& options);
  index::SearchResult Run(index::PlanPtr plan);
  index::Scratch& scratch() { return scratch_; }

 private:
  void Work(index::Scratch& scratch);
  /// Takes pieces of the plan under way until none is left; `lock` is held at the call and at
  /// return.
  void RunPieces(std::unique_lock<std::mutex>& lock, index::Scratch& scratch);

  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable done_;
  index::SearchPlan* plan_ = nullptr;  // guarded by mutex_, as all below
  int next_ = 0;
  int running_ = 0;
  bool stop_ = false;
  index::Scratch scratch_;
  std::vector<std::thread> threads_;
};

/// A SearchFunction over `head`; all arguments must outlive it.
SearchFunction SearchLibrary(const HeadTrace& trace, const StoredHead& head,
                             const index::KeyIndex& index, PieceRunner& runner);

/// The same, but steps that follow the one before them may be answered from its selection
/// (index/reuse.h); any other step begins anew.
SearchFunction SearchReusing(const HeadTrace& trace, const StoredHead& head,
                             const index::KeyIndex& index, const index::ReuseOptions& options,
                             PieceRunner& runner);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_LIBRARY_SEARCH_H_
