// Keys with their scores, and the choice of the best of them. Shared by the indexes.
#ifndef KVSEEK_INDEX_SELECTION_H_
#define KVSEEK_INDEX_SELECTION_H_

#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <vector>

#include "absl/types/span.h"
#include "index/key_index.h"
#include "kernels/attention_state.h"

namespace kvseek::index {

/// Keys of one piece of work: scores is (positions, group), natural-log units.
struct ScoredKeys {
  std::pmr::vector<int64_t> positions;
  std::pmr::vector<float> scores;

  ScoredKeys() = default;
  /// In the scratch's memory.
  explicit ScoredKeys(Scratch& scratch) : positions(&scratch), scores(&scratch) {}

  /// Appends key `position`, whose score for head h stands at scores[h * stride].
  void Add(int64_t position, const float* head_scores, int stride, int group);
  void Append(const ScoredKeys& other);
  void Reserve(size_t keys, int group);
  const float* Scores(size_t index, int group) const { return scores.data() + index * group; }
};

/// Indices, ascending, of the (at most) `count` entries with the largest value; ties go to the
/// lower index. They stand in the scratch's memory, as does what the functions below are given a
/// scratch for; none resets it.
absl::Span<const uint32_t> BestIndices(absl::Span<const float> values, int64_t count,
                                       Scratch& scratch);

/// Each key's largest softmax weight in any head, as a logarithm: max_h(score_h - lse_h).
std::pmr::vector<float> GroupScores(const ScoredKeys& keys, absl::Span<const float> lse,
                                    Scratch& scratch);

/// An empty state.
kernels::GroupState MakeState(int group, int value_dim, Scratch& scratch);

/// ln of the sum of exponentials of a head, -infinity where it is empty.
float LseOf(const kernels::GroupState& state, int head);
/// Of each head.
std::pmr::vector<float> LseOf(const kernels::GroupState& state, Scratch& scratch);

/// A running state that owns its storage.
class OwnedState {
 public:
  OwnedState(int group, int value_dim);
  const kernels::GroupState& view() const { return view_; }
  std::vector<float> Lse() const;

 private:
  AlignedArray<float> storage_;
  kernels::GroupState view_;
};

/// Takes a part that is in `state` out of it again. What is left of a head is empty if it is within
/// rounding of nothing.
void SubtractState(const kernels::GroupState& state, const kernels::GroupState& part);

/// The part of a group's state that belongs to one head.
inline kernels::GroupState HeadState(const kernels::GroupState& state, int head) {
  return {1, state.value_dim, state.max + head, state.sum + head,
          state.acc + static_cast<ptrdiff_t>(head) * state.value_dim};
}

/// Where the rows of a position stand.
struct RowPointers {
  const uint16_t* key;
  const uint16_t* value;
};
RowPointers FindRow(const KvView& view, int64_t position);

/// Calls visit(keys, values, first_position, tokens) for each contiguous run of rows of [begin,
/// end), in order.
template <typename Visitor>
void VisitRows(const KvView& view, int64_t begin, int64_t end, const Visitor& visit) {
  const auto part = [&](const uint16_t* keys, const uint16_t* values, int64_t first,
                        int64_t tokens) {
    const int64_t from = begin > first ? begin - first : 0;
    const int64_t to = end - first < tokens ? end - first : tokens;
    if (from >= to) return;
    visit(keys + from * view.shape.key_dim, values + from * view.shape.value_dim, first + from,
          static_cast<int>(to - from));
  };
  const int64_t sealed = view.SealedTokens();
  for (int64_t s = begin / kSegmentTokens; s * kSegmentTokens < end && s * kSegmentTokens < sealed;
       ++s) {
    const Segment& segment = *view.segments[static_cast<size_t>(s)];
    part(segment.keys(), segment.values(), s * kSegmentTokens, kSegmentTokens);
  }
  int64_t first = sealed;
  for (const TailChunkView& chunk : view.tail) {
    part(chunk.keys, chunk.values, first, kTailChunkTokens);  // `end` is within the view
    first += kTailChunkTokens;
  }
}

/// Queries times the softmax scale: (group, key_dim).
AlignedArray<float> ScaleQueries(const SearchQuery& query, const KvShape& shape);
const float* ScaleQueries(const SearchQuery& query, const KvShape& shape, Scratch& scratch);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_SELECTION_H_
