#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "kernels/cpu/ladder_fine.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/ladder_fine_values.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_exp-inl.h"
#include "kernels/cpu/ladder_fine-inl.h"
#include "kernels/cpu/ladder_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// One batch of keys whose weights are known, for one chunk of heads.
struct ValueBatch {
  static constexpr int kKeys = 64;
  const uint8_t* nibbles[kKeys];
  alignas(64) uint32_t factors[kKeys];  // lo and step, bf16
  alignas(64) float lo[kKeys];
  alignas(64) float step[kKeys];
  int count;
  alignas(64) float weights[kHeadChunk][kKeys];  // exp(score - max) * step
  float rescale[kHeadChunk];                     // of what was accumulated before
  float offset[kHeadChunk];                      // sum exp(score - max) * lo
};

HWY_INLINE void SpreadFactors(ValueBatch& batch) {
  const hn::ScalableTag<float> d;
  const hn::RebindToUnsigned<decltype(d)> d32;
  for (int i = 0; i < ValueBatch::kKeys; i += static_cast<int>(hn::Lanes(d))) {
    const auto both = hn::Load(d32, batch.factors + i);
    hn::Store(hn::BitCast(d, hn::ShiftLeft<16>(both)), d, batch.lo + i);
    hn::Store(hn::BitCast(d, hn::And(both, hn::Set(d32, 0xFFFF0000U))), d, batch.step + i);
  }
}

/// Weights of one head, against the maximum of the batch and of the state, which it updates.
HWY_INLINE void WeighHead(const float* scores, int h, ValueBatch& batch, float* state_max,
                          float* state_sum) {
  const hn::ScalableTag<float> d;
  constexpr int kLanes = static_cast<int>(hn::MaxLanes(decltype(d)()));
  float* weights = batch.weights[h];
  if (batch.count < ValueBatch::kKeys) {
    std::copy_n(scores, batch.count, weights);
    std::fill_n(weights + batch.count, ValueBatch::kKeys - batch.count, -kInfinity);
    scores = weights;
  }
  auto max_lanes = hn::LoadU(d, scores);
  for (int i = kLanes; i < ValueBatch::kKeys; i += kLanes) {
    max_lanes = hn::Max(max_lanes, hn::LoadU(d, scores + i));
  }
  const float max = std::max(*state_max, hn::GetLane(hn::MaxOfLanes(d, max_lanes)));
  if (max == -kInfinity) {
    std::fill_n(weights, ValueBatch::kKeys, 0.0F);
    batch.rescale[h] = 1.0F;
    batch.offset[h] = 0.0F;
    return;
  }
  batch.rescale[h] = *state_max == max ? 1.0F : std::exp(*state_max - max);
  auto sum = hn::Zero(d);
  auto offset = hn::Zero(d);
  for (int i = 0; i < ValueBatch::kKeys; i += kLanes) {
    const auto weight = ExpFine(d, hn::Sub(hn::LoadU(d, scores + i), hn::Set(d, max)));
    sum = hn::Add(sum, weight);
    offset = hn::MulAdd(weight, hn::Load(d, batch.lo + i), offset);
    hn::Store(hn::Mul(weight, hn::Load(d, batch.step + i)), d, weights + i);
  }
  batch.offset[h] = hn::GetLane(hn::SumOfLanes(d, offset));
  *state_sum = *state_sum * batch.rescale[h] + hn::GetLane(hn::SumOfLanes(d, sum));
  *state_max = max;
}

#if HWY_TARGET <= HWY_AVX3_DL

/// The weights of a batch as integers, in units of unit[h]: 256 * high + low. What rounding changes
/// is made good for a nibble of 7.5, the mean of all.
template <int kHeads>
struct RoundedWeights {
  explicit RoundedWeights(const ValueBatch& batch) {
    constexpr float kLargest = 127 * 256 + 127;
    for (int h = 0; h < kHeads; ++h) {
      const float* const weights = batch.weights[h];
      __m512 most = _mm512_load_ps(weights);
      for (int i = 16; i < ValueBatch::kKeys; i += 16) {
        most = _mm512_max_ps(most, _mm512_load_ps(weights + i));
      }
      const float largest = _mm512_reduce_max_ps(most);
      unit[h] = largest / kLargest;
      const __m512 inverse = _mm512_set1_ps(largest > 0.0F ? kLargest / largest : 0.0F);
      __m512 left = _mm512_setzero_ps();
      for (int i = 0; i < ValueBatch::kKeys; i += 16) {
        const __m512 weight = _mm512_load_ps(weights + i);
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(weight, inverse));
        const __m512i upper =
            _mm512_srai_epi32(_mm512_add_epi32(rounded, _mm512_set1_epi32(128)), 8);
        _mm_store_si128(reinterpret_cast<__m128i*>(high[h] + i), _mm512_cvtepi32_epi8(upper));
        _mm_store_si128(reinterpret_cast<__m128i*>(low[h] + i), _mm512_cvtepi32_epi8(rounded));
        left = _mm512_add_ps(
            left, _mm512_fnmadd_ps(_mm512_cvtepi32_ps(rounded), _mm512_set1_ps(unit[h]), weight));
      }
      offset[h] = batch.offset[h] + 7.5F * _mm512_reduce_add_ps(left);
    }
  }
  float unit[kHeads];
  float offset[kHeads];  ///< the batch's
  alignas(64) int8_t high[kHeads][ValueBatch::kKeys];
  alignas(64) int8_t low[kHeads][ValueBatch::kKeys];  ///< low eight bits, with a sign
};

/// 64 bytes of each key of a batch, four keys' bytes side by side: vector k of a quad has bytes 16
/// k to 16 k + 15.
struct Quads {
  Quads(const ValueBatch& batch, int first, int bytes) : count((batch.count + 3) / 4) {
    const __mmask64 mask = bytes >= 64 ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1;
    // Bytes of a block of 16 are those that unpacking then puts in order.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int q = 0; q < count; ++q) {
      __m512i rows[4];
      for (int j = 0; j < 4; ++j) {
        const int key = std::min(4 * q + j, batch.count - 1);  // weights beyond are 0
        rows[j] = _mm512_permutexvar_epi32(
            order, _mm512_maskz_loadu_epi8(mask, batch.nibbles[key] + first));
      }
      const __m512i low01 = _mm512_unpacklo_epi8(rows[0], rows[1]);
      const __m512i low23 = _mm512_unpacklo_epi8(rows[2], rows[3]);
      const __m512i high01 = _mm512_unpackhi_epi8(rows[0], rows[1]);
      const __m512i high23 = _mm512_unpackhi_epi8(rows[2], rows[3]);
      vectors[q][0] = _mm512_unpacklo_epi16(low01, low23);
      vectors[q][1] = _mm512_unpackhi_epi16(low01, low23);
      vectors[q][2] = _mm512_unpacklo_epi16(high01, high23);
      vectors[q][3] = _mm512_unpackhi_epi16(high01, high23);
    }
  }
  int count;
  __m512i vectors[ValueBatch::kKeys / 4][4];
};

HWY_INLINE __m512i BroadcastFour(const int8_t* bytes) {
  int32_t four;
  std::memcpy(&four, bytes, sizeof(four));
  return _mm512_set1_epi32(four);
}

/// acc := acc * rescale + offset + sum_i weight_i nibble_i for vectors k and k + 1 of the quads, of
/// which `elements` are there; kShift: 0 for the low nibbles, 4 for the high ones.
template <int kHeads, int kShift>
KVSEEK_VNNI HWY_INLINE void AddQuads(const ValueBatch& batch, const Quads& quads,
                                     const RoundedWeights<kHeads>& weights, int k, int elements,
                                     float* acc, int value_dim) {
  __m512i high[kHeads][2];
  __m512i low[kHeads][2];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < 2; ++v) high[h][v] = low[h][v] = _mm512_setzero_si512();
  }
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int q = 0; q < quads.count; ++q) {
    __m512i nibbles[2];
    for (int v = 0; v < 2; ++v) {
      nibbles[v] = _mm512_and_si512(_mm512_srli_epi16(quads.vectors[q][k + v], kShift), nibble);
    }
    for (int h = 0; h < kHeads; ++h) {
      const __m512i weight_high = BroadcastFour(weights.high[h] + 4 * q);
      const __m512i weight_low = BroadcastFour(weights.low[h] + 4 * q);
      for (int v = 0; v < 2; ++v) {
        high[h][v] = _mm512_dpbusd_epi32(high[h][v], nibbles[v], weight_high);
        low[h][v] = _mm512_dpbusd_epi32(low[h][v], nibbles[v], weight_low);
      }
    }
  }
  for (int h = 0; h < kHeads; ++h, acc += value_dim) {
    const __m512 rescale = _mm512_set1_ps(batch.rescale[h]);
    const __m512 offset = _mm512_set1_ps(weights.offset[h]);
    const __m512 unit = _mm512_set1_ps(weights.unit[h]);
    for (int v = 0; v < 2; ++v) {
      const int left = std::clamp(elements - 16 * v, 0, 16);
      const auto mask = static_cast<__mmask16>((1U << left) - 1U);
      const __m512 sum =
          _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[h][v], 8), low[h][v]));
      const __m512 before =
          _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, acc + 16 * v), rescale, offset);
      _mm512_mask_storeu_ps(acc + 16 * v, mask, _mm512_fmadd_ps(sum, unit, before));
    }
  }
}

template <int kHeads>
KVSEEK_VNNI void AddValues(const ValueBatch& batch, int value_dim, float* acc) {
  const RoundedWeights<kHeads> weights(batch);
  const int half_dim = value_dim / 2;
  for (int first = 0; first < half_dim; first += 64) {
    const Quads quads(batch, first, half_dim - first);
    for (int k = 0; k < 4 && first + 16 * k < half_dim; k += 2) {
      const int e = first + 16 * k;
      AddQuads<kHeads, 0>(batch, quads, weights, k, half_dim - e, acc + e, value_dim);
      AddQuads<kHeads, 4>(batch, quads, weights, k, half_dim - e, acc + half_dim + e, value_dim);
    }
  }
}

#else

/// acc := acc * rescale + offset + sum_i weight_i nibble_i for elements [first, first + Lanes) of
/// both halves.
template <int kHeads, class D>
HWY_INLINE void AddNibbles(D d, const ValueBatch& batch, int first, int half_dim, float* acc) {
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint8_t, D> d8;
  const auto mask = hn::Set(di, 15);
  const int value_dim = 2 * half_dim;
  hn::Vec<D> low[kHeads];
  hn::Vec<D> high[kHeads];
  acc += first;
  for (int h = 0; h < kHeads; ++h) {
    const auto rescale = hn::Set(d, batch.rescale[h]);
    const auto offset = hn::Set(d, batch.offset[h]);
    low[h] = hn::MulAdd(hn::LoadU(d, acc + h * value_dim), rescale, offset);
    high[h] = hn::MulAdd(hn::LoadU(d, acc + h * value_dim + half_dim), rescale, offset);
  }
  for (int i = 0; i < batch.count; ++i) {
    const auto bytes = hn::PromoteTo(di, hn::LoadU(d8, batch.nibbles[i] + first));
    const auto n0 = hn::ConvertTo(d, hn::And(bytes, mask));
    const auto n1 = hn::ConvertTo(d, hn::ShiftRight<4>(bytes));
    for (int h = 0; h < kHeads; ++h) {
      const auto weight = hn::Set(d, batch.weights[h][i]);
      low[h] = hn::MulAdd(weight, n0, low[h]);
      high[h] = hn::MulAdd(weight, n1, high[h]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    hn::StoreU(low[h], d, acc + h * value_dim);
    hn::StoreU(high[h], d, acc + h * value_dim + half_dim);
  }
}

template <int kHeads>
HWY_INLINE void AddValues(const ValueBatch& batch, int value_dim, float* acc) {
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 4> d4;
  const int half_dim = value_dim / 2;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int e = 0;
  for (; e + lanes <= half_dim; e += lanes) AddNibbles<kHeads>(d, batch, e, half_dim, acc);
  for (; e < half_dim; e += static_cast<int>(hn::Lanes(d4))) {
    AddNibbles<kHeads>(d4, batch, e, half_dim, acc);
  }
}

#endif

template <int kHeads>
void AccumulateT(const FineInput& in, int value_offset, const float* scores, int score_stride,
                 const GroupState& state) {
  const int half_dim = state.value_dim / 2;
  ValueBatch batch;
  for (int first = 0; first < in.count; first += ValueBatch::kKeys) {
    batch.count = std::min(ValueBatch::kKeys, in.count - first);
    for (int i = 0; i < batch.count; ++i) {
      batch.nibbles[i] = in.rows[first + i].record + value_offset;
      PrefetchLines(batch.nibbles[i], batch.nibbles[i] + half_dim);
      const FineFactors& factors = *in.rows[first + i].factors;
      batch.factors[i] = factors.lo | static_cast<uint32_t>(factors.step) << 16;
    }
    for (int i = batch.count; i < ValueBatch::kKeys; ++i) batch.factors[i] = 0;
    SpreadFactors(batch);
    for (int h = 0; h < kHeads; ++h) {
      WeighHead(scores + static_cast<ptrdiff_t>(h) * score_stride + first, h, batch, state.max + h,
                state.sum + h);
    }
    AddValues<kHeads>(batch, state.value_dim, state.acc);
  }
}

struct AccumulateCall {
  FineInput in;
  int value_offset;
  const float* scores;
  int score_stride;
  GroupState state;

  template <int kHeads>
  void operator()() const {
    AccumulateT<kHeads>(in, value_offset, scores, score_stride, state);
  }
};

void AccumulateFineImpl(const FineRow* rows, int count, int value_offset, const float* scores,
                        int score_stride, const GroupState& state) {
  for (int h = 0; h < state.group; h += kHeadChunk) {
    const int heads = std::min(kHeadChunk, state.group - h);
    const AccumulateCall call = {{rows, count},
                                 value_offset,
                                 scores + static_cast<ptrdiff_t>(h) * score_stride,
                                 score_stride,
                                 {heads, state.value_dim, state.max + h, state.sum + h,
                                  state.acc + static_cast<ptrdiff_t>(h) * state.value_dim}};
    WithHeads(heads, call);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(AccumulateFineImpl);

void AccumulateFine(const FineRow* rows, int count, int value_offset, const float* scores,
                    int score_stride, const GroupState& state) noexcept {
  assert(state.value_dim % 8 == 0);
  HWY_DYNAMIC_DISPATCH(AccumulateFineImpl)
  (rows, count, value_offset, scores, score_stride, state);
}

void DecodeFineValue(const uint8_t* record, int value_offset, const FineFactors& factors,
                     int value_dim, float* value) noexcept {
  const uint8_t* nibbles = record + value_offset;
  const float lo = Bf16ToFloat(factors.lo);
  const float step = Bf16ToFloat(factors.step);
  const int half = value_dim / 2;
  for (int i = 0; i < half; ++i) {
    value[i] = lo + step * static_cast<float>(nibbles[i] & 15);
    value[i + half] = lo + step * static_cast<float>(nibbles[i] >> 4);
  }
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
