// The keys that training queries attend to most: one side of the bipartite graph of queries and
// keys (RoarGraph, arXiv 2408.08933) from which the graph index is projected.
#ifndef KVSEEK_INDEX_QUERY_NEIGHBOURS_H_
#define KVSEEK_INDEX_QUERY_NEIGHBOURS_H_

#include <cstdint>
#include <vector>

#include "index/built_index.h"

namespace kvseek::index {

/// Query row i * group + h is head h of training query i. keys: (rows, per_query), best first,
/// kNoKey where a query saw fewer keys.
struct QueryNeighbours {
  static constexpr uint32_t kNoKey = ~uint32_t{0};
  int per_query = 0;
  std::vector<uint32_t> keys;
};

enum class NeighbourSearch {
  kByLength,  ///< exactly where a query saw few keys, else by codes
  kExact,     ///< every key a query saw, by exact scores
  kCodes      ///< candidates of the whole group by the ladder's codes, ranked by exact scores
};

/// The `per_query` best keys of each training query among the keys below `covered` that it saw.
/// Empty when input.give_up() says true.
QueryNeighbours FindQueryNeighbours(const BuildInput& input, int64_t covered, int per_query,
                                    NeighbourSearch how = NeighbourSearch::kByLength);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_QUERY_NEIGHBOURS_H_
