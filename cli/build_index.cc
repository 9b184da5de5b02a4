#include "cli/build_index.h"

#include "index/cluster_index.h"
#include "index/graph_index.h"
#include "index/landmark_index.h"
#include "index/product_index.h"

namespace kvseek::cli {

std::shared_ptr<const index::BuiltIndex> BuildIndex(const std::string& name, const HeadTrace& trace,
                                                    const index::KvView& view,
                                                    const BuildSettings& settings) {
  index::BuildInput input;
  input.view = view;
  input.group = trace.group;
  input.queries = trace.prefill_queries;
  input.query_positions = trace.prefill_positions;
  if (name == "product") return index::ProductIndex::Build(input, settings.product);
  if (name == "graph") return index::GraphIndex::Build(input, settings.degree);
  if (name == "cluster") {
    return index::BuildCluster(input, {.keys_per_cluster = settings.keys_per_cluster});
  }
  const auto summary =
      settings.summary == "mean" ? index::LandmarkSummary::kMean : index::LandmarkSummary::kBounds;
  return index::BuildLandmark(input, {.block = settings.block, .summary = summary});
}

}  // namespace kvseek::cli
