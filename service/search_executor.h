// Runs the searches of one request on the pool.
//
// Each search is planned, run step by step and piece by piece, and finished (index/key_index.h). A
// plan is one unit of work for any worker, and so is a piece or, in a large batch, a few of a step;
// whoever runs a step's last piece goes on to the next step. Plans go before pieces until there are
// two for each worker, so that what one search leaves idle in its short steps another fills, up to
// a batch's end; more exist at no time, however large the batch. Pieces go in the order in which
// their steps were opened. Each NUMA node (KvShape::node) has such queues of its own: a worker
// takes units of its node's searches as long as there are any, then others. After each unit a
// worker makes room for other requests that wait. No unit waits for another. Every result has its
// own slot: the same searches give the same bits, whatever the number of workers. What holds the
// searches and their results is kept for the next request's.
//
// Where workers look for jobs before they sleep (DaemonOptions::worker_spin), one for which a run
// has no unit looks for those of its next steps, for 200 us at most and while no other job waits.
//
// A search that may be answered from an earlier one (index/reuse.h) is run like any other; if its
// answer is not trusted, it is planned once more, as a search.
#ifndef KVSEEK_SERVICE_SEARCH_EXECUTOR_H_
#define KVSEEK_SERVICE_SEARCH_EXECUTOR_H_

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "index/key_index.h"
#include "index/reuse.h"
#include "index/scratch.h"
#include "service/compute_pool.h"

namespace kvseek::service {

/// When to give up a request.
struct GiveUp {
  std::chrono::steady_clock::time_point deadline;
  std::shared_ptr<std::atomic<bool>> cancelled;       ///< may be null
  std::shared_ptr<const std::atomic<bool>> stopping;  ///< the daemon stops; may be null

  /// deadline_exceeded, cancelled or unavailable; ok while the work should go on.
  absl::Status Check() const;
};

/// One query token of one KV head.
struct SearchTask {
  const index::KeyIndex* index = nullptr;
  index::KvView view;
  index::SearchQuery query;
  index::SearchOptions options;
  std::shared_ptr<const index::LastSearch> last{};  ///< to be answered from; null: by a search
  index::ReuseOptions reuse{};
  /// Gets what a search left (SearchOptions::keep), in a worker, before the searches are done; may
  /// be null.
  std::function<void(std::shared_ptr<const index::LastSearch>)> remember{};
};

/// Results, in the order of the tasks and valid during the call, or why there are none; on a
/// worker, with its scratch.
using SearchDone = absl::AnyInvocable<void(absl::StatusOr<absl::Span<const index::SearchResult>>,
                                           index::Scratch&)>;

/// Starts the searches and returns; calls `done` exactly once, when no unit is under way any more.
/// give_up is looked at before each plan and piece. The tasks and what they point at must live
/// until then. `scratch` is the calling worker's, which may do a part of the work.
void RunSearches(ComputePool& pool, absl::Span<const SearchTask> tasks, GiveUp give_up,
                 SearchDone done, index::Scratch& scratch);

/// The status of an exception under way: resource_exhausted for std::bad_alloc, else internal. Call
/// in a catch block.
absl::Status StatusOfException();

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SEARCH_EXECUTOR_H_
