#include "index/graph_build.h"

#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "index/near_points.h"
#include "index/query_space.h"
#include "index/selection.h"
#include "kernels/cpu/attention.h"
#include "kernels/dtype.h"

namespace kvseek::index {
namespace {

constexpr int kQueryKeys = 64;         ///< best keys of a training query
constexpr int kPivotQueries = 64;      ///< queries for which one key is a pivot, at most
constexpr int kProjected = 32;         ///< candidates of a key from the projection
constexpr int kNear = 48;              ///< and from its neighbourhood
constexpr float kHubPower = 0.3F;      ///< a key's popularity to this power is divided out
constexpr float kOcclusion = 1.3F;     ///< how much nearer an occluding key must be, squared
constexpr float kDistanceMin = 1e-6F;  ///< of equal keys, relative to the mean square

/// The bipartite graph from the keys' side.
class Projection {
 public:
  Projection(const QueryNeighbours& queries, size_t keys)
      : queries_(queries), starts_(keys + 1), weight_(keys) {
    const auto width = static_cast<size_t>(queries.per_query);
    for (const uint32_t key : queries.keys) {
      if (key != QueryNeighbours::kNoKey) ++starts_[size_t{key} + 1];
    }
    for (size_t k = 1; k < starts_.size(); ++k) starts_[k] += starts_[k - 1];
    std::vector<uint32_t> next(starts_.begin(), starts_.end() - 1);
    rows_.resize(starts_.back());
    const size_t rows = width == 0 ? 0 : queries.keys.size() / width;
    // Rank by rank, so that a key's queries come in the order in which they rank it.
    for (size_t rank = 0; rank < width; ++rank) {
      rank_weight_.push_back(1.0F / std::sqrt(static_cast<float>(rank + 1)));
      for (size_t row = 0; row < rows; ++row) {
        const uint32_t key = queries.keys[row * width + rank];
        if (key != QueryNeighbours::kNoKey) {
          rows_[next[key]++] = {static_cast<uint32_t>(row), static_cast<uint32_t>(rank)};
        }
      }
    }
    damping_.resize(keys);
    for (uint32_t k = 0; k < keys; ++k) {
      damping_[k] = std::pow(static_cast<float>(std::max(Popularity(k), 1)), -kHubPower);
    }
  }

  /// Training queries that have the key among their best.
  int Popularity(uint32_t key) const {
    return static_cast<int>(starts_[size_t{key} + 1] - starts_[key]);
  }
  /// Of which it is the very best.
  int Firsts(uint32_t key) const {
    int count = 0;
    for (uint32_t at = starts_[key]; at < starts_[size_t{key} + 1] && rows_[at].rank == 0; ++at) {
      ++count;
    }
    return count;
  }

  /// The keys most often best for the queries for which `key` is the pivot, at most `count`.
  std::vector<uint32_t> Partners(uint32_t key, size_t count) {
    const auto width = static_cast<size_t>(queries_.per_query);
    touched_.clear();
    const uint32_t end = std::min(starts_[size_t{key} + 1], starts_[key] + uint32_t{kPivotQueries});
    for (uint32_t at = starts_[key]; at < end; ++at) {
      const uint32_t* const row = queries_.keys.data() + rows_[at].row * width;
      const float own = rank_weight_[rows_[at].rank];
      for (size_t rank = 0; rank < width && row[rank] != QueryNeighbours::kNoKey; ++rank) {
        const uint32_t other = row[rank];
        if (other == key) continue;
        if (weight_[other] == 0.0F) touched_.push_back(other);
        weight_[other] += own * rank_weight_[rank];
      }
    }
    for (const uint32_t other : touched_) weight_[other] *= damping_[other];
    const auto kept = static_cast<ptrdiff_t>(std::min(count, touched_.size()));
    std::nth_element(touched_.begin(), touched_.begin() + kept, touched_.end(),
                     [&](uint32_t a, uint32_t b) {
                       return weight_[a] != weight_[b] ? weight_[a] > weight_[b] : a < b;
                     });
    for (const uint32_t other : touched_) weight_[other] = 0.0F;
    return {touched_.begin(), touched_.begin() + kept};
  }

 private:
  struct RankedRow {
    uint32_t row;
    uint32_t rank;
  };
  const QueryNeighbours& queries_;
  std::vector<uint32_t> starts_;  ///< (keys + 1), into rows_
  std::vector<RankedRow> rows_;   ///< key by key, by rank
  std::vector<float> rank_weight_, damping_;
  std::vector<float> weight_;  ///< (keys), zero between calls
  std::vector<uint32_t> touched_;
};

/// Keys as queries see them.
struct Coordinates {
  FloatRows points;            ///< (keys, key_dim)
  std::vector<float> squares;  ///< (keys)
  float distance_min = 0.0F;

  int dim() const { return static_cast<int>(points.dim); }
};

Coordinates MapKeys(const QuerySpace& space, int64_t covered) {
  Coordinates map{space.Keys(0, covered), std::vector<float>(static_cast<size_t>(covered)), 0.0F};
  double total = 0.0;
  for (size_t i = 0; i < map.squares.size(); ++i) {
    kernels::ScoreFloatRows(map.points.row(i), 1, map.points.row(i), 1, map.dim(), &map.squares[i],
                            1);
    total += map.squares[i];
  }
  map.distance_min =
      std::max(kDistanceMin * static_cast<float>(total / static_cast<double>(covered)), 1e-30F);
  return map;
}

/// |a - b|^2 from |a|^2, |b|^2 and <a, b>.
float SquaredDistance(float a, float b, float product) {
  return std::max(a + b - 2.0F * product, 0.0F);
}

/// Chooses one key's neighbours.
class Occlusion {
 public:
  Occlusion(const Coordinates& map, int degree) : map_(map), degree_(static_cast<size_t>(degree)) {}

  /// Of `candidates` (ids, any order, may repeat), with the neighbours in position kept.
  const std::vector<std::pair<float, uint32_t>>& Choose(uint32_t key,
                                                        std::vector<uint32_t> candidates) {
    std::sort(candidates.begin(), candidates.end());
    candidates.erase(std::unique(candidates.begin(), candidates.end()), candidates.end());
    std::erase(candidates, key);
    const size_t count = candidates.size();
    Gather(candidates);
    Distances(map_.points.row(key), map_.squares[key], candidates);
    order_.clear();
    for (size_t i = 0; i < count; ++i) order_.emplace_back(row_distances_[i], candidates[i]);
    std::sort(order_.begin(), order_.end());
    for (size_t i = 0; i < count; ++i) candidates[i] = order_[i].second;
    Gather(candidates);

    occluded_.assign(count, 0);
    kept_.clear();
    const auto in_position = [&](uint32_t other) { return other + 1 == key || key + 1 == other; };
    size_t reserved =
        static_cast<size_t>(std::count_if(candidates.begin(), candidates.end(), in_position));
    for (size_t i = 0; i < count; ++i) {
      if (in_position(candidates[i])) {
        --reserved;
      } else if (occluded_[i] != 0 || kept_.size() + reserved >= degree_) {
        continue;
      }
      kept_.emplace_back(std::max(order_[i].first, map_.distance_min), candidates[i]);
      Distances(rows_.data() + i * Width(), map_.squares[candidates[i]], candidates);
      for (size_t j = i + 1; j < count; ++j) {
        if (kOcclusion * row_distances_[j] < order_[j].first) occluded_[j] = 1;
      }
    }
    return kept_;
  }

 private:
  size_t Width() const { return map_.points.dim; }
  void Gather(const std::vector<uint32_t>& ids) {
    rows_.resize(ids.size() * Width());
    for (size_t i = 0; i < ids.size(); ++i) {
      std::memcpy(rows_.data() + i * Width(), map_.points.row(ids[i]), Width() * sizeof(float));
    }
  }
  /// From one point to the gathered ones.
  void Distances(const float* point, float square, const std::vector<uint32_t>& ids) {
    row_distances_.resize(ids.size());
    kernels::ScoreFloatRows(point, 1, rows_.data(), static_cast<int>(ids.size()), map_.dim(),
                            row_distances_.data(), static_cast<int>(ids.size()));
    for (size_t i = 0; i < ids.size(); ++i) {
      row_distances_[i] = SquaredDistance(square, map_.squares[ids[i]], row_distances_[i]);
    }
  }

  const Coordinates& map_;
  const size_t degree_;
  std::vector<float> rows_, row_distances_;
  std::vector<std::pair<float, uint32_t>> order_, kept_;
  std::vector<char> occluded_;
};

bool JoinKeys(const Coordinates& map, const NearPoints& near, int degree,
              const std::function<bool()>& give_up, Projection& projection, KeyGraph& graph) {
  const auto keys = static_cast<uint32_t>(map.squares.size());
  const auto width = static_cast<size_t>(near.per_point);
  Occlusion occlusion(map, degree);
  graph.starts.push_back(0);
  for (uint32_t key = 0; key < keys; ++key) {
    if (key % kSegmentTokens == 0 && give_up()) return false;
    std::vector<uint32_t> candidates = projection.Partners(key, kProjected);
    for (size_t i = 0; i < width && near.ids[key * width + i] != NearPoints::kNoPoint; ++i) {
      candidates.push_back(near.ids[key * width + i]);
    }
    if (key > 0) candidates.push_back(key - 1);
    if (key + 1 < keys) candidates.push_back(key + 1);
    for (const auto& [distance, other] : occlusion.Choose(key, std::move(candidates))) {
      graph.neighbours.push_back(other);
      graph.distances.push_back(kernels::FloatToBf16(distance));
    }
    graph.starts.push_back(static_cast<uint32_t>(graph.neighbours.size()));
  }
  graph.neighbours.shrink_to_fit();
  graph.distances.shrink_to_fit();
  return true;
}

/// Where searches start.
void ChooseEntries(const Projection& projection, uint32_t keys, KeyGraph& graph) {
  std::vector<uint32_t> order(keys);
  std::iota(order.begin(), order.end(), 0U);
  const auto best = [&](uint32_t first, uint32_t last, int count, const auto& value) {
    std::partial_sort(
        order.begin() + first, order.begin() + first + count, order.begin() + last,
        [&](uint32_t a, uint32_t b) { return value[a] != value[b] ? value[a] > value[b] : a < b; });
    return absl::MakeConstSpan(order).subspan(first, static_cast<size_t>(count));
  };
  std::vector<int> popularity(keys);
  std::vector<int> firsts(keys);
  for (uint32_t k = 0; k < keys; ++k) {
    popularity[k] = projection.Popularity(k);
    firsts[k] = projection.Firsts(k);
  }
  for (uint32_t first = 0; first < keys; first += kGraphPartTokens) {
    const auto part = best(first, first + kGraphPartTokens, kGraphPartEntries, popularity);
    graph.part_entries.insert(graph.part_entries.end(), part.begin(), part.end());
  }
  const auto entries = best(0, keys, kGraphEntries, firsts);
  graph.entries.assign(entries.begin(), entries.end());
}

void MeasureDeviations(const Coordinates& map, KeyGraph& graph) {
  const auto dim = map.points.dim;
  std::vector<float> mean(dim);
  for (size_t first = 0; first < map.squares.size(); first += kGraphPartTokens) {
    mean.assign(dim, 0.0F);
    for (size_t i = first; i < first + kGraphPartTokens; ++i) {
      for (size_t d = 0; d < dim; ++d) mean[d] += map.points.row(i)[d] / kGraphPartTokens;
    }
    for (size_t i = first; i < first + kGraphPartTokens; ++i) {
      float deviation = 0.0F;
      for (size_t d = 0; d < dim; ++d) {
        const float difference = map.points.row(i)[d] - mean[d];
        deviation += difference * difference;
      }
      graph.deviations.push_back(kernels::FloatToBf16(std::max(deviation, map.distance_min)));
    }
  }
}

}  // namespace

double ThreadSeconds() {
  timespec now = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

size_t KeyGraph::Bytes() const {
  return query_factor->Bytes() +
         (starts.size() + neighbours.size() + entries.size() + part_entries.size()) *
             sizeof(uint32_t) +
         (distances.size() + deviations.size()) * sizeof(uint16_t);
}

std::optional<KeyGraph> BuildKeyGraph(const BuildInput& input, int64_t covered, int degree,
                                      GraphBuildTimes& times) {
  if (input.query_positions.empty()) return std::nullopt;
  double since = ThreadSeconds();
  const auto lap = [&](double GraphBuildTimes::*phase) {
    const double now = ThreadSeconds();
    times.*phase += now - since;
    since = now;
  };
  KeyGraph graph;
  const QueryNeighbours queries = FindQueryNeighbours(input, covered, kQueryKeys);
  if (queries.keys.empty()) return std::nullopt;
  lap(&GraphBuildTimes::queries);

  const QuerySpace space(input);
  graph.query_factor = std::make_shared<const CholeskyFactor>(space.factor());
  const Coordinates map = MapKeys(space, covered);
  const NearPoints near = FindNearPoints(map.points.row(0), map.squares.data(), covered, map.dim(),
                                         kNear, input.give_up);
  if (near.ids.empty()) return std::nullopt;
  lap(&GraphBuildTimes::neighbours);

  Projection projection(queries, static_cast<size_t>(covered));
  if (!JoinKeys(map, near, degree, input.give_up, projection, graph)) return std::nullopt;
  ChooseEntries(projection, static_cast<uint32_t>(covered), graph);
  MeasureDeviations(map, graph);
  lap(&GraphBuildTimes::edges);
  return graph;
}

}  // namespace kvseek::index
