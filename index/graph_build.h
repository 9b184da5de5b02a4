// The graph over the keys of one head cache that the graph index searches.
//
// Built from training queries (RetrievalAttention, arXiv 2409.10516; RoarGraph, arXiv 2408.08933):
//
//   bipartite   the best keys of each training query (query_neighbours.h)
//   projection  keys that are often best for the same queries are joined. Each key is a pivot for
//               the queries that rank it highest, up to a fixed number, and a key's popularity is
//               divided out, so that keys that everybody attends to do not collect the edges
//   neighbours  the keys nearest in the queries' metric (near_points.h): they also join keys that
//               no training query has seen, such as the latest
//   occlusion   of both kinds, nearest first, a candidate stays unless one that has stayed is
//               clearly nearer to it than the key is. Distances are those of query_space.h, in
//               which that is true of inner products
//   repair      a key is always joined to the one before and the one after it, so every key is
//               reachable from every other, and neighbours in text are often attended together
//
// An edge keeps its squared distance: the search predicts scores with it.
#ifndef KVSEEK_INDEX_GRAPH_BUILD_H_
#define KVSEEK_INDEX_GRAPH_BUILD_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "index/built_index.h"
#include "index/cholesky.h"
#include "index/query_neighbours.h"

namespace kvseek::index {

inline constexpr int kGraphPartTokens = 64;
inline constexpr int kGraphPartEntries = 2;
inline constexpr int kGraphEntries = 8;
inline constexpr int kGraphDegree = 32;    ///< of a key, at most, unless the caller says otherwise
inline constexpr int kGraphDegreeMin = 4;  ///< two are taken by the neighbours in position
inline constexpr int kGraphDegreeMax = 256;

/// Immutable once built. Key i is position i of the head cache.
struct KeyGraph {
  /// Of the training queries' second moment.
  std::shared_ptr<const CholeskyFactor> query_factor;
  std::vector<uint32_t> starts;      ///< (keys + 1), into neighbours
  std::vector<uint32_t> neighbours;  ///< of key after key, nearest first
  std::vector<uint16_t> distances;   ///< bf16, squared, of each neighbour
  /// Where every search starts: the keys that most training queries rank first.
  std::vector<uint32_t> entries;
  /// (parts, kGraphPartEntries): the keys of each stretch of kGraphPartTokens that training queries
  /// attend to most.
  std::vector<uint32_t> part_entries;
  /// (keys) bf16: squared distance to the mean of the key's stretch.
  std::vector<uint16_t> deviations;

  int64_t Keys() const { return static_cast<int64_t>(starts.size()) - 1; }
  int Degree(uint32_t key) const { return static_cast<int>(starts[key + 1] - starts[key]); }
  absl::Span<const uint32_t> Neighbours(uint32_t key) const {
    return absl::MakeConstSpan(neighbours).subspan(starts[key], starts[key + 1] - starts[key]);
  }
  size_t Bytes() const;
};

/// CPU time of the calling thread.
double ThreadSeconds();

/// What a build cost, in ThreadSeconds.
struct GraphBuildTimes {
  double queries = 0.0;     ///< bipartite graph
  double neighbours = 0.0;  ///< metric, coordinates and near points
  double edges = 0.0;       ///< projection, occlusion
  double parts = 0.0;       ///< summaries for what is not read
};

/// The graph over the first `covered` keys, covered a positive multiple of kSegmentTokens, with at
/// most `degree` neighbours each (kGraphDegreeMin..kGraphDegreeMax). None without training queries,
/// or when input.give_up() says true. Runs in the calling thread; deterministic.
std::optional<KeyGraph> BuildKeyGraph(const BuildInput& input, int64_t covered, int degree,
                                      GraphBuildTimes& times);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_GRAPH_BUILD_H_
