#include "index/cluster_index.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "index/kmeans.h"
#include "index/parts_index.h"
#include "index/query_space.h"

namespace kvseek::index {
namespace {

constexpr double kValueVariance = 4.0;  // of a run's values, in units of squared scores

/// Rows of both, side by side.
FloatRows Join(const FloatRows& a, const FloatRows& b) {
  FloatRows joined{a.dim + b.dim, {}};
  joined.elements.reserve(a.elements.size() + b.elements.size());
  for (size_t i = 0; i < a.count(); ++i) {
    joined.elements.insert(joined.elements.end(), a.row(i), a.row(i) + a.dim);
    joined.elements.insert(joined.elements.end(), b.row(i), b.row(i) + b.dim);
  }
  return joined;
}

}  // namespace

std::shared_ptr<const BuiltIndex> BuildCluster(const BuildInput& input,
                                               const ClusterOptions& options) {
  const QuerySpace space(input);
  const auto make = [&](int64_t begin, int64_t end, std::shared_ptr<const CholeskyFactor> basis) {
    const FloatRows keys = space.Keys(begin, end);
    FloatRows values = CentredValues(input.view, begin, end);
    values.ScaleTo(kValueVariance);
    const FloatRows points = Join(keys, values);
    const size_t clusters = keys.count() / static_cast<size_t>(options.keys_per_cluster) -
                            keys.count() / kKeysPerOutlier;
    std::vector<uint16_t> part_of =
        AssignToClusters(points.elements, static_cast<int>(points.dim),
                         static_cast<int>(std::max<size_t>(clusters, 1)));
    const int count = SplitOutliers(keys, part_of);
    auto run = std::make_shared<PartsRun>();
    run->parts =
        KeyParts::Make(input.view, begin, part_of, count, /*bounds=*/false, std::move(basis));
    return std::shared_ptr<const PartsRun>(std::move(run));
  };
  return BuildParts(input, "cluster", PartRank::kSpread, make);
}

}  // namespace kvseek::index
