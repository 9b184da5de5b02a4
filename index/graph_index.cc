#include "index/graph_index.h"

#include <algorithm>
#include <utility>

#include "index/chosen_plan.h"
#include "index/graph_search.h"

namespace kvseek::index {

std::vector<uint16_t> GraphStretches(int64_t tokens) {
  std::vector<uint16_t> part_of(static_cast<size_t>(tokens));
  for (size_t i = 0; i < part_of.size(); ++i) {
    part_of[i] = static_cast<uint16_t>(i / kGraphPartTokens);
  }
  return part_of;
}

GraphIndex::GraphIndex(KeyGraph graph, std::vector<std::shared_ptr<const KeyParts>> parts,
                       const GraphBuildTimes& times)
    : graph_(std::move(graph)), parts_(std::move(parts)), times_(times) {}

std::shared_ptr<const GraphIndex> GraphIndex::Build(const BuildInput& input, int degree) {
  const int64_t covered = input.view.SealedTokens();
  if (covered == 0) return nullptr;
  GraphBuildTimes times;
  std::optional<KeyGraph> graph = BuildKeyGraph(input, covered, degree, times);
  if (!graph.has_value()) return nullptr;
  std::vector<std::shared_ptr<const KeyParts>> parts;
  const double started = ThreadSeconds();
  for (int64_t begin = 0; begin < covered; begin += kMaxPartsTokens) {
    if (input.give_up()) return nullptr;
    const int64_t tokens = std::min(covered - begin, kMaxPartsTokens);
    parts.push_back(KeyParts::Make(input.view, begin, GraphStretches(tokens),
                                   static_cast<int>(tokens / kGraphPartTokens), /*bounds=*/false,
                                   parts.empty() ? nullptr : parts.front()->basis()));
  }
  times.parts = ThreadSeconds() - started;
  return std::make_shared<const GraphIndex>(*std::move(graph), std::move(parts), times);
}

size_t GraphIndex::Bytes() const {
  size_t bytes = sizeof(*this) + graph_.Bytes() + parts_.front()->basis()->Bytes();
  for (const auto& parts : parts_) bytes += parts->Bytes();
  return bytes;
}

PlanPtr GraphIndex::Plan(const KvView& view, const SearchQuery& query, const SearchOptions& options,
                         Scratch& scratch) const {
  return PlanChosen(view, query, options,
                    SearchGraph(graph_, parts_, view, query, options, scratch));
}

}  // namespace kvseek::index
