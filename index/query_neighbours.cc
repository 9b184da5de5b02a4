#include "index/query_neighbours.h"

#include <algorithm>

#include "index/selection.h"
#include "kernels/cpu/attention.h"

namespace kvseek::index {
namespace {

// Where the two cost the same (group of 6, key_dim 128, AVX-512): 3000 keys take 121 us exactly and
// 137 us by codes, 4096 keys 175 and 143, 31744 keys 946 and 253.
constexpr int64_t kExactBelow = 3072;
// Of the ladder, for each key wanted of each head, and once more: codes err.
constexpr int kCandidatesPerKey = 2;

class NeighbourFinder {
 public:
  NeighbourFinder(const BuildInput& input, int64_t covered, QueryNeighbours& found)
      : input_(input), covered_(covered), found_(found) {}

  void Find(size_t i, NeighbourSearch how) {
    const int64_t end = std::min(covered_, input_.query_positions[i] + 1);
    if (end <= 0) return;
    const auto stride =
        static_cast<size_t>(input_.group) * static_cast<size_t>(input_.view.shape.key_dim);
    const SearchQuery query{input_.queries.data() + i * stride, input_.group, 0, end};
    scratch_.Reset();
    if (how == NeighbourSearch::kExact ||
        (how == NeighbourSearch::kByLength && end < kExactBelow)) {
      ScoreAll(query);
    } else {
      ScoreCandidates(query);
    }
    for (int h = 0; h < input_.group; ++h) {
      Keep(i * static_cast<size_t>(input_.group) + static_cast<size_t>(h), h);
    }
  }

 private:
  void ScoreAll(const SearchQuery& query) {
    const auto count = static_cast<size_t>(query.end);
    positions_.resize(count);
    for (size_t t = 0; t < count; ++t) positions_[t] = static_cast<int64_t>(t);
    scores_ = scratch_.Take<float>(static_cast<size_t>(query.group) * count);
    VisitRows(input_.view, 0, query.end,
              [&](const uint16_t* keys, const uint16_t*, int64_t first, int tokens) {
                kernels::ScoreRows(query.queries, query.group, keys, input_.view.shape.dtype,
                                   tokens, input_.view.shape.key_dim, scores_ + first,
                                   static_cast<int>(count));
              });
  }

  void ScoreCandidates(const SearchQuery& query) {
    SearchOptions options;
    options.candidates =
        std::min(kMaxCandidates, found_.per_query * (query.group + 1) * kCandidatesPerKey);
    options.exact_rows = 0;
    options.list_read = true;
    positions_ = LadderIndex().Search(input_.view, query, options, scratch_).positions;
    scratch_.Reset();
    const size_t count = positions_.size();
    auto* const rows = scratch_.Take<const uint16_t*>(count);
    for (size_t i = 0; i < count; ++i) rows[i] = FindRow(input_.view, positions_[i]).key;
    scores_ = scratch_.Take<float>(static_cast<size_t>(query.group) * count);
    kernels::ScoreGathered(query.queries, query.group, rows, input_.view.shape.dtype,
                           static_cast<int>(count), input_.view.shape.key_dim, scores_,
                           static_cast<int>(count));
  }

  void Keep(size_t row, int head) {
    const float* const scores = scores_ + static_cast<size_t>(head) * positions_.size();
    const auto kept = std::min(positions_.size(), static_cast<size_t>(found_.per_query));
    order_.resize(positions_.size());
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<uint32_t>(i);
    const auto better = [&](uint32_t a, uint32_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    };
    const auto middle = order_.begin() + static_cast<ptrdiff_t>(kept);
    std::nth_element(order_.begin(), middle, order_.end(), better);
    std::sort(order_.begin(), middle, better);
    uint32_t* const keys = found_.keys.data() + row * static_cast<size_t>(found_.per_query);
    for (size_t i = 0; i < kept; ++i) keys[i] = static_cast<uint32_t>(positions_[order_[i]]);
  }

  const BuildInput& input_;
  const int64_t covered_;
  QueryNeighbours& found_;
  Scratch scratch_;
  std::vector<int64_t> positions_;
  float* scores_ = nullptr;  ///< (group, positions_.size())
  std::vector<uint32_t> order_;
};

}  // namespace

QueryNeighbours FindQueryNeighbours(const BuildInput& input, int64_t covered, int per_query,
                                    NeighbourSearch how) {
  QueryNeighbours found;
  found.per_query = per_query;
  const size_t queries = input.query_positions.size();
  found.keys.assign(queries * static_cast<size_t>(input.group) * static_cast<size_t>(per_query),
                    QueryNeighbours::kNoKey);
  NeighbourFinder finder(input, covered, found);
  for (size_t i = 0; i < queries; ++i) {
    if (i % 16 == 0 && input.give_up()) return {};
    finder.Find(i, how);
  }
  return found;
}

}  // namespace kvseek::index
