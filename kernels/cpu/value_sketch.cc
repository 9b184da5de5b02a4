#include "kernels/cpu/value_sketch.h"

#include <cmath>
#include <cstddef>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/value_sketch.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// What the products of weights and nibbles add to a head's sums.
HWY_INLINE void AddComponents(float unit, const int32_t* products, int weight_sum, int first,
                              int count, float* sums) {
  for (int c = 0; c < count; ++c) {
    // Nibbles count from 7.5, and halves are exact.
    const auto twice = static_cast<float>(2 * products[c] - 15 * weight_sum);
    sums[first + c] += 0.5F * unit * twice;
  }
}

#if HWY_TARGET <= HWY_AVX3_DL

/// All components for kHeads heads.
template <int kHeads>
HWY_NOINLINE void AddSketchesOf(const uint8_t* sketches, int blocks, int step_bytes,
                                const uint8_t* weights, int weights_stride, const float* units,
                                float* sums) {
  constexpr int kHalf = kSketchDim / 2;
  const __m512i ones = _mm512_set1_epi8(1);
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i sign = _mm512_set1_epi8(-128);
  __m512i low[kHeads][kHalf];
  __m512i both[kHeads][kHalf];  // low + 16 * high - 128
  __m512i weight_sums[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    for (int c = 0; c < kHalf; ++c) low[h][c] = both[h][c] = _mm512_setzero_si512();
    weight_sums[h] = _mm512_setzero_si512();
  }
  for (int b = 0; b < blocks; ++b, sketches += step_bytes, weights += kScanBlock) {
    __m512i block[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      block[h] = _mm512_loadu_si512(weights + static_cast<ptrdiff_t>(h) * weights_stride);
      weight_sums[h] = AddProducts(weight_sums[h], block[h], ones);
    }
    for (int c = 0; c < kHalf; ++c) {
      const __m512i row = _mm512_loadu_si512(sketches + c * kScanBlock);
      const __m512i row_low = _mm512_and_si512(row, nibble);
      const __m512i row_both = _mm512_xor_si512(row, sign);
      for (int h = 0; h < kHeads; ++h) {
        low[h][c] = AddProducts(low[h][c], block[h], row_low);
        both[h][c] = AddProducts(both[h][c], block[h], row_both);
      }
    }
  }
  const hn::CappedTag<int32_t, 16> d32;
  using V32 = hn::Vec<decltype(d32)>;
  for (int h = 0; h < kHeads; ++h) {
    const int weight_sum = _mm512_reduce_add_epi32(weight_sums[h]);
    const V32 low_totals[4] = {V32{low[h][0]}, V32{low[h][1]}, V32{low[h][2]}, V32{low[h][3]}};
    const V32 both_totals[4] = {V32{both[h][0]}, V32{both[h][1]}, V32{both[h][2]}, V32{both[h][3]}};
    int32_t lows[kHalf];
    int32_t highs[kHalf];
    SumFour(d32, low_totals, lows);
    SumFour(d32, both_totals, highs);
    for (int c = 0; c < kHalf; ++c) highs[c] = (highs[c] + 128 * weight_sum - lows[c]) / 16;
    AddComponents(units[h], lows, weight_sum, 0, kHalf, sums + h * kSketchDim);
    AddComponents(units[h], highs, weight_sum, kHalf, kHalf, sums + h * kSketchDim);
  }
}

#else

using D32 = hn::CappedTag<int32_t, 16>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D32()));

/// Half of the components, those of the low or the high nibbles, for kHeads heads.
template <int kHeads>
HWY_INLINE void AddHalfSketches(const uint8_t* sketches, int blocks, int step_bytes, int half,
                                const uint8_t* weights, int weights_stride, const float* units,
                                float* sums) {
  const D32 d;
  const hn::Rebind<uint8_t, D32> d8;
  constexpr int kHalf = kSketchDim / 2;
  hn::Vec<D32> totals[kHeads][kHalf];
  hn::Vec<D32> weight_sums[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    weight_sums[h] = hn::Zero(d);
    for (int c = 0; c < kHalf; ++c) totals[h][c] = hn::Zero(d);
  }
  for (int b = 0; b < blocks; ++b, sketches += step_bytes, weights += kScanBlock) {
    for (int i = 0; i < kScanBlock; i += kLanes) {
      hn::Vec<D32> components[kHalf];
      for (int c = 0; c < kHalf; ++c) {
        const auto byte = hn::PromoteTo(d, hn::LoadU(d8, sketches + c * kScanBlock + i));
        components[c] = hn::And(hn::ShiftRightSame(byte, 4 * half), hn::Set(d, 15));
      }
      for (int h = 0; h < kHeads; ++h) {
        const uint8_t* const of_head = weights + static_cast<ptrdiff_t>(h) * weights_stride;
        const auto weight = hn::PromoteTo(d, hn::LoadU(d8, of_head + i));
        weight_sums[h] = hn::Add(weight_sums[h], weight);
        for (int c = 0; c < kHalf; ++c) {
          totals[h][c] = hn::Add(totals[h][c], hn::Mul(weight, components[c]));
        }
      }
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    int32_t products[kHalf];
    SumFour(d, totals[h], products);
    const int weight_sum = hn::GetLane(hn::SumOfLanes(d, weight_sums[h]));
    AddComponents(units[h], products, weight_sum, half * kHalf, kHalf, sums + h * kSketchDim);
  }
}

/// All components.
template <int kHeads>
HWY_NOINLINE void AddSketchesOf(const uint8_t* sketches, int blocks, int step_bytes,
                                const uint8_t* weights, int weights_stride, const float* units,
                                float* sums) {
  for (int half = 0; half < 2; ++half) {
    AddHalfSketches<kHeads>(sketches, blocks, step_bytes, half, weights, weights_stride, units,
                            sums);
  }
}

#endif

void AddSketchesImpl(const uint8_t* sketches, int all_blocks, WeighedBlocks weighed,
                     const uint8_t* weights, int weights_stride, const float* units, int heads,
                     float* sums) {
  sketches += weighed.first * kSketchBlockBytes;
  const int step_bytes = weighed.step * kSketchBlockBytes;
  const int blocks = weighed.Count(all_blocks);
  int h = 0;
  for (; h + 2 <= heads; h += 2, weights += 2 * static_cast<ptrdiff_t>(weights_stride)) {
    AddSketchesOf<2>(sketches, blocks, step_bytes, weights, weights_stride, units + h,
                     sums + h * kSketchDim);
  }
  if (h < heads) {
    AddSketchesOf<1>(sketches, blocks, step_bytes, weights, weights_stride, units + h,
                     sums + h * kSketchDim);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(AddSketchesImpl);

void AddSketches(const uint8_t* sketches, int blocks, WeighedBlocks weighed, const uint8_t* weights,
                 int weights_stride, const float* units, int heads, float* sums) noexcept {
  HWY_DYNAMIC_DISPATCH(AddSketchesImpl)
  (sketches, blocks, weighed, weights, weights_stride, units, heads, sums);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
