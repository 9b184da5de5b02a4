// The graph index: finds keys by walking a graph over them that was built from training queries
// (graph_build.h, graph_search.h; RetrievalAttention, arXiv 2409.10516).
//
// It reads few keys whatever the length, but jumps through memory: its time is the number of keys
// scored, while the ladder's is the number of keys there are. One graph serves all query heads of a
// KV head. What is left out is estimated from stretches of 64 consecutive keys (key_parts.h).
#ifndef KVSEEK_INDEX_GRAPH_INDEX_H_
#define KVSEEK_INDEX_GRAPH_INDEX_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "index/built_index.h"
#include "index/graph_build.h"
#include "index/key_parts.h"

namespace kvseek::index {

/// The stretch of each of `tokens` keys, which begin with a stretch: the parts of a graph index.
std::vector<uint16_t> GraphStretches(int64_t tokens);

class GraphIndex final : public BuiltIndex {
 public:
  /// `parts`: the graph's keys in order, kMaxPartsTokens in each but the last, one stretch of
  /// kGraphPartTokens a part, all of one basis. At least one.
  GraphIndex(KeyGraph graph, std::vector<std::shared_ptr<const KeyParts>> parts,
             const GraphBuildTimes& times);
  /// Over all sealed keys of the view, with at most `degree` neighbours a key (graph_build.h). Null
  /// when there are no sealed keys or no training queries, or input.give_up() says true. It does
  /// not keep what `input` points at.
  static std::shared_ptr<const GraphIndex> Build(const BuildInput& input,
                                                 int degree = kGraphDegree);

  absl::string_view name() const override { return "graph"; }
  int64_t covered() const override { return graph_.Keys(); }
  size_t Bytes() const override;
  double build_core_seconds() const override {
    return times_.queries + times_.neighbours + times_.edges + times_.parts;
  }
  const GraphBuildTimes& times() const { return times_; }
  PlanPtr Plan(const KvView& view, const SearchQuery& query, const SearchOptions& options,
               Scratch& scratch) const override;

  const KeyGraph& graph() const { return graph_; }
  const std::vector<std::shared_ptr<const KeyParts>>& parts() const { return parts_; }

 private:
  KeyGraph graph_;
  std::vector<std::shared_ptr<const KeyParts>> parts_;
  GraphBuildTimes times_;
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_GRAPH_INDEX_H_
