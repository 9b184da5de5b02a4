#include "index/selection.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/threshold.h"

namespace kvseek::index {
namespace {

// Subtraction in fp32 leaves about this share of what was there before as noise.
constexpr float kSubtractionNoise = 2e-6F;

void Scale(const SearchQuery& query, const KvShape& shape, float* scaled) {
  const size_t count = static_cast<size_t>(query.group) * shape.key_dim;
  for (size_t i = 0; i < count; ++i) scaled[i] = query.queries[i] * shape.softmax_scale;
}

}  // namespace

void ScoredKeys::Add(int64_t position, const float* head_scores, int stride, int group) {
  positions.push_back(position);
  const size_t at = scores.size();
  scores.resize(at + static_cast<size_t>(group));
  for (int h = 0; h < group; ++h) {
    scores[at + static_cast<size_t>(h)] = head_scores[static_cast<ptrdiff_t>(h) * stride];
  }
}

void ScoredKeys::Append(const ScoredKeys& other) {
  positions.insert(positions.end(), other.positions.begin(), other.positions.end());
  scores.insert(scores.end(), other.scores.begin(), other.scores.end());
}

void ScoredKeys::Reserve(size_t keys, int group) {
  positions.reserve(keys);
  scores.reserve(keys * static_cast<size_t>(group));
}

absl::Span<const uint32_t> BestIndices(absl::Span<const float> values, int64_t count,
                                       Scratch& scratch) {
  const auto size = static_cast<int64_t>(values.size());
  count = std::clamp<int64_t>(count, 0, size);
  auto* const work = scratch.Take<int32_t>(values.size());
  const float threshold = kernels::RankThreshold(values.data(), size, count, work);
  if (count == 0) return {};
  auto* const indices = scratch.Take<uint32_t>(values.size());
  const int64_t found = kernels::IndicesFrom(values.data(), size, threshold, indices);
  uint32_t* end = indices + found;
  if (found > count) {
    const auto is_tie = [&](uint32_t i) { return values[i] == threshold; };
    int64_t ties = count - found + std::count_if(indices, end, is_tie);
    end = std::remove_if(indices, end, [&](uint32_t i) { return is_tie(i) && ties-- <= 0; });
  }
  return {indices, static_cast<size_t>(end - indices)};
}

std::pmr::vector<float> GroupScores(const ScoredKeys& keys, absl::Span<const float> lse,
                                    Scratch& scratch) {
  const int group = static_cast<int>(lse.size());
  std::pmr::vector<float> best(keys.positions.size(), &scratch);
  for (size_t i = 0; i < best.size(); ++i) {
    const float* scores = keys.Scores(i, group);
    float largest = -std::numeric_limits<float>::infinity();
    for (int h = 0; h < group; ++h) {
      largest = std::max(largest, scores[h] - lse[static_cast<size_t>(h)]);
    }
    best[i] = largest;
  }
  return best;
}

OwnedState::OwnedState(int group, int value_dim)
    : storage_(
          MakeAligned<float>(static_cast<size_t>(kernels::GroupStateFloats(group, value_dim)))),
      view_(kernels::BindState(storage_.get(), group, value_dim)) {
  kernels::ResetState(view_);
}

kernels::GroupState MakeState(int group, int value_dim, Scratch& scratch) {
  const kernels::GroupState state = kernels::BindState(
      scratch.Take<float>(static_cast<size_t>(kernels::GroupStateFloats(group, value_dim))), group,
      value_dim);
  kernels::ResetState(state);
  return state;
}

float LseOf(const kernels::GroupState& state, int head) {
  return state.sum[head] > 0.0F ? state.max[head] + std::log(state.sum[head])
                                : -std::numeric_limits<float>::infinity();
}

std::pmr::vector<float> LseOf(const kernels::GroupState& state, Scratch& scratch) {
  std::pmr::vector<float> lse(&scratch);
  lse.reserve(static_cast<size_t>(state.group));
  for (int h = 0; h < state.group; ++h) lse.push_back(LseOf(state, h));
  return lse;
}

std::vector<float> OwnedState::Lse() const {
  std::vector<float> lse;
  lse.reserve(static_cast<size_t>(view_.group));
  for (int h = 0; h < view_.group; ++h) lse.push_back(LseOf(view_, h));
  return lse;
}

void SubtractState(const kernels::GroupState& state, const kernels::GroupState& part) {
  for (int h = 0; h < state.group; ++h) {
    if (!(part.sum[h] > 0.0F) || !(state.sum[h] > 0.0F)) continue;
    // The part is in the state, so its reference is no larger, but for the rounding of an equal
    // one.
    const float factor = std::exp(std::min(part.max[h] - state.max[h], 80.0F));
    const float left = state.sum[h] - factor * part.sum[h];
    const bool empty = left <= kSubtractionNoise * state.sum[h];
    state.sum[h] = empty ? 0.0F : left;
    if (empty) state.max[h] = -std::numeric_limits<float>::infinity();
    float* acc = state.acc + static_cast<ptrdiff_t>(h) * state.value_dim;
    const float* taken = part.acc + static_cast<ptrdiff_t>(h) * state.value_dim;
    for (int d = 0; d < state.value_dim; ++d) acc[d] = empty ? 0.0F : acc[d] - factor * taken[d];
  }
}

RowPointers FindRow(const KvView& view, int64_t position) {
  const int64_t sealed = view.SealedTokens();
  const uint16_t* keys = nullptr;
  const uint16_t* values = nullptr;
  int64_t row = 0;
  if (position < sealed) {
    const Segment& segment = *view.segments[static_cast<size_t>(position / kSegmentTokens)];
    keys = segment.keys();
    values = segment.values();
    row = position % kSegmentTokens;
  } else {
    // All chunks but the last are full.
    const TailChunkView& chunk =
        view.tail[static_cast<size_t>((position - sealed) / kTailChunkTokens)];
    keys = chunk.keys;
    values = chunk.values;
    row = (position - sealed) % kTailChunkTokens;
  }
  return {keys + row * view.shape.key_dim, values + row * view.shape.value_dim};
}

AlignedArray<float> ScaleQueries(const SearchQuery& query, const KvShape& shape) {
  auto scaled = MakeAligned<float>(static_cast<size_t>(query.group) * shape.key_dim);
  Scale(query, shape, scaled.get());
  return scaled;
}

const float* ScaleQueries(const SearchQuery& query, const KvShape& shape, Scratch& scratch) {
  auto* const scaled = scratch.Take<float>(static_cast<size_t>(query.group) * shape.key_dim);
  Scale(query, shape, scaled);
  return scaled;
}

}  // namespace kvseek::index
