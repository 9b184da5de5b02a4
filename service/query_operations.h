// Attend and TopK: from a checked request to tasks for the indexes (query_answers.h: from their
// results to the answer).
#ifndef KVSEEK_SERVICE_QUERY_OPERATIONS_H_
#define KVSEEK_SERVICE_QUERY_OPERATIONS_H_

#include <cstdint>
#include <memory_resource>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "index/key_index.h"
#include "proto/kvseek.pb.h"
#include "service/layer_cache.h"
#include "service/memory_budget.h"
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

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_QUERY_OPERATIONS_H_
