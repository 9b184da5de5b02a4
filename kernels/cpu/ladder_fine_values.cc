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

#if HWY_TARGET <= HWY_AVX3_DL

/// A batch of keys, for one chunk of heads. Keys beyond `count` have a step of 0 and no weight.
struct ByteBatch {
  static constexpr int kKeys = 128;
  static constexpr int kPad = 32;  // keys that are made into bytes at once
  int Padded() const { return (count + kPad - 1) / kPad * kPad; }

  int count;
  const uint8_t* nibbles[kKeys];
  alignas(64) uint32_t factors[kKeys];  // lo and step, bf16
};

/// 64 bytes of each key of a batch, four keys' bytes side by side: block b of vector k of a quad
/// has bytes 16 b + 4 k to 16 b + 4 k + 3.
struct Quads {
  void Fill(const ByteBatch& batch, int first, int bytes) {
    count = (batch.count + 3) / 4;
    const __mmask64 mask = bytes >= 64 ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1;
    for (int q = 0; q < count; ++q) {
      __m512i rows[4];
      for (int j = 0; j < 4; ++j) {
        const uint8_t* const row = batch.nibbles[4 * q + j] + first;
        rows[j] = bytes >= 64 ? _mm512_loadu_si512(row) : _mm512_maskz_loadu_epi8(mask, row);
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
  __m512i vectors[ByteBatch::kKeys / 4][4];
};

/// What `combine` makes of the lanes of v[h], for four heads.
template <class Combine>
HWY_INLINE void ReduceFour(const __m512* v, const Combine& combine, float* out) {
  const __m512 v01 = combine(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 v23 = combine(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 v0123 =
      combine(_mm512_shuffle_ps(v01, v23, 0x44), _mm512_shuffle_ps(v01, v23, 0xee));
  const __m512 halves = combine(v0123, _mm512_shuffle_f32x4(v0123, v0123, 0x4e));
  const __m512 all = combine(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(all));
}

/// The weights exp(score - max) * step of a batch as integers, in units of unit[h], and what goes
/// with them. Heads are reduced four at a time.
template <int kHeads>
struct RoundedWeights {
  /// Updates the state's maxima and sums.
  RoundedWeights(const ByteBatch& batch, const float* scores, int score_stride,
                 const GroupState& state) {
    const int padded = batch.Padded();
    alignas(64) float weights[kHeads][ByteBatch::kKeys];
    const float* of_head[kHeads];
    for (int h = 0; h < kHeads; ++h, scores += score_stride) {
      of_head[h] = scores;
      if (batch.count == padded) continue;
      of_head[h] = weights[h];
      std::copy_n(scores, batch.count, weights[h]);
      std::fill_n(weights[h] + batch.count, padded - batch.count, -kInfinity);
    }
    const auto max = [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); };
    const auto add = [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); };

    __m512 most[4];
    for (int h = 0; h < 4; ++h) {
      most[h] = _mm512_set1_ps(-kInfinity);
      for (int i = 0; h < kHeads && i < padded; i += 16) {
        most[h] = _mm512_max_ps(most[h], _mm512_loadu_ps(of_head[h] + i));
      }
    }
    float maxima[4];
    ReduceFour(most, max, maxima);
    for (int h = 0; h < kHeads; ++h) {
      maxima[h] = std::max(maxima[h], state.max[h]);
      rescale[h] = state.max[h] == maxima[h] ? 1.0F : std::exp(state.max[h] - maxima[h]);
      state.max[h] = maxima[h];
    }

    __m512 sum[4];
    __m512 middle[4];
    for (int h = 0; h < 4; ++h) sum[h] = middle[h] = most[h] = _mm512_setzero_ps();
    const hn::CappedTag<float, 16> d;
    for (int i = 0; i < padded; i += 16) {
      const __m512i both = _mm512_load_si512(batch.factors + i);
      const __m512 lo = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      const __m512 step = _mm512_castsi512_ps(
          _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000U))));
      const __m512 mid = _mm512_fmadd_ps(step, _mm512_set1_ps(7.5F), lo);
      for (int h = 0; h < kHeads; ++h) {
        const __m512 score = _mm512_loadu_ps(of_head[h] + i);
        const hn::Vec<decltype(d)> below{_mm512_sub_ps(score, _mm512_set1_ps(maxima[h]))};
        const __m512 weight = ExpFine(d, below).raw;
        sum[h] = _mm512_add_ps(sum[h], weight);
        middle[h] = _mm512_fmadd_ps(weight, mid, middle[h]);
        const __m512 scaled = _mm512_mul_ps(weight, step);
        most[h] = _mm512_max_ps(most[h], scaled);
        _mm512_store_ps(weights[h] + i, scaled);
      }
    }
    float sums[4];
    float largest[4];
    ReduceFour(most, max, largest);
    ReduceFour(sum, add, sums);

    // Four keys' low eight bits, with a sign, then what is left over 256, from packing's order.
    alignas(64) static constexpr uint8_t kOrder[64] = {
        0,  2,  4,  6,  1,  3,  5,  7,  16, 18, 20, 22, 17, 19, 21, 23, 32, 34, 36, 38, 33, 35,
        37, 39, 48, 50, 52, 54, 49, 51, 53, 55, 8,  10, 12, 14, 9,  11, 13, 15, 24, 26, 28, 30,
        25, 27, 29, 31, 40, 42, 44, 46, 41, 43, 45, 47, 56, 58, 60, 62, 57, 59, 61, 63};
    const __m512i order = _mm512_load_si512(kOrder);
    for (int h = 0; h < kHeads; ++h) {
      state.sum[h] = state.sum[h] * rescale[h] + sums[h];
      constexpr float kLargest = 127 * 256 + 127;
      constexpr float kNone = 1e-30F;  // less has no inverse
      unit[h] = largest[h] > kNone ? largest[h] / kLargest : 0.0F;
      const __m512 inverse = _mm512_set1_ps(largest[h] > kNone ? kLargest / largest[h] : 0.0F);
      const __m512 half = _mm512_set1_ps(128.0F);  // of a unit of the high byte
      __m512i total = _mm512_set1_epi32(-128 * 2 * (padded / ByteBatch::kPad));
      for (int i = 0; i < padded; i += ByteBatch::kPad) {
        const __m512 front = _mm512_load_ps(weights[h] + i);
        const __m512 back = _mm512_load_ps(weights[h] + i + 16);
        const __m512i words =
            _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_fmadd_ps(front, inverse, half)),
                               _mm512_cvtps_epi32(_mm512_fmadd_ps(back, inverse, half)));
        total = _mm512_add_epi32(total, _mm512_madd_epi16(words, _mm512_set1_epi16(1)));
        const __m512i low_high = _mm512_xor_si512(words, _mm512_set1_epi16(128));
        _mm512_store_si512(bytes[h] + static_cast<ptrdiff_t>(2 * i),
                           _mm512_permutexvar_epi8(order, low_high));
      }
      // Nibbles count from 7.5.
      middle[h] =
          _mm512_fnmadd_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(7.5F * unit[h]), middle[h]);
    }
    ReduceFour(middle, add, offset);
  }

  float unit[kHeads];
  float rescale[kHeads];  ///< of what was accumulated before
  float offset[4];        ///< sum exp(score - max) (lo + 7.5 step), less 7.5 of the integers' sum
  alignas(64) int8_t bytes[kHeads][2 * ByteBatch::kKeys];
};

/// [h][v]: sum_i weight_i * nibble_i of bytes 16 v to 16 v + 15 of the quads, of the low nibbles
/// and 16 times that of the high ones.
template <int kHeads>
struct NibbleSums {
  NibbleSums(const Quads& quads, const RoundedWeights<kHeads>& weights) {
    for (int k = 0; k < 4; ++k) AddVector(quads, weights, k);
    for (int h = 0; h < kHeads; ++h) {
      TransposeBlocks(low[h][0], low[h][1], low[h][2], low[h][3], low[h], 1);
      TransposeBlocks(high[h][0], high[h][1], high[h][2], high[h][3], high[h], 1);
    }
  }

  __m512i low[kHeads][4];
  __m512i high[kHeads][4];

 private:
  HWY_INLINE void AddVector(const Quads& quads, const RoundedWeights<kHeads>& weights, int k) {
    // Products of the low nibbles and of whole bytes: their difference is the high nibbles'. The
    // sums of 128 bytes fit 31 bits.
    __m512i low_low[kHeads];
    __m512i low_high[kHeads];
    __m512i both_low[kHeads];
    __m512i both_high[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      low_low[h] = low_high[h] = both_low[h] = both_high[h] = _mm512_setzero_si512();
    }
    const __m512i nibble = _mm512_set1_epi8(15);
    int q = 0;
    do {
      const __m512i both = quads.vectors[q][k];
      const __m512i of_low = _mm512_and_si512(both, nibble);
      for (int h = 0; h < kHeads; ++h) {
        const __m512i weight_low = BroadcastFour(weights.bytes[h] + 8 * q);
        const __m512i weight_high = BroadcastFour(weights.bytes[h] + 8 * q + 4);
        low_low[h] = AddProducts(low_low[h], of_low, weight_low);
        low_high[h] = AddProducts(low_high[h], of_low, weight_high);
        both_low[h] = AddProducts(both_low[h], both, weight_low);
        both_high[h] = AddProducts(both_high[h], both, weight_high);
      }
    } while (++q < quads.count);
    for (int h = 0; h < kHeads; ++h) {
      low[h][k] = _mm512_add_epi32(_mm512_slli_epi32(low_high[h], 8), low_low[h]);
      const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(both_high[h], 8), both_low[h]);
      high[h][k] = _mm512_sub_epi32(both, low[h][k]);
    }
  }

  static HWY_INLINE __m512i BroadcastFour(const int8_t* bytes) {
    int32_t four;
    std::memcpy(&four, bytes, sizeof(four));
    return _mm512_set1_epi32(four);
  }
};

/// acc := acc * rescale + offset + unit * sum, for `count` of 16 elements.
HWY_INLINE void AddSixteen(__m512i sum, float unit, float rescale, float offset, int count,
                           float* acc) {
  const auto added = [&](__m512 before) {
    return _mm512_fmadd_ps(
        _mm512_cvtepi32_ps(sum), _mm512_set1_ps(unit),
        _mm512_fmadd_ps(before, _mm512_set1_ps(rescale), _mm512_set1_ps(offset)));
  };
  if (count >= 16) {
    _mm512_storeu_ps(acc, added(_mm512_loadu_ps(acc)));
  } else {
    const auto mask = static_cast<__mmask16>((1U << count) - 1U);
    _mm512_mask_storeu_ps(acc, mask, added(_mm512_maskz_loadu_ps(mask, acc)));
  }
}

template <int kHeads>
HWY_INLINE void AddBatch(const ByteBatch& batch, const float* scores, int score_stride,
                         const GroupState& state) {
  const int half_dim = state.value_dim / 2;
  // Quads first: the factors have just been written one by one, and a wide load waits for that.
  Quads quads;
  quads.Fill(batch, 0, half_dim);
  const RoundedWeights<kHeads> weights(batch, scores, score_stride, state);
  for (int first = 0; first < half_dim; first += 64) {
    if (first > 0) quads.Fill(batch, first, half_dim - first);
    const NibbleSums<kHeads> sums(quads, weights);
    for (int h = 0; h < kHeads; ++h) {
      float* acc = state.acc + static_cast<ptrdiff_t>(h) * state.value_dim + first;
      const float unit = weights.unit[h];
      for (int v = 0; v < 4 && first + 16 * v < half_dim; ++v, acc += 16) {
        const int left = half_dim - first - 16 * v;
        AddSixteen(sums.low[h][v], unit, weights.rescale[h], weights.offset[h], left, acc);
        AddSixteen(sums.high[h][v], unit / 16, weights.rescale[h], weights.offset[h], left,
                   acc + half_dim);
      }
    }
  }
}

template <int kHeads>
void AccumulateT(const FineInput& in, int value_offset, const float* scores, int score_stride,
                 const GroupState& state) {
  ByteBatch batch;
  for (int first = 0; first < in.count; first += ByteBatch::kKeys) {
    batch.count = std::min(ByteBatch::kKeys, in.count - first);
    for (int i = 0; i < batch.count; ++i) {
      const FineRow& row = in.rows[first + i];
      batch.nibbles[i] = row.record + value_offset;
      PrefetchLines(batch.nibbles[i], batch.nibbles[i] + state.value_dim / 2);
      batch.factors[i] = row.factors->lo | static_cast<uint32_t>(row.factors->step) << 16;
    }
    const int padded = batch.Padded();
    std::fill(batch.nibbles + batch.count, batch.nibbles + padded, batch.nibbles[0]);
    std::fill(batch.factors + batch.count, batch.factors + padded, 0);
    AddBatch<kHeads>(batch, scores + first, score_stride, state);
  }
}

#else

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

#endif

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
