// k-means clustering; hides FAISS, which runs the iterations.
#ifndef KVSEEK_INDEX_KMEANS_H_
#define KVSEEK_INDEX_KMEANS_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace kvseek::index {

/// The cluster of each point, numbered from 0 on, none empty. `points` is (n, dim) fp32, dim a
/// multiple of 8 up to 1024; 1 <= clusters <= n. Each point is in the cluster whose centroid is
/// nearest. The same bits for the same points at the same SIMD level. One thread.
std::vector<uint16_t> AssignToClusters(absl::Span<const float> points, int dim, int clusters);

/// 64 centroids, (dim, 64), their coordinates side by side. `points` is (n, dim), n >= 64, of any
/// dim. Clusters that lose all their points are refilled from the largest. Bits as above.
std::vector<float> TrainCentroids(absl::Span<const float> points, int dim);

/// Leaves out the numbers that no point has; returns how many are left.
int CompactNumbers(std::vector<uint16_t>& numbers);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_KMEANS_H_
