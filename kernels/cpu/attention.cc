#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/attention-inl.h"
#include "kernels/cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {

template <class Element, class Rows>
void ScoreAll(const float* queries, int group, Rows rows, int count, int dim, float* scores,
              int stride) {
  const auto columns = static_cast<size_t>(dim);
  for (int t = 0; t < count; t += kBlockRows) {
    const int block = std::min(kBlockRows, count - t);
    const Rows here = rows.From(t);
    ScoreBlock<Element>(queries, group, here, block,
                        FetchAhead<Element, Rows>(here, count - t, columns), columns, scores + t,
                        static_cast<size_t>(stride));
  }
}

HWY_INLINE float Largest(const float* scores, int count, float at_least) {
  const FloatTag d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  auto largest = hn::Set(d, at_least);
  int t = 0;
  for (; t + lanes <= count; t += lanes) largest = hn::Max(largest, hn::LoadU(d, scores + t));
  at_least = hn::GetLane(hn::MaxOfLanes(d, largest));
  for (; t < count; ++t) at_least = std::max(at_least, scores[t]);
  return at_least;
}

/// Moves one head of a state to a larger maximum.
HWY_INLINE void RaiseMax(float larger, const GroupState& state, int head) {
  const hn::CappedTag<float, 8> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const float shrink = std::exp(state.max[head] - larger);
  float* acc = state.acc + static_cast<size_t>(head) * static_cast<size_t>(state.value_dim);
  for (int i = 0; i < state.value_dim; i += lanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, acc + i), hn::Set(d, shrink)), d, acc + i);
  }
  state.sum[head] *= shrink;
  state.max[head] = larger;
}

/// Turns one block's scores of one head into weights, against a maximum that they may raise.
/// `weights` may be `scores`.
HWY_INLINE void WeighScores(const float* scores, int count, float* weights, const GroupState& state,
                            int head) {
  const FloatTag d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const float largest = Largest(scores, count, state.max[head]);
  if (largest == -std::numeric_limits<float>::infinity()) {
    std::fill_n(weights, count, 0.0F);
    return;
  }
  if (largest > state.max[head]) RaiseMax(largest, state, head);
  const auto reference = hn::Set(d, largest);
  auto sums = hn::Zero(d);
  int t = 0;
  for (; t + lanes <= count; t += lanes) {
    const auto w = Exp(d, hn::Sub(hn::LoadU(d, scores + t), reference));
    sums = hn::Add(sums, w);
    hn::StoreU(w, d, weights + t);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, sums));
  const hn::CappedTag<float, 1> one;
  for (; t < count; ++t) {
    const float w = hn::GetLane(Exp(one, hn::Set(one, scores[t] - largest)));
    sum += w;
    weights[t] = w;
  }
  state.sum[head] += sum;
}

/// Adds one block with known scores.
template <class Element, class Rows, class Fetch>
HWY_INLINE void AccumulateBlock(const float* scores, size_t stride, Rows rows, int count,
                                Fetch fetch, float* weights, const GroupState& state) {
  for (int h = 0; h < state.group; ++h) {
    WeighScores(scores + static_cast<size_t>(h) * stride, count, weights + h * kBlockRows, state,
                h);
  }
  WeighBlock<Element>(weights, kBlockRows, state.group, rows, count, fetch,
                      static_cast<size_t>(state.value_dim), state.acc);
}

constexpr int kGroupMax = 64;

template <class Element, class Rows>
void AccumulateAll(const float* scores, int stride, Rows rows, int count, const GroupState& state) {
  HWY_ALIGN float weights[kGroupMax * kBlockRows];
  const auto columns = static_cast<size_t>(state.value_dim);
  for (int t = 0; t < count; t += kBlockRows) {
    const int block = std::min(kBlockRows, count - t);
    const Rows here = rows.From(t);
    AccumulateBlock<Element>(scores + t, static_cast<size_t>(stride), here, block,
                             FetchAhead<Element, Rows>(here, count - t, columns), weights, state);
  }
}

template <class Element>
void AttendAll(const float* queries, const uint16_t* keys, const uint16_t* values, int tokens,
               int key_dim, const GroupState& state) {
  HWY_ALIGN float scores[kGroupMax * kBlockRows];
  const ContiguousRows<Element> key_rows{keys, static_cast<size_t>(key_dim)};
  const ContiguousRows<Element> value_rows{values, static_cast<size_t>(state.value_dim)};
  // While the keys of a block are scored its values are fetched, and meanwhile the next block's
  // keys.
  using Fetch = FetchBlock<ContiguousRows<Element>>;
  for (int t = 0; t < tokens; t += kBlockRows) {
    const int block = std::min(kBlockRows, tokens - t);
    const int next = std::min(kBlockRows, tokens - t - block);
    const auto values_here = value_rows.From(t);
    ScoreBlock<Element>(queries, state.group, key_rows.From(t), block,
                        Fetch{values_here, block, value_rows.dim}, key_rows.dim, scores,
                        kBlockRows);
    AccumulateBlock<Element>(scores, kBlockRows, values_here, block,
                             Fetch{key_rows.From(t + block), next, key_rows.dim}, scores, state);
  }
}

void ScoreRows(const float* queries, int group, const uint16_t* keys, DType dtype, int tokens,
               int key_dim, float* scores, int score_stride) {
  const auto dim = static_cast<size_t>(key_dim);
  if (dtype == DType::kBf16) {
    ScoreAll<Bf16>(queries, group, ContiguousRows<Bf16>{keys, dim}, tokens, key_dim, scores,
                   score_stride);
  } else {
    ScoreAll<Fp16>(queries, group, ContiguousRows<Fp16>{keys, dim}, tokens, key_dim, scores,
                   score_stride);
  }
}

void ScoreGathered(const float* queries, int group, const uint16_t* const* key_rows, DType dtype,
                   int count, int key_dim, float* scores, int score_stride) {
  if (dtype == DType::kBf16) {
    ScoreAll<Bf16>(queries, group, GatheredRows<Bf16>{key_rows}, count, key_dim, scores,
                   score_stride);
  } else {
    ScoreAll<Fp16>(queries, group, GatheredRows<Fp16>{key_rows}, count, key_dim, scores,
                   score_stride);
  }
}

void ScoreFloatRows(const float* queries, int group, const float* rows, int count, int dim,
                    float* scores, int score_stride) {
  ScoreAll<Fp32>(queries, group, ContiguousRows<Fp32>{rows, static_cast<size_t>(dim)}, count, dim,
                 scores, score_stride);
}

void ScoreGatheredFloatRows(const float* queries, int group, const float* const* rows, int count,
                            int dim, float* scores, int score_stride) {
  ScoreAll<Fp32>(queries, group, GatheredRows<Fp32>{rows}, count, dim, scores, score_stride);
}

void AttendRows(const float* queries, const uint16_t* keys, const uint16_t* values, DType dtype,
                int tokens, int key_dim, const GroupState& state) {
  if (dtype == DType::kBf16) {
    AttendAll<Bf16>(queries, keys, values, tokens, key_dim, state);
  } else {
    AttendAll<Fp16>(queries, keys, values, tokens, key_dim, state);
  }
}

void AccumulateScored(const float* scores, int score_stride, const uint16_t* values, DType dtype,
                      int tokens, const GroupState& state) {
  const auto dim = static_cast<size_t>(state.value_dim);
  if (dtype == DType::kBf16) {
    AccumulateAll<Bf16>(scores, score_stride, ContiguousRows<Bf16>{values, dim}, tokens, state);
  } else {
    AccumulateAll<Fp16>(scores, score_stride, ContiguousRows<Fp16>{values, dim}, tokens, state);
  }
}

void AccumulateScoredGathered(const float* scores, int score_stride,
                              const uint16_t* const* value_rows, DType dtype, int count,
                              const GroupState& state) {
  if (dtype == DType::kBf16) {
    AccumulateAll<Bf16>(scores, score_stride, GatheredRows<Bf16>{value_rows}, count, state);
  } else {
    AccumulateAll<Fp16>(scores, score_stride, GatheredRows<Fp16>{value_rows}, count, state);
  }
}

void AddWeightedRows(const float* weights, int weight_stride, int group, const uint16_t* rows,
                     int row_stride, int count, int dim, float* acc) {
  const ContiguousRows<Bf16> all{rows, static_cast<size_t>(row_stride)};
  const auto columns = static_cast<size_t>(dim);
  for (int t = 0; t < count; t += kBlockRows) {
    const int block = std::min(kBlockRows, count - t);
    WeighBlock<Bf16>(weights + t, static_cast<size_t>(weight_stride), group, all.From(t), block,
                     FetchAhead<Bf16, ContiguousRows<Bf16>>(all.From(t), count - t, columns),
                     columns, acc);
  }
}

/// Whether any of the vectors' elements has a magnitude above the largest fp16. NaN has.
template <class Element>
int64_t FindBad(const typename Element::T* data, DType dtype, int64_t count) {
  const FloatTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto most = hn::Set(d, 65504.0F);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    if (!hn::AllTrue(d, hn::Le(hn::Abs(Element::Load(d, data + i)), most))) break;
  }
  for (; i < count; ++i) {
    if (!(std::fabs(LoadElement(data, dtype, static_cast<size_t>(i))) <= 65504.0F)) return i;
  }
  return -1;
}

int64_t FindBadElement(const void* data, DType dtype, int64_t count) {
  switch (dtype) {
    case DType::kBf16:
      return FindBad<Bf16>(static_cast<const uint16_t*>(data), dtype, count);
    case DType::kFp16:
      return FindBad<Fp16>(static_cast<const uint16_t*>(data), dtype, count);
    case DType::kFp32:
      return FindBad<Fp32>(static_cast<const float*>(data), dtype, count);
  }
  return count > 0 ? 0 : -1;
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(ScoreRows);
HWY_EXPORT(ScoreGathered);
HWY_EXPORT(ScoreFloatRows);
HWY_EXPORT(ScoreGatheredFloatRows);
HWY_EXPORT(AttendRows);
HWY_EXPORT(AccumulateScored);
HWY_EXPORT(AccumulateScoredGathered);
HWY_EXPORT(AddWeightedRows);
HWY_EXPORT(FindBadElement);

void ScoreRows(const float* queries, int group, const uint16_t* keys, DType dtype, int tokens,
               int key_dim, float* scores, int score_stride) noexcept {
  HWY_DYNAMIC_DISPATCH(ScoreRows)
  (queries, group, keys, dtype, tokens, key_dim, scores, score_stride);
}

void ScoreGathered(const float* queries, int group, const uint16_t* const* key_rows, DType dtype,
                   int count, int key_dim, float* scores, int score_stride) noexcept {
  HWY_DYNAMIC_DISPATCH(ScoreGathered)
  (queries, group, key_rows, dtype, count, key_dim, scores, score_stride);
}

void ScoreFloatRows(const float* queries, int group, const float* rows, int count, int dim,
                    float* scores, int score_stride) noexcept {
  HWY_DYNAMIC_DISPATCH(ScoreFloatRows)
  (queries, group, rows, count, dim, scores, score_stride);
}

void ScoreGatheredFloatRows(const float* queries, int group, const float* const* rows, int count,
                            int dim, float* scores, int score_stride) noexcept {
  HWY_DYNAMIC_DISPATCH(ScoreGatheredFloatRows)
  (queries, group, rows, count, dim, scores, score_stride);
}

void AttendRows(const float* queries, const uint16_t* keys, const uint16_t* values, DType dtype,
                int tokens, int key_dim, const GroupState& state) noexcept {
  HWY_DYNAMIC_DISPATCH(AttendRows)(queries, keys, values, dtype, tokens, key_dim, state);
}

void AccumulateScored(const float* scores, int score_stride, const uint16_t* values, DType dtype,
                      int tokens, const GroupState& state) noexcept {
  HWY_DYNAMIC_DISPATCH(AccumulateScored)(scores, score_stride, values, dtype, tokens, state);
}

void AccumulateScoredGathered(const float* scores, int score_stride,
                              const uint16_t* const* value_rows, DType dtype, int count,
                              const GroupState& state) noexcept {
  HWY_DYNAMIC_DISPATCH(AccumulateScoredGathered)
  (scores, score_stride, value_rows, dtype, count, state);
}

void AddWeightedRows(const float* weights, int weight_stride, int group, const uint16_t* rows,
                     int row_stride, int count, int dim, float* acc) noexcept {
  HWY_DYNAMIC_DISPATCH(AddWeightedRows)
  (weights, weight_stride, group, rows, row_stride, count, dim, acc);
}

int64_t FindBadElement(const void* data, DType dtype, int64_t count) noexcept {
  return HWY_DYNAMIC_DISPATCH(FindBadElement)(data, dtype, count);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
