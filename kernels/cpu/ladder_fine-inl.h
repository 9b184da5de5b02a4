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
