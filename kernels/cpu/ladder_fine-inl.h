// What scores and values of the 4-bit rung share: candidates, and heads in chunks.
#if defined(KVSEEK_KERNELS_CPU_LADDER_FINE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSEEK_KERNELS_CPU_LADDER_FINE_INL_H_
#undef KVSEEK_KERNELS_CPU_LADDER_FINE_INL_H_
#else
#define KVSEEK_KERNELS_CPU_LADDER_FINE_INL_H_
#endif

#include <cstdint>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_fine.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {

/// Heads at a time: what the registers hold.
constexpr int kHeadChunk = HWY_TARGET == HWY_AVX3 ? 8 : 4;

struct FineInput {
  const FineRow* rows;
  int count;
};

HWY_INLINE void PrefetchLines(const uint8_t* begin, const uint8_t* end) {
  for (; begin < end; begin += 64) hwy::Prefetch(begin);
}

#if HWY_TARGET <= HWY_AVX3_DL

/// Block j of out[k] := block k of in[j]; blocks of 128 bits.
HWY_INLINE void TransposeBlocks(__m512i in0, __m512i in1, __m512i in2, __m512i in3, __m512i* out,
                                int out_stride) {
  const __m512i front01 = _mm512_shuffle_i32x4(in0, in1, 0x44);
  const __m512i front23 = _mm512_shuffle_i32x4(in2, in3, 0x44);
  const __m512i back01 = _mm512_shuffle_i32x4(in0, in1, 0xee);
  const __m512i back23 = _mm512_shuffle_i32x4(in2, in3, 0xee);
  out[0] = _mm512_shuffle_i32x4(front01, front23, 0x88);
  out[out_stride] = _mm512_shuffle_i32x4(front01, front23, 0xdd);
  out[2 * out_stride] = _mm512_shuffle_i32x4(back01, back23, 0x88);
  out[3 * out_stride] = _mm512_shuffle_i32x4(back01, back23, 0xdd);
}

#endif

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

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
