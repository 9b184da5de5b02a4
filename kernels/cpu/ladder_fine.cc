#include "kernels/cpu/ladder_fine.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/ladder_fine.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_exp-inl.h"
#include "kernels/cpu/ladder_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kDimMax = 512;
constexpr int kHeadChunk = HWY_TARGET <= HWY_AVX3 ? 8 : 4;  // what the registers hold
constexpr int kAhead = 12;                                  // records between prefetch and use
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using D16 = hn::ScalableTag<int16_t>;
using D32 = hn::Repartition<int32_t, D16>;

HWY_INLINE int32_t SumQuery(const int16_t* q, int padded_dim) {
  const D16 d16;
  const auto one = hn::Set(d16, 1);
  auto sum = hn::Zero(D32());
  auto other = hn::Zero(D32());
  for (int i = 0; i < padded_dim; i += static_cast<int>(hn::Lanes(d16))) {
    sum = hn::ReorderWidenMulAccumulate(D32(), hn::LoadU(d16, q + i), one, sum, other);
  }
  return hn::GetLane(hn::SumOfLanes(D32(), hn::RearrangeToOddPlusEven(sum, other)));
}

HWY_INLINE void PrefetchLines(const uint8_t* begin, const uint8_t* end) {
  for (; begin < end; begin += 64) hwy::Prefetch(begin);
}

struct FineInput {
  const FineRow* rows;
  int count;
};

/// sum_i nibble_i q_i of one record for four or fewer heads, in lanes: only the sum of a vector's
/// lanes has a meaning.
template <int kHeads>
HWY_INLINE void NibbleProducts(const uint8_t* record, int half_dim, const int16_t* quantised,
                               hn::Vec<D32>* sums) {
  const D16 d16;
  const D32 d32;
  const hn::Rebind<uint8_t, D16> d8;
  const auto mask = hn::Set(d16, 15);
  hn::Vec<D32> other[kHeads];
  for (int h = 0; h < kHeads; ++h) sums[h] = other[h] = hn::Zero(d32);
  for (int i = 0; i < half_dim; i += static_cast<int>(hn::Lanes(d16))) {
    const auto bytes = hn::PromoteTo(d16, hn::LoadU(d8, record + i));
    const auto low = hn::And(bytes, mask);
    const auto high = hn::ShiftRight<4>(bytes);
    const int16_t* q = quantised + i;
    for (int h = 0; h < kHeads; ++h, q += 2 * half_dim) {
      sums[h] = hn::ReorderWidenMulAccumulate(D32(), low, hn::LoadU(d16, q), sums[h], other[h]);
      sums[h] = hn::ReorderWidenMulAccumulate(D32(), high, hn::LoadU(d16, q + half_dim), sums[h],
                                              other[h]);
    }
  }
  for (int h = 0; h < kHeads; ++h) sums[h] = hn::RearrangeToOddPlusEven(sums[h], other[h]);
}

/// What turns products into scores, four heads at a time: centre + slope * gain * (2 product -
/// centring).
template <int kPadded>
struct ScoreHeads {
  static constexpr int kFour = 4;
  alignas(64) float centre[kPadded] = {};
  alignas(64) float slope[kPadded] = {};
  alignas(64) int32_t centring[kPadded] = {};  // 15 * sum(q), for nibbles count from 0

  void Finish(int h, const int32_t* products, float gain, float* scores) const {
    const hn::CappedTag<float, kFour> d;
    const hn::RebindToSigned<decltype(d)> di;
    for (int j = 0; j < kFour; j += static_cast<int>(hn::Lanes(d))) {
      const auto product = hn::LoadU(di, products + j);
      const auto sum = hn::Sub(hn::Add(product, product), hn::LoadU(di, centring + h + j));
      const auto factor = hn::Mul(hn::LoadU(d, slope + h + j), hn::Set(d, gain));
      hn::StoreU(hn::MulAdd(factor, hn::ConvertTo(d, sum), hn::LoadU(d, centre + h + j)), d,
                 scores + j);
    }
  }
};

template <int kHeads>
void ScoreT(const FineInput& in, int record_bytes, const int16_t* quantised, int padded_dim,
            const FineHead* fine_heads, float* scores, int score_stride) {
  constexpr int kPadded = (kHeads + 3) / 4 * 4;
  const D32 d32;
  ScoreHeads<kPadded> score_heads;
  for (int h = 0; h < kHeads; ++h) {
    score_heads.centring[h] =
        15 * SumQuery(quantised + static_cast<ptrdiff_t>(h) * padded_dim, padded_dim);
    score_heads.centre[h] = fine_heads[h].centre;
    score_heads.slope[h] = fine_heads[h].slope;
  }
  for (int i = 0; i < in.count; ++i) {
    if (i + kAhead < in.count) {
      const FineRow& next = in.rows[i + kAhead];
      PrefetchLines(next.record, next.record + record_bytes);
      hwy::Prefetch(next.factors);
    }
    hn::Vec<D32> sums[kPadded];
    for (int h = kHeads; h < kPadded; ++h) sums[h] = hn::Zero(d32);
    NibbleProducts<kHeads>(in.rows[i].record, padded_dim / 2, quantised, sums);
    const float gain = in.rows[i].factors->gain;
    for (int h = 0; h < kPadded; h += 4) {
      int32_t products[4];
      float four[4];
      SumFour(d32, sums + h, products);
      score_heads.Finish(h, products, gain, four);
      for (int j = 0; j < 4 && h + j < kHeads; ++j) {
        scores[static_cast<ptrdiff_t>(h + j) * score_stride + i] = four[j];
      }
    }
  }
}

/// One batch of keys whose weights are known, for one chunk of heads.
struct ValueBatch {
  static constexpr int kKeys = 64;
  const uint8_t* nibbles[kKeys];
  float lo[kKeys];
  float step[kKeys];
  int count;
  alignas(64) float weights[kHeadChunk][kKeys];  // exp(score - max) * step
  float rescale[kHeadChunk];                     // of what was accumulated before
  float offset[kHeadChunk];                      // sum exp(score - max) * lo
};

/// Weights of one head, against the maximum of the batch and of the state, which it updates.
HWY_INLINE void WeighHead(const float* scores, int h, ValueBatch& batch, float* state_max,
                          float* state_sum) {
  const hn::ScalableTag<float> d;
  constexpr int kLanes = static_cast<int>(hn::MaxLanes(decltype(d)()));
  float* weights = batch.weights[h];
  for (int i = 0; i < batch.count; ++i) weights[i] = scores[i];
  for (int i = batch.count; i < ValueBatch::kKeys; ++i) weights[i] = -kInfinity;
  auto max_lanes = hn::Load(d, weights);
  for (int i = kLanes; i < ValueBatch::kKeys; i += kLanes) {
    max_lanes = hn::Max(max_lanes, hn::Load(d, weights + i));
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
    const auto weight = ExpFine(d, hn::Sub(hn::Load(d, weights + i), hn::Set(d, max)));
    sum = hn::Add(sum, weight);
    offset = hn::MulAdd(weight, hn::LoadU(d, batch.lo + i), offset);
    hn::Store(hn::Mul(weight, hn::LoadU(d, batch.step + i)), d, weights + i);
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
void AccumulateT(const FineInput& in, int value_offset, const float* scores, int score_stride,
                 const GroupState& state) {
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 4> d4;
  const int half_dim = state.value_dim / 2;
  ValueBatch batch;
  for (int first = 0; first < in.count; first += ValueBatch::kKeys) {
    batch.count = std::min(ValueBatch::kKeys, in.count - first);
    for (int i = 0; i < batch.count; ++i) {
      batch.nibbles[i] = in.rows[first + i].record + value_offset;
      PrefetchLines(batch.nibbles[i], batch.nibbles[i] + half_dim);
      const FineFactors& factors = *in.rows[first + i].factors;
      batch.lo[i] = Bf16ToFloat(factors.lo);
      batch.step[i] = Bf16ToFloat(factors.step);
    }
    for (int i = batch.count; i < ValueBatch::kKeys; ++i) batch.lo[i] = batch.step[i] = 0.0F;
    for (int h = 0; h < kHeads; ++h) {
      WeighHead(scores + static_cast<ptrdiff_t>(h) * score_stride + first, h, batch, state.max + h,
                state.sum + h);
    }
    const int lanes = static_cast<int>(hn::Lanes(d));
    int e = 0;
    for (; e + lanes <= half_dim; e += lanes) AddNibbles<kHeads>(d, batch, e, half_dim, state.acc);
    for (; e < half_dim; e += static_cast<int>(hn::Lanes(d4))) {
      AddNibbles<kHeads>(d4, batch, e, half_dim, state.acc);
    }
  }
}

/// Calls function.operator()<N>() for N = heads, 1..kHeadChunk.
template <class Function>
HWY_INLINE void WithHeads(int heads, const Function& function) {
  switch (heads) {
    case 1:
      return function.template operator()<1>();
    case 2:
      return function.template operator()<2>();
    case 3:
      return function.template operator()<3>();
    default:
      break;
  }
  if constexpr (kHeadChunk > 4) {
    switch (heads) {
      case 5:
        return function.template operator()<5>();
      case 6:
        return function.template operator()<6>();
      case 7:
        return function.template operator()<7>();
      case 8:
        return function.template operator()<8>();
      default:
        break;
    }
  }
  return function.template operator()<4>();
}

struct ScoreCall {
  FineInput in;
  int record_bytes;
  const int16_t* quantised;
  int padded_dim;
  const FineHead* fine_heads;
  float* scores;
  int score_stride;

  template <int kHeads>
  void operator()() const {
    ScoreT<kHeads>(in, record_bytes, quantised, padded_dim, fine_heads, scores, score_stride);
  }
};

void ScoreFineImpl(const FineRow* rows, int count, int record_bytes, const int16_t* quantised,
                   int padded_dim, const FineHead* fine_heads, int heads, float* scores,
                   int score_stride) {
  for (int h = 0; h < heads; h += kHeadChunk) {
    const ScoreCall call = {
        {rows, count}, record_bytes,   quantised + static_cast<ptrdiff_t>(h) * padded_dim,
        padded_dim,    fine_heads + h, scores + static_cast<ptrdiff_t>(h) * score_stride,
        score_stride};
    WithHeads(std::min(kHeadChunk, heads - h), call);
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

HWY_EXPORT(ScoreFineImpl);
HWY_EXPORT(AccumulateFineImpl);

void QuantiseQueries(const float* rotated_queries, int heads, int padded_dim, int16_t* quantised,
                     float* units) noexcept {
  constexpr float kLargest = 2047.0F;
  for (int h = 0; h < heads; ++h, rotated_queries += padded_dim, quantised += padded_dim) {
    float largest = 0.0F;
    for (int i = 0; i < padded_dim; ++i) largest = std::max(largest, std::abs(rotated_queries[i]));
    units[h] = largest / kLargest;
    // Below that the inverse is infinite; such a query scores nothing.
    if (units[h] < 1e-37F) units[h] = 0.0F;
    const float inverse = units[h] == 0.0F ? 0.0F : 1.0F / units[h];
    for (int i = 0; i < padded_dim; ++i) {
      const float value = std::nearbyint(rotated_queries[i] * inverse);
      quantised[i] = static_cast<int16_t>(std::clamp(value, -kLargest, kLargest));
    }
  }
}

void ScoreFine(const FineRow* rows, int count, int record_bytes, const int16_t* quantised,
               int padded_dim, const FineHead* fine_heads, int heads, float* scores,
               int score_stride) noexcept {
  assert(padded_dim >= 64 && padded_dim <= 512 && padded_dim % 64 == 0);
  HWY_DYNAMIC_DISPATCH(ScoreFineImpl)
  (rows, count, record_bytes, quantised, padded_dim, fine_heads, heads, scores, score_stride);
}

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
