#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "kernels/cpu/ladder_fine.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/ladder_fine_scores.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_fine-inl.h"
#include "kernels/cpu/ladder_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET <= HWY_AVX3_DL

constexpr int kRows = 16;  // records at a time, one in each lane of 32 bits

/// Lane i of words[j] := word j of rows[i].
HWY_INLINE void Transpose(const __m512i* rows, __m512i* words) {
  // fours[4 g + k], block q of 128 bits: words 4 q + k of rows 4 g to 4 g + 3.
  __m512i fours[kRows];
#pragma GCC unroll 4
  for (int g = 0; g < kRows; g += 4) {
    const __m512i low01 = _mm512_unpacklo_epi32(rows[g], rows[g + 1]);
    const __m512i low23 = _mm512_unpacklo_epi32(rows[g + 2], rows[g + 3]);
    const __m512i high01 = _mm512_unpackhi_epi32(rows[g], rows[g + 1]);
    const __m512i high23 = _mm512_unpackhi_epi32(rows[g + 2], rows[g + 3]);
    fours[g] = _mm512_unpacklo_epi64(low01, low23);
    fours[g + 1] = _mm512_unpackhi_epi64(low01, low23);
    fours[g + 2] = _mm512_unpacklo_epi64(high01, high23);
    fours[g + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    TransposeBlocks(fours[k], fours[k + 4], fours[k + 8], fours[k + 12], words + k, 4);
  }
}

/// sums[h] := the sum of a query's bytes, for four or fewer.
template <int kHeads>
HWY_INLINE void SumQueries(const int8_t* quantised, int padded_dim, int32_t* sums) {
  const hn::CappedTag<int32_t, 16> d;
  const __m512i ones = _mm512_set1_epi8(1);
  hn::Vec<decltype(d)> lanes[4];
  for (int h = 0; h < 4; ++h) {
    lanes[h] = hn::Zero(d);
    if (h >= kHeads) continue;
    for (int i = 0; i < padded_dim; i += 64, quantised += 64) {
      lanes[h].raw = AddProducts(lanes[h].raw, ones, _mm512_loadu_si512(quantised));
    }
  }
  SumFour(d, lanes, sums);
}

/// Sixteen records at a time: each head's products stand side by side.
template <int kHeads>
void ScoreT(const FineInput& in, int record_bytes, const int8_t* quantised, int padded_dim,
            const float* slopes, float* scores, int score_stride) {
  const int half_dim = padded_dim / 2;
  int32_t query_sums[4];
  SumQueries<kHeads>(quantised, padded_dim, query_sums);
  const __m512i low_nibble = _mm512_set1_epi8(15);
  const __m512i high_nibble = _mm512_set1_epi8(-16);
  for (int i = 0; i < in.count; i += kRows) {
    const int left = std::min(kRows, in.count - i);
    const FineRow* rows = in.rows + i;
    FineRow last[kRows];
    if (left < kRows) {
      std::copy_n(rows, left, last);
      std::fill_n(last + left, kRows - left, rows[0]);
      rows = last;
    }
    alignas(64) float gains[kRows];
    for (int j = 0; j < kRows; ++j) gains[j] = rows[j].factors->gain;
    const int next_end = std::min(i + 2 * kRows, in.count);
    for (int next = i + kRows; next < next_end; ++next) {
      PrefetchLines(in.rows[next].record, in.rows[next].record + record_bytes);
      hwy::Prefetch(in.rows[next].factors);
    }
    // Of the low nibbles, and sixteen times those of the high ones, counted from 7.5: no shifts.
    __m512i low_sums[kHeads];
    __m512i high_sums[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      low_sums[h] = _mm512_setzero_si512();
      high_sums[h] = _mm512_set1_epi32(-120 * query_sums[h]);
    }
    for (int at = 0; at < half_dim; at += 64) {
      __m512i codes[kRows];
      __m512i words[kRows];
      const bool whole = half_dim - at >= 64;  // or else half of it
      if (whole) {
#pragma GCC unroll 16
        for (int j = 0; j < kRows; ++j) codes[j] = _mm512_loadu_si512(rows[j].record + at);
      } else {
#pragma GCC unroll 16
        for (int j = 0; j < kRows; ++j) {
          codes[j] = _mm512_zextsi256_si512(
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[j].record + at)));
        }
      }
      Transpose(codes, words);
      const int8_t* query = quantised + at;
      const auto add = [&](int first) {
#pragma GCC unroll 8
        for (int w = first; w < first + kRows / 2; ++w) {
          const __m512i low = _mm512_and_si512(words[w], low_nibble);
          const __m512i high = _mm512_and_si512(words[w], high_nibble);
          for (int h = 0; h < kHeads; ++h) {
            const int8_t* const word = query + static_cast<ptrdiff_t>(h) * padded_dim + 4 * w;
            low_sums[h] = AddProducts(low_sums[h], low, word);
            high_sums[h] = AddProducts(high_sums[h], high, word + half_dim);
          }
        }
      };
      add(0);
      if (whole) add(kRows / 2);
    }
    const __m512 gain = _mm512_load_ps(gains);
    const auto there = static_cast<__mmask16>((1U << left) - 1U);
    for (int h = 0; h < kHeads; ++h) {
      const __m512i products = _mm512_add_epi32(_mm512_slli_epi32(low_sums[h], 4), high_sums[h]);
      const __m512 slope = _mm512_mul_ps(_mm512_set1_ps(slopes[h] / 8), gain);
      float* const of_head = scores + static_cast<ptrdiff_t>(h) * score_stride + i;
      const __m512 before = _mm512_maskz_loadu_ps(there, of_head);
      const __m512 score = _mm512_fmadd_ps(slope, _mm512_cvtepi32_ps(products), before);
      _mm512_mask_storeu_ps(of_head, there, score);
    }
  }
}

#else

constexpr int kDimMax = 512;
constexpr int kAhead = 16;  // records between prefetch and use

HWY_INLINE int32_t SumQuery(const int8_t* query, int padded_dim) {
  const hn::ScalableTag<int32_t> d;
  const hn::Rebind<int8_t, decltype(d)> d8;
  auto sum = hn::Zero(d);
  for (int i = 0; i < padded_dim; i += static_cast<int>(hn::Lanes(d))) {
    sum = hn::Add(sum, hn::PromoteTo(d, hn::LoadU(d8, query + i)));
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

using D16 = hn::ScalableTag<int16_t>;
using D32 = hn::Repartition<int32_t, D16>;

HWY_INLINE void Widen(const int8_t* from, int count, int16_t* to) {
  const D16 d16;
  const hn::Rebind<int8_t, D16> d8;
  for (int i = 0; i < count; i += static_cast<int>(hn::Lanes(d16))) {
    hn::Store(hn::PromoteTo(d16, hn::LoadU(d8, from + i)), d16, to + i);
  }
}

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

/// What turns products into scores, four heads at a time: slope * gain * (2 product - centring).
template <int kPadded>
struct ScoreHeads {
  static constexpr int kFour = 4;
  alignas(64) float slope[kPadded] = {};
  alignas(64) int32_t centring[kPadded] = {};  // 15 * sum(q), for nibbles count from 0

  void Finish(int h, const int32_t* products, float gain, float* scores) const {
    const hn::CappedTag<float, kFour> d;
    const hn::RebindToSigned<decltype(d)> di;
    for (int j = 0; j < kFour; j += static_cast<int>(hn::Lanes(d))) {
      const auto product = hn::LoadU(di, products + j);
      const auto sum = hn::Sub(hn::Add(product, product), hn::LoadU(di, centring + h + j));
      const auto factor = hn::Mul(hn::LoadU(d, slope + h + j), hn::Set(d, gain));
      hn::StoreU(hn::Mul(factor, hn::ConvertTo(d, sum)), d, scores + j);
    }
  }
};

template <int kHeads>
void ScoreT(const FineInput& in, int record_bytes, const int8_t* quantised, int padded_dim,
            const float* slopes, float* scores, int score_stride) {
  constexpr int kPadded = (kHeads + 3) / 4 * 4;
  const D32 d32;
  ScoreHeads<kPadded> score_heads;
  HWY_ALIGN int16_t queries[kHeads * kDimMax];
  Widen(quantised, kHeads * padded_dim, queries);
  for (int h = 0; h < kHeads; ++h) {
    score_heads.centring[h] =
        15 * SumQuery(quantised + static_cast<ptrdiff_t>(h) * padded_dim, padded_dim);
    score_heads.slope[h] = slopes[h];
  }
  for (int i = 0; i < in.count; ++i) {
    if (i + kAhead < in.count) {
      const FineRow& next = in.rows[i + kAhead];
      PrefetchLines(next.record, next.record + record_bytes);
      hwy::Prefetch(next.factors);
    }
    hn::Vec<D32> sums[kPadded];
    for (int h = kHeads; h < kPadded; ++h) sums[h] = hn::Zero(d32);
    NibbleProducts<kHeads>(in.rows[i].record, padded_dim / 2, queries, sums);
    const float gain = in.rows[i].factors->gain;
    for (int h = 0; h < kPadded; h += 4) {
      int32_t products[4];
      float four[4];
      SumFour(d32, sums + h, products);
      score_heads.Finish(h, products, gain, four);
      for (int j = 0; j < 4 && h + j < kHeads; ++j) {
        scores[static_cast<ptrdiff_t>(h + j) * score_stride + i] += four[j];
      }
    }
  }
}

#endif

struct ScoreCall {
  FineInput in;
  int record_bytes;
  const int8_t* quantised;
  int padded_dim;
  const float* slopes;
  float* scores;
  int score_stride;

  template <int kHeads>
  void operator()() const {
    ScoreT<kHeads>(in, record_bytes, quantised, padded_dim, slopes, scores, score_stride);
  }
};

void ScoreFineImpl(const FineRow* rows, int count, int record_bytes, const int8_t* quantised,
                   int padded_dim, const float* slopes, int heads, float* scores,
                   int score_stride) {
  for (int h = 0; h < heads; h += kHeadChunk) {
    const ScoreCall call = {
        {rows, count}, record_bytes, quantised + static_cast<ptrdiff_t>(h) * padded_dim,
        padded_dim,    slopes + h,   scores + static_cast<ptrdiff_t>(h) * score_stride,
        score_stride};
    WithHeads(std::min(kHeadChunk, heads - h), call);
  }
}

void QuantiseQueriesImpl(const float* rotated_queries, int heads, int padded_dim, int8_t* quantised,
                         float* units) {
  constexpr int32_t kLargest = 127;
  const hn::CappedTag<float, 16> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<int8_t, decltype(d)> d8;
  const auto lanes = static_cast<int>(hn::Lanes(d));
  for (int h = 0; h < heads; ++h, rotated_queries += padded_dim, quantised += padded_dim) {
    auto largest = hn::Zero(d);
    for (int i = 0; i < padded_dim; i += lanes) {
      largest = hn::Max(largest, hn::Abs(hn::LoadU(d, rotated_queries + i)));
    }
    units[h] = hn::GetLane(hn::MaxOfLanes(d, largest)) / static_cast<float>(kLargest);
    // Below that the inverse is infinite; such a query scores nothing.
    if (units[h] < 1e-37F) units[h] = 0.0F;
    const auto inverse = hn::Set(d, units[h] == 0.0F ? 0.0F : 1.0F / units[h]);
    for (int i = 0; i < padded_dim; i += lanes) {
      const auto value = hn::NearestInt(hn::Mul(hn::LoadU(d, rotated_queries + i), inverse));
      const auto bounded = hn::Max(hn::Min(value, hn::Set(di, kLargest)), hn::Set(di, -kLargest));
      hn::StoreU(hn::DemoteTo(d8, bounded), d8, quantised + i);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(ScoreFineImpl);
HWY_EXPORT(QuantiseQueriesImpl);

void QuantiseQueries(const float* rotated_queries, int heads, int padded_dim, int8_t* quantised,
                     float* units) noexcept {
  HWY_DYNAMIC_DISPATCH(QuantiseQueriesImpl)
  (rotated_queries, heads, padded_dim, quantised, units);
}

void ScoreFine(const FineRow* rows, int count, int record_bytes, const int8_t* quantised,
               int padded_dim, const float* slopes, int heads, float* scores,
               int score_stride) noexcept {
  assert(padded_dim >= 64 && padded_dim <= 512 && padded_dim % 64 == 0);
  HWY_DYNAMIC_DISPATCH(ScoreFineImpl)
  (rows, count, record_bytes, quantised, padded_dim, slopes, heads, scores, score_stride);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
