#include "index/near_points.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "index/key_index.h"
#include "index/scratch.h"
#include "kernels/cpu/attention.h"

namespace kvseek::index {
namespace {

constexpr int64_t kClusterPoints = 64;
constexpr int64_t kClustersMax = 4096;
constexpr int kRounds = 3;
constexpr int kNearClusters = 12;  ///< of which a point is compared with the members

struct Clusters {
  int64_t count = 0;
  std::vector<float> centres;     ///< (count, dim)
  std::vector<float> squares;     ///< (count)
  std::vector<uint32_t> of;       ///< cluster of each point
  std::vector<uint32_t> starts;   ///< (count + 1), into members
  std::vector<uint32_t> members;  ///< cluster by cluster
};

float Square(const float* point, int dim) {
  float product = 0.0F;
  kernels::ScoreFloatRows(point, 1, point, 1, dim, &product, 1);
  return product;
}

/// Puts each point into the cluster with the nearest centre.
bool Assign(const float* points, int64_t count, int dim, const std::function<bool()>& give_up,
            Clusters& clusters) {
  const auto centres = static_cast<size_t>(clusters.count);
  const AlignedArray<float> products = MakeAligned<float>(kMaxGroup * centres);
  for (int64_t first = 0; first < count; first += kMaxGroup) {
    if (first % (64 * kMaxGroup) == 0 && give_up()) return false;
    const auto rows = static_cast<int>(std::min<int64_t>(kMaxGroup, count - first));
    kernels::ScoreFloatRows(points + first * dim, rows, clusters.centres.data(),
                            static_cast<int>(centres), dim, products.get(),
                            static_cast<int>(centres));
    for (int r = 0; r < rows; ++r) {
      const float* const row = products.get() + static_cast<size_t>(r) * centres;
      float best = std::numeric_limits<float>::infinity();
      for (size_t c = 0; c < centres; ++c) {
        const float distance = clusters.squares[c] - 2.0F * row[c];
        if (distance < best) {
          best = distance;
          clusters.of[static_cast<size_t>(first + r)] = static_cast<uint32_t>(c);
        }
      }
    }
  }
  return true;
}

/// Moves each centre to its members' mean; one without members stays.
void MoveCentres(const float* points, int64_t count, int dim, Clusters& clusters) {
  const auto width = static_cast<size_t>(dim);
  std::vector<float> sums(clusters.centres.size());
  std::vector<int> sizes(static_cast<size_t>(clusters.count));
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    const size_t c = clusters.of[i];
    ++sizes[c];
    for (size_t d = 0; d < width; ++d) sums[c * width + d] += points[i * width + d];
  }
  for (size_t c = 0; c < sizes.size(); ++c) {
    if (sizes[c] == 0) continue;
    float* const centre = clusters.centres.data() + c * width;
    for (size_t d = 0; d < width; ++d) {
      centre[d] = sums[c * width + d] / static_cast<float>(sizes[c]);
    }
    clusters.squares[c] = Square(centre, dim);
  }
}

void ListMembers(int64_t count, Clusters& clusters) {
  clusters.starts.assign(static_cast<size_t>(clusters.count) + 1, 0);
  for (const uint32_t c : clusters.of) ++clusters.starts[size_t{c} + 1];
  for (size_t c = 1; c < clusters.starts.size(); ++c) clusters.starts[c] += clusters.starts[c - 1];
  std::vector<uint32_t> next(clusters.starts.begin(), clusters.starts.end() - 1);
  clusters.members.resize(static_cast<size_t>(count));
  for (size_t i = 0; i < clusters.of.size(); ++i) {
    clusters.members[next[clusters.of[i]]++] = static_cast<uint32_t>(i);
  }
}

/// Ids of the members of the clusters nearest to cluster c, itself included.
std::vector<uint32_t> Neighbourhood(const Clusters& clusters, size_t c, int dim) {
  const auto count = static_cast<size_t>(clusters.count);
  std::vector<float> products(count);
  kernels::ScoreFloatRows(clusters.centres.data() + c * static_cast<size_t>(dim), 1,
                          clusters.centres.data(), static_cast<int>(count), dim, products.data(),
                          static_cast<int>(count));
  std::vector<std::pair<float, uint32_t>> order(count);
  for (size_t i = 0; i < count; ++i) {
    order[i] = {clusters.squares[i] - 2.0F * products[i], static_cast<uint32_t>(i)};
  }
  const size_t near = std::min<size_t>(kNearClusters, count);
  std::partial_sort(order.begin(), order.begin() + static_cast<ptrdiff_t>(near), order.end());
  std::vector<uint32_t> ids;
  for (size_t i = 0; i < near; ++i) {
    const size_t at = order[i].second;
    ids.insert(ids.end(), clusters.members.begin() + clusters.starts[at],
               clusters.members.begin() + clusters.starts[at + 1]);
  }
  return ids;
}

/// Fills in the neighbours of cluster c's members.
void SearchCluster(const float* points, const float* squares, int dim, const Clusters& clusters,
                   size_t c, NearPoints& near) {
  const std::vector<uint32_t> ids = Neighbourhood(clusters, c, dim);
  const auto width = static_cast<size_t>(dim);
  const auto gather = [&](const uint32_t* from, size_t rows) {
    AlignedArray<float> gathered = MakeAligned<float>(rows * width);
    for (size_t i = 0; i < rows; ++i) {
      std::memcpy(gathered.get() + i * width, points + from[i] * width, width * sizeof(float));
    }
    return gathered;
  };
  const AlignedArray<float> others = gather(ids.data(), ids.size());
  const AlignedArray<float> products = MakeAligned<float>(kMaxGroup * ids.size());
  std::vector<std::pair<float, uint32_t>> order;
  for (size_t at = clusters.starts[c]; at < clusters.starts[c + 1]; at += kMaxGroup) {
    const size_t rows = std::min<size_t>(kMaxGroup, clusters.starts[c + 1] - at);
    const AlignedArray<float> queries = gather(clusters.members.data() + at, rows);
    kernels::ScoreFloatRows(queries.get(), static_cast<int>(rows), others.get(),
                            static_cast<int>(ids.size()), dim, products.get(),
                            static_cast<int>(ids.size()));
    for (size_t r = 0; r < rows; ++r) {
      const uint32_t self = clusters.members[at + r];
      order.clear();
      for (size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] == self) continue;
        order.emplace_back(squares[ids[i]] - 2.0F * products[r * ids.size() + i], ids[i]);
      }
      const auto kept = static_cast<ptrdiff_t>(
          std::min<size_t>(static_cast<size_t>(near.per_point), order.size()));
      std::nth_element(order.begin(), order.begin() + kept, order.end());
      std::sort(order.begin(), order.begin() + kept);
      for (ptrdiff_t i = 0; i < kept; ++i) {
        near.ids[size_t{self} * static_cast<size_t>(near.per_point) + static_cast<size_t>(i)] =
            order[static_cast<size_t>(i)].second;
      }
    }
  }
}

}  // namespace

NearPoints FindNearPoints(const float* points, const float* squares, int64_t count, int dim,
                          int per_point, const std::function<bool()>& give_up) {
  const auto width = static_cast<size_t>(dim);
  Clusters clusters;
  clusters.count = std::clamp<int64_t>(count / kClusterPoints, 1, kClustersMax);
  clusters.of.resize(static_cast<size_t>(count));
  for (int64_t c = 0; c < clusters.count; ++c) {
    const float* const point = points + static_cast<size_t>(c * count / clusters.count) * width;
    clusters.centres.insert(clusters.centres.end(), point, point + width);
    clusters.squares.push_back(Square(point, dim));
  }
  for (int round = 0; round < kRounds; ++round) {
    if (!Assign(points, count, dim, give_up, clusters)) return {};
    if (round + 1 < kRounds) MoveCentres(points, count, dim, clusters);
  }
  ListMembers(count, clusters);
  NearPoints near;
  near.per_point = per_point;
  near.ids.assign(static_cast<size_t>(count) * static_cast<size_t>(per_point),
                  NearPoints::kNoPoint);
  for (size_t c = 0; c < static_cast<size_t>(clusters.count); ++c) {
    if (c % 64 == 0 && give_up()) return {};
    SearchCluster(points, squares, dim, clusters, c, near);
  }
  return near;
}

}  // namespace kvseek::index
