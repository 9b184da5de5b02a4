// Attend, TopK and FetchRows: from a checked request to tasks for the indexes, and from results to
// the answer's message and payload.
#ifndef KVSEEK_SERVICE_QUERY_OPERATIONS_H_
#define KVSEEK_SERVICE_QUERY_OPERATIONS_H_

#include <cstdint>
#include <memory_resource>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "index/key_index.h"
#include "proto/kvseek.pb.h"
#include "service/layer_cache.h"
#include "service/memory_budget.h"
#include "service/options.h"
#include "service/request_handler.h"
#include "service/request_validation.h"
#include "service/search_executor.h"
#include "service/search_validation.h"
#include "service/traffic_queries.h"

namespace kvseek::service {

/// Which index answers for the KV head item.kv_heads[head] over a range of so many keys; one that
/// is not built yet stands back.
proto::IndexKind ChooseIndex(const CheckedItem& item, size_t head, int64_t range);
/// It. Null: not built. REQUIRES: not INDEX_AUTO.
const index::KeyIndex* FindIndex(const LayerState& layer, size_t kv_head, proto::IndexKind kind);

/// Searches of all items, in the order of results: (item, token, KV head). They point into
/// `search`, which must outlive them, and stand in its memory.
std::pmr::vector<SearchTask> MakeTasks(const CheckedSearch& search);

/// Where the request asks for it, lets the last query token of each item be answered from what an
/// earlier step's search left, and leave what its own finds. That is a step of its KV heads: to be
/// called once a request. The tasks are those of MakeTasks; `search` and `budget` must outlive
/// them.
void AddReuse(const CheckedSearch& search, MemoryBudget& budget, absl::Span<SearchTask> tasks);

/// Queries of an item's last token, for the indexes of a session that learn from queries and whose
/// client sends none with its appends. What is to be given to Session::Learn, now and then.
std::optional<TrafficQueries::Batch> CollectQueries(const CheckedItem& item, MemoryBudget& budget);

/// Refuses a search whose answer might not fit the limits: resource_exhausted naming "k" (fewer
/// keys would fit) or "items".
absl::Status CheckAnswerFits(const CheckedSearch& search, const DaemonOptions& options);

/// The answer to an Attend or a TopK that arrived at `arrived`; without its message where there is
/// no `arrived`, since nobody reads it. `results` are those of MakeTasks. resource_exhausted naming
/// "options.list_read" when the positions read, which nobody knew before, are too many.
absl::StatusOr<Response> MakeAnswer(const CheckedSearch& search,
                                    absl::Span<const index::SearchResult> results,
                                    std::optional<TimePoint> arrived, const DaemonOptions& options,
                                    Worker worker);

/// The answer to a FetchRows. resource_exhausted naming "count" when it does not fit the limits.
absl::StatusOr<Response> FetchRows(const CheckedFetch& fetch, const DaemonOptions& options,
                                   Worker worker);

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_QUERY_OPERATIONS_H_
