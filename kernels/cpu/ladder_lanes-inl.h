// What the ladder's kernels do across the lanes of a vector, per SIMD level: sums, masks as bits.
#if defined(KVSEEK_KERNELS_CPU_LADDER_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSEEK_KERNELS_CPU_LADDER_LANES_INL_H_
#undef KVSEEK_KERNELS_CPU_LADDER_LANES_INL_H_
#else
#define KVSEEK_KERNELS_CPU_LADDER_LANES_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {

namespace ladder_lanes {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET != HWY_SCALAR
/// out[j] := sum of lane j of every block of four.
template <class D>
HWY_INLINE void Blocks(D d, hn::Vec<D> v, hn::TFromD<D>* out) {
  if constexpr (hn::MaxLanes(D()) > 4) {
    const hn::Half<D> half;
    Blocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), out);
  } else {
    hn::StoreU(v, d, out);
  }
}
#endif

}  // namespace ladder_lanes

/// out[j] := sum of the lanes of v[j], for four vectors of 32-bit lanes at once.
template <class D>
HWY_INLINE void SumFour(D d, const ladder_lanes::hn::Vec<D>* v, ladder_lanes::hn::TFromD<D>* out) {
  namespace hn = ladder_lanes::hn;
#if HWY_TARGET == HWY_SCALAR
  (void)d;
  for (int j = 0; j < 4; ++j) out[j] = hn::GetLane(v[j]);
#else
  const hn::Repartition<uint64_t, D> d64;
  // Lanes of a block of four belong to vectors 0 1 0 1 (2 3 2 3), then to 0 1 2 3.
  const auto v01 = hn::Add(hn::InterleaveLower(d, v[0], v[1]), hn::InterleaveUpper(d, v[0], v[1]));
  const auto v23 = hn::Add(hn::InterleaveLower(d, v[2], v[3]), hn::InterleaveUpper(d, v[2], v[3]));
  const auto w01 = hn::BitCast(d64, v01);
  const auto w23 = hn::BitCast(d64, v23);
  const auto low = hn::BitCast(d, hn::InterleaveLower(d64, w01, w23));
  const auto high = hn::BitCast(d, hn::InterleaveUpper(d64, w01, w23));
  ladder_lanes::Blocks(d, hn::Add(low, high), out);
#endif
}

/// Bits [first, first + Lanes) of `bits`, zero before, := mask. `first` is a multiple of Lanes.
template <class D, class M>
HWY_INLINE void PutMaskBits(D d, M mask, int first, uint8_t* bits) {
  namespace hn = ladder_lanes::hn;
  if constexpr (hn::MaxLanes(D()) >= 8) {
    hn::StoreMaskBits(d, mask, bits + first / 8);
  } else {
    uint8_t few[8];
    hn::StoreMaskBits(d, mask, few);
    bits[first / 8] = static_cast<uint8_t>(bits[first / 8] | (few[0] << (first % 8)));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
