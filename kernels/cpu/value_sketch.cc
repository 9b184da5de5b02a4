#include "kernels/cpu/value_sketch.h"

#include <cassert>
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

using DF = hn::CappedTag<float, 16>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

#if HWY_TARGET <= HWY_AVX3_DL

/// Nibbles of components c and c + 4 of 64 keys.
HWY_INLINE void LoadNibbles(const uint8_t* rows, __m512i* nibbles) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int c = 0; c < kSketchDim / 2; ++c) {
    const __m512i row = _mm512_loadu_si512(rows + c * kScanBlock);
    nibbles[c] = _mm512_and_si512(row, low);
    nibbles[c + kSketchDim / 2] = _mm512_and_si512(_mm512_srli_epi16(row, 4), low);
  }
}

/// Numbers of bf16 as multiples of 2^(exponent - 134), rounded, at most 255: 32 in 16 bits each.
HWY_INLINE __m512i RoundedWeights(__m512i bf16, __m512i exponent) {
  const __m512i fraction = _mm512_and_si512(_mm512_slli_epi16(bf16, 1), _mm512_set1_epi16(0xfe));
  const __m512i doubled = _mm512_or_si512(fraction, _mm512_set1_epi16(0x100));
  const __m512i shift = _mm512_sub_epi16(exponent, _mm512_srli_epi16(bf16, 7));
  return _mm512_avg_epu16(_mm512_srlv_epi16(doubled, shift), _mm512_setzero_si512());
}

/// The exponent bits of the largest of `count` bf16 numbers, none negative.
HWY_INLINE int LargestExponent(const uint16_t* numbers, int count) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 32) {
    most = _mm512_max_epu16(most, _mm512_loadu_si512(numbers + i));
  }
  const __m512i pairs = _mm512_max_epu32(_mm512_srli_epi32(most, 16),
                                         _mm512_and_si512(most, _mm512_set1_epi32(0xffff)));
  return static_cast<int>(_mm512_reduce_max_epu32(pairs)) >> 7;
}

/// All components for kHeads heads, weights in eight bits of each head's largest.
template <int kHeads>
KVSEEK_VNNI HWY_NOINLINE void AddSketchesOf(const uint8_t* codes, int blocks, int block_bytes,
                                            const uint16_t* weights, int weights_stride,
                                            float* sums) {
  alignas(64) static constexpr uint8_t kEven[64] = {
      0,  2,  4,   6,   8,   10,  12,  14,  16,  18,  20,  22,  24,  26,  28,  30,
      32, 34, 36,  38,  40,  42,  44,  46,  48,  50,  52,  54,  56,  58,  60,  62,
      64, 66, 68,  70,  72,  74,  76,  78,  80,  82,  84,  86,  88,  90,  92,  94,
      96, 98, 100, 102, 104, 106, 108, 110, 112, 114, 116, 118, 120, 122, 124, 126};
  const __m512i even = _mm512_load_si512(kEven);
  const __m512i ones = _mm512_set1_epi8(1);
  int largest[kHeads];
  __m512i exponents[kHeads];
  __m512i totals[kHeads][kSketchDim];
  __m512i weight_totals[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    largest[h] =
        LargestExponent(weights + static_cast<ptrdiff_t>(h) * weights_stride, blocks * kScanBlock);
    exponents[h] = _mm512_set1_epi16(static_cast<int16_t>(largest[h]));
    for (__m512i& total : totals[h]) total = _mm512_setzero_si512();
    weight_totals[h] = _mm512_setzero_si512();
  }
  for (int b = 0; b < blocks; ++b, codes += block_bytes, weights += kScanBlock) {
    __m512i nibbles[kSketchDim];
    LoadNibbles(codes, nibbles);
    for (int h = 0; h < kHeads; ++h) {
      const uint16_t* const block = weights + static_cast<ptrdiff_t>(h) * weights_stride;
      const __m512i low = RoundedWeights(_mm512_loadu_si512(block), exponents[h]);
      const __m512i high = RoundedWeights(_mm512_loadu_si512(block + 32), exponents[h]);
      const __m512i bytes = _mm512_permutex2var_epi8(low, even, high);
      weight_totals[h] = _mm512_dpbusd_epi32(weight_totals[h], bytes, ones);
      for (int c = 0; c < kSketchDim; ++c) {
        totals[h][c] = _mm512_dpbusd_epi32(totals[h][c], bytes, nibbles[c]);
      }
    }
  }
  const hn::CappedTag<int32_t, 16> d32;
  using V32 = hn::Vec<decltype(d32)>;
  for (int h = 0; h < kHeads; ++h) {
    const float unit = std::ldexp(1.0F, largest[h] - 134);
    const auto centre = kSketchBias * static_cast<float>(_mm512_reduce_add_epi32(weight_totals[h]));
    for (int c = 0; c < kSketchDim; c += 4) {
      const V32 four_totals[4] = {V32{totals[h][c]}, V32{totals[h][c + 1]}, V32{totals[h][c + 2]},
                                  V32{totals[h][c + 3]}};
      int32_t four[4];
      SumFour(d32, four_totals, four);
      for (int j = 0; j < 4; ++j) {
        sums[h * kSketchDim + c + j] += unit * (static_cast<float>(four[j]) - centre);
      }
    }
  }
}

#else

/// Half of the components, those of the low or the high nibbles, for kHeads heads.
template <int kHeads>
HWY_INLINE void AddHalfSketches(const uint8_t* codes, int blocks, int block_bytes, int shift,
                                const uint16_t* weights, int weights_stride, float* sums) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::RebindToUnsigned<DF> du;
  const hn::Rebind<uint16_t, DF> d16;
  const hn::Rebind<uint8_t, DF> d8;
  constexpr int kHalf = kSketchDim / 2;
  hn::Vec<DF> totals[kHeads][kHalf];
  for (int h = 0; h < kHeads; ++h) {
    for (int c = 0; c < kHalf; ++c) totals[h][c] = hn::Zero(d);
  }
  for (int b = 0; b < blocks; ++b, codes += block_bytes, weights += kScanBlock) {
    for (int i = 0; i < kScanBlock; i += kLanes) {
      hn::Vec<DF> components[kHalf];
      for (int c = 0; c < kHalf; ++c) {
        const auto byte = hn::PromoteTo(di, hn::LoadU(d8, codes + c * kScanBlock + i));
        const auto nibble = hn::And(hn::ShiftRightSame(byte, shift), hn::Set(di, 15));
        components[c] = hn::Sub(hn::ConvertTo(d, nibble), hn::Set(d, kSketchBias));
      }
      for (int h = 0; h < kHeads; ++h) {
        const auto bits = hn::LoadU(d16, weights + static_cast<ptrdiff_t>(h) * weights_stride + i);
        const auto weight = hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, bits)));
        for (int c = 0; c < kHalf; ++c) {
          totals[h][c] = hn::MulAdd(weight, components[c], totals[h][c]);
        }
      }
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    float four[kHalf];
    SumFour(d, totals[h], four);
    for (int c = 0; c < kHalf; ++c) sums[h * kSketchDim + c] += four[c];
  }
}

/// All components.
template <int kHeads>
HWY_NOINLINE void AddSketchesOf(const uint8_t* codes, int blocks, int block_bytes,
                                const uint16_t* weights, int weights_stride, float* sums) {
  for (int half = 0; half < 2; ++half) {
    AddHalfSketches<kHeads>(codes, blocks, block_bytes, 4 * half, weights, weights_stride,
                            sums + half * kSketchDim / 2);
  }
}

#endif

void AddSketchesImpl(const uint8_t* codes, int blocks, const ProductLayout& layout,
                     const uint16_t* weights, int weights_stride, int heads, float* sums) {
  codes += layout.SketchOffset();
  const int block_bytes = layout.BlockBytes();
  int h = 0;
  for (; h + 2 <= heads; h += 2, weights += 2 * static_cast<ptrdiff_t>(weights_stride)) {
    AddSketchesOf<2>(codes, blocks, block_bytes, weights, weights_stride, sums + h * kSketchDim);
  }
  if (h < heads) {
    AddSketchesOf<1>(codes, blocks, block_bytes, weights, weights_stride, sums + h * kSketchDim);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(AddSketchesImpl);

void AddSketches(const uint8_t* codes, int blocks, const ProductLayout& layout,
                 const uint16_t* weights, int weights_stride, int heads, float* sums) noexcept {
  assert(layout.sketch);
  HWY_DYNAMIC_DISPATCH(AddSketchesImpl)
  (codes, blocks, layout, weights, weights_stride, heads, sums);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
