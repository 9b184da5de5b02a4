#include "service/query_operations.h"

#include <algorithm>

namespace kvseek::service {
namespace {

/// Keys to be remembered for each candidate, if a request does not say how many.
constexpr int kKeepFactor = 3;

}  // namespace

proto::IndexKind ChooseIndex(const CheckedItem& item, size_t head, int64_t range) {
  const proto::IndexKind wanted = item.settings_of_heads[head].index;
  const bool named =
      wanted != proto::INDEX_AUTO && FindIndex(*item.layer, item.kv_heads[head], wanted) != nullptr;
  if (named) return wanted;
  if (range < index::kExactBelowTokens) return proto::INDEX_EXACT;
  const bool product =
      wanted == proto::INDEX_AUTO &&
      item.layer->Built(item.kv_heads[head], index::BuiltKind::kProduct) != nullptr;
  return product ? proto::INDEX_PRODUCT : proto::INDEX_LADDER;
}

const index::KeyIndex* FindIndex(const LayerState& layer, size_t kv_head, proto::IndexKind kind) {
  if (kind == proto::INDEX_EXACT) return &index::ExactIndex();
  if (kind == proto::INDEX_LADDER) return &index::LadderIndex();
  return layer.Built(kv_head, *BuiltKindOf(kind));
}

std::pmr::vector<SearchTask> MakeTasks(const CheckedSearch& search) {
  std::pmr::vector<SearchTask> tasks(search.memory.get());
  tasks.reserve(search.Results());
  for (const CheckedItem& item : search.items) {
    const SessionSettings& settings = item.settings();
    const int group = settings.Group();
    const size_t group_elements =
        static_cast<size_t>(group) * static_cast<size_t>(settings.kv.key_dim);
    const float* queries = item.queries;
    for (size_t t = 0; t < item.tokens; ++t) {
      for (size_t h = 0; h < item.kv_heads.size(); ++h) {
        tasks.push_back({FindIndex(*item.layer, item.kv_heads[h],
                                   ChooseIndex(item, h, item.ends[t] - item.begin)),
                         item.layer->View(item.kv_heads[h]),
                         {queries, group, item.begin, item.ends[t]},
                         search.options});
        SearchTask& task = tasks.back();
        task.options.candidates = static_cast<int>(item.settings_of_heads[h].candidates);
        task.options.threshold = item.settings_of_heads[h].threshold;
        queries += group_elements;
      }
    }
  }
  return tasks;
}

void AddReuse(const CheckedSearch& search, MemoryBudget& budget, absl::Span<SearchTask> tasks) {
  // A reused answer proves nothing of the best keys, and has the estimate of the rest in it.
  if (search.reuse.every == 0 || search.options.exact_top > 0 || !search.options.estimate_rest) {
    return;
  }
  auto task = tasks.begin();
  for (const CheckedItem& item : search.items) {
    task += static_cast<ptrdiff_t>(item.Results() - item.kv_heads.size());
    SelectionMemory& memory = item.session->Selections(item.layer_number);
    for (const uint32_t head : item.kv_heads) {
      task->last = memory.NextStep(head, search.reuse.every, *task->index, task->view);
      task->reuse = search.reuse;
      if (task->reuse.keep == 0) {
        task->reuse.keep = std::min(kKeepFactor * task->options.candidates, index::kMaxKeep);
      }
      task->options.keep = task->reuse.keep;
      task->remember = [&memory, &budget, head, index = task->index, view = task->view](auto last) {
        memory.Remember(head, *index, view, std::move(last), budget);
      };
      ++task;
    }
  }
}

std::optional<TrafficQueries::Batch> CollectQueries(const CheckedItem& item, MemoryBudget& budget) {
  const SessionSettings& settings = item.settings();
  const int64_t end = item.ends.back();
  if (!settings.Learns() || item.layer->queries_sent || end == item.begin) return std::nullopt;
  const auto key_dim = static_cast<size_t>(settings.kv.key_dim);
  const TrafficQueries::Token token{end - 1, item.kv_heads,
                                    item.queries + (item.tokens - 1) * item.QueryHeads() * key_dim};
  const TrafficQueries::Shape shape{settings.kv_heads, static_cast<size_t>(settings.Group()),
                                    key_dim, settings.kv.dtype};
  return item.session->Traffic(item.layer_number).Add(token, shape, budget);
}

}  // namespace kvseek::service
