// An Attend or a TopK under way: checked, searched, answered, and learned from.
#ifndef KVSEEK_SERVICE_SEARCH_CALL_H_
#define KVSEEK_SERVICE_SEARCH_CALL_H_

#include <memory>
#include <memory_resource>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "index/key_index.h"
#include "index/scratch.h"
#include "service/call.h"
#include "service/query_operations.h"
#include "service/search_executor.h"
#include "service/search_validation.h"

namespace kvseek::service {

/// One thread at a time works on it; while its searches run, their workers only read it. The lists
/// of its searches stand in memory that earlier ones left.
class SearchCall : public Call {
 public:
  using Call::Call;

  /// Checks the request, by the caller if its payload is small, else on the pool; its searches run
  /// there, and the worker that is done with the last of them answers. May throw before the call is
  /// on the pool. REQUIRES: the request's op is kAttend or kTopK.
  static void Start(const std::shared_ptr<SearchCall>& call);

 private:
  struct Searches {
    explicit Searches(CheckedSearch checked)
        : search(std::move(checked)), tasks(MakeTasks(search)) {}

    CheckedSearch search;
    std::pmr::vector<SearchTask> tasks;
  };

  static void CheckAndRun(const std::shared_ptr<SearchCall>& call, index::Scratch& scratch);
  /// Runs the searches of a call that has been checked.
  static void Run(const std::shared_ptr<SearchCall>& call, index::Scratch& scratch);
  static void Answer(const std::shared_ptr<SearchCall>& call,
                     const absl::StatusOr<absl::Span<const index::SearchResult>>& results,
                     index::Scratch& scratch);
  /// Takes queries of a search where indexes learn from them.
  static void Learn(const std::shared_ptr<SearchCall>& call);
  /// Makes searches of the request; false: the call has been finished with an error.
  bool Check(index::Scratch& scratch);

  std::optional<Searches> searches_;  ///< since Check
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SEARCH_CALL_H_
