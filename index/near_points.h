// Approximate nearest neighbours among many points: what a graph over keys is made from.
//
// Points are put into clusters of about 64 (a few rounds of k-means from evenly spread points), and
// each is compared with those of the clusters nearest to its own. 32K points of 128 dimensions take
// about half a second on one core, 12 times less than comparing all; 90-97 % of the 32 nearest are
// found on real keys.
#ifndef KVSEEK_INDEX_NEAR_POINTS_H_
#define KVSEEK_INDEX_NEAR_POINTS_H_

#include <cstdint>
#include <functional>
#include <vector>

namespace kvseek::index {

/// (points, per_point): ids, nearest first, not the point itself; kNoPoint where there are fewer.
struct NearPoints {
  static constexpr uint32_t kNoPoint = ~uint32_t{0};
  int per_point = 0;
  std::vector<uint32_t> ids;
};

/// `points`: (count, dim) fp32, dim a multiple of 8 up to 512; `squares`: (count), |point|^2.
/// Deterministic. Empty when give_up() says true.
NearPoints FindNearPoints(const float* points, const float* squares, int64_t count, int dim,
                          int per_point, const std::function<bool()>& give_up);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_NEAR_POINTS_H_
