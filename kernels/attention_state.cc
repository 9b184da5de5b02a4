#include "kernels/attention_state.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace kvseek::kernels {
namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();

/// exp(part - reference) for reference >= part. 0 for an empty part, even where the reference is
/// empty too and the difference would be NaN.
float Weight(float part, float reference) noexcept {
  if (part == kEmpty) return 0.0F;
  return part == reference ? 1.0F : std::exp(part - reference);
}

/// into := a * into + b * from. A weight of 0 must win over whatever stands there.
void Blend(float* into, const float* from, float a, float b, int count) noexcept {
  if (b == 0.0F && a == 1.0F) return;
  if (a == 0.0F) {
    for (int i = 0; i < count; ++i) into[i] = b * from[i];
    return;
  }
  for (int i = 0; i < count; ++i) into[i] = a * into[i] + b * from[i];
}

}  // namespace

void ResetState(const GroupState& state) noexcept {
  const auto group = static_cast<size_t>(state.group);
  std::fill_n(state.max, group, kEmpty);
  std::fill_n(state.sum, group, 0.0F);
  std::fill_n(state.acc, group * static_cast<size_t>(state.value_dim), 0.0F);
}

void MergeState(const GroupState& into, const GroupState& from) noexcept {
  for (int h = 0; h < into.group; ++h) {
    if (from.max[h] == kEmpty) continue;
    const float reference = std::max(into.max[h], from.max[h]);
    const float a = Weight(into.max[h], reference);
    const float b = Weight(from.max[h], reference);
    const size_t offset = static_cast<size_t>(h) * static_cast<size_t>(into.value_dim);
    into.max[h] = reference;
    into.sum[h] = a * into.sum[h] + b * from.sum[h];
    Blend(into.acc + offset, from.acc + offset, a, b, into.value_dim);
  }
}

void FinishState(const GroupState& state, float* out, float* lse) noexcept {
  for (int h = 0; h < state.group; ++h) {
    const size_t offset = static_cast<size_t>(h) * static_cast<size_t>(state.value_dim);
    const bool empty = state.max[h] == kEmpty || !(state.sum[h] > 0.0F);
    const float inverse = empty ? 0.0F : 1.0F / state.sum[h];
    lse[h] = empty ? kEmpty : state.max[h] + std::log(state.sum[h]);
    for (int d = 0; d < state.value_dim; ++d) {
      out[offset + static_cast<size_t>(d)] = inverse * state.acc[offset + static_cast<size_t>(d)];
    }
  }
}

void MergeFinished(float* out, float* lse, const float* other_out, const float* other_lse,
                   int heads, int value_dim) noexcept {
  for (int h = 0; h < heads; ++h) {
    if (other_lse[h] == kEmpty) continue;
    const float reference = std::max(lse[h], other_lse[h]);
    const float a = Weight(lse[h], reference);
    const float b = Weight(other_lse[h], reference);
    const float sum = a + b;
    const size_t offset = static_cast<size_t>(h) * static_cast<size_t>(value_dim);
    lse[h] = reference + std::log(sum);
    Blend(out + offset, other_out + offset, a / sum, b / sum, value_dim);
  }
}

}  // namespace kvseek::kernels
