#include "index/graph_index.h"

#include <algorithm>
#include <utility>

#include "index/chosen_plan.h"
#include "index/graph_search.h"

namespace kvseek::index {

std::shared_ptr<const GraphIndex> GraphIndex::Build(const BuildInput& input, int degree) {
  const int64_t covered = input.view.SealedTokens();
  if (covered == 0) return nullptr;
  GraphBuildTimes times;
  std::optional<KeyGraph> graph = BuildKeyGraph(input, covered, degree, times);
  if (!graph.has_value()) return nullptr;
  std::shared_ptr<GraphIndex> index(new GraphIndex);
  index->graph_ = *std::move(graph);
  const double started = ThreadSeconds();
  for (int64_t begin = 0; begin < covered; begin += kMaxPartsTokens) {
    if (input.give_up()) return nullptr;
    const int64_t tokens = std::min(covered - begin, kMaxPartsTokens);
    std::vector<uint16_t> part_of(static_cast<size_t>(tokens));
    for (size_t i = 0; i < part_of.size(); ++i) {
      part_of[i] = static_cast<uint16_t>(i / kGraphPartTokens);
    }
    index->parts_.push_back(KeyParts::Make(
        input.view, begin, part_of, static_cast<int>(tokens / kGraphPartTokens),
        /*bounds=*/false, index->parts_.empty() ? nullptr : index->parts_.front()->basis()));
  }
  times.parts = ThreadSeconds() - started;
  index->times_ = times;
  return index;
}

size_t GraphIndex::Bytes() const {
  size_t bytes = sizeof(*this) + graph_.Bytes() + parts_.front()->basis()->Bytes();
  for (const auto& parts : parts_) bytes += parts->Bytes();
  return bytes;
}

std::unique_ptr<SearchPlan> GraphIndex::Plan(const KvView& view, const SearchQuery& query,
                                             const SearchOptions& options, Scratch& scratch) const {
  return PlanChosen(view, query, options,
                    SearchGraph(graph_, parts_, view, query, options, scratch));
}

}  // namespace kvseek::index
