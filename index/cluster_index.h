// Clusters of keys that are alike to queries and have values that are alike.
//
// After RetroInfer (arXiv 2505.02922; PQCache, arXiv 2407.12820): k-means over runs of segments,
// since keys drift with position; clusters are ranked by their centroid's score and its spread, and
// those that are not read are estimated. Three things are this project's own, each found by
// measuring on prefill queries of real heads at equal reads:
//   - the distance of two keys is that of their scores (query_space.h);
//   - values count in it, too. The estimate's error is the covariance of scores and values within a
//     cluster; where attention is diffuse, half of the error goes;
//   - keys that stand out from their cluster get parts of their own.
#ifndef KVSEEK_INDEX_CLUSTER_INDEX_H_
#define KVSEEK_INDEX_CLUSTER_INDEX_H_

#include <memory>

#include "index/built_index.h"

namespace kvseek::index {

struct ClusterOptions {
  int keys_per_cluster = 16;  ///< mean, 4..256
};

/// Without training queries all directions of a query count as equally likely, which is worse. Null
/// if nothing is sealed, or when the build is given up. Runs in the calling thread.
std::shared_ptr<const BuiltIndex> BuildCluster(const BuildInput& input,
                                               const ClusterOptions& options);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_CLUSTER_INDEX_H_
