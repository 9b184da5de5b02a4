#include "cli/build_index.h"

#include "index/cluster_index.h"
#include "index/graph_index.h"
#include "index/landmark_index.h"
#include "index/product_index.h"
#include "kernels/dtype.h"

namespace kvseek::cli {
namespace {

index::LandmarkSummary SummaryOf(const std::string& name) {
  if (name == "mean") return index::LandmarkSummary::kMean;
  return name == "given" ? index::LandmarkSummary::kGiven : index::LandmarkSummary::kBounds;
}

}  // namespace

TraceLandmarks MakeLandmarks(const HeadTrace& trace, int block, int64_t begin, int64_t end) {
  const auto dim = static_cast<size_t>(trace.key_dim);
  std::vector<double> sum(dim);  // of all queries: their mean ranks keys alike
  for (size_t i = 0; i < trace.prefill_queries.size(); ++i)
    sum[i % dim] += trace.prefill_queries[i];
  const auto row_of = [&](int64_t key) {
    return trace.keys.data() + static_cast<size_t>(key) * dim;
  };
  const auto score = [&](int64_t key) {
    double total = 0.0;
    for (size_t d = 0; d < dim; ++d) {
      total += sum[d] * double{kernels::LoadElement(row_of(key), trace.dtype, d)};
    }
    return total;
  };
  TraceLandmarks landmarks;
  int64_t first = (begin + block - 1) / block * block;
  for (; first < end && first + block <= trace.tokens; first += block) {
    int64_t best = first;
    double best_score = score(first);
    for (int64_t key = first + 1; key < first + block; ++key) {
      const double here = score(key);
      if (here <= best_score) continue;
      best_score = here;
      best = key;
    }
    landmarks.positions.push_back(static_cast<uint64_t>(first));
    landmarks.rows.insert(landmarks.rows.end(), row_of(best), row_of(best) + dim);
  }
  return landmarks;
}

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
  const index::LandmarkOptions options{.block = settings.block,
                                       .summary = SummaryOf(settings.summary)};
  if (options.summary != index::LandmarkSummary::kGiven) {
    return index::BuildLandmark(input, options);
  }
  const TraceLandmarks given = MakeLandmarks(trace, settings.block, 0, trace.tokens);
  const std::vector<int64_t> positions(given.positions.begin(), given.positions.end());
  std::vector<float> rows;
  for (size_t e = 0; e < given.rows.size(); ++e) {
    rows.push_back(kernels::LoadElement(given.rows.data(), trace.dtype, e));
  }
  input.landmark_positions = positions;
  input.landmarks = rows;
  return index::BuildLandmark(input, options);
}

}  // namespace kvseek::cli
