// Estimates and weights of scanned keys in single precision, per SIMD level (ladder_select.h).
#if defined(KVSEEK_KERNELS_CPU_LADDER_ESTIMATE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSEEK_KERNELS_CPU_LADDER_ESTIMATE_INL_H_
#undef KVSEEK_KERNELS_CPU_LADDER_ESTIMATE_INL_H_
#else
#define KVSEEK_KERNELS_CPU_LADDER_ESTIMATE_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/ladder_exp-inl.h"
#include "kernels/cpu/ladder_select.h"
#include "kernels/cpu/log_bits.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

HWY_INLINE hn::Vec<DF> LoadGains(DF d, const uint16_t* gains) {
  const hn::Rebind<uint16_t, DF> d16;
  const hn::RebindToUnsigned<DF> d32;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, gains))));
}

HWY_INLINE hn::Vec<DF> Estimate(DF d, const ScanHead& head, hn::Vec<DF> gain, const int16_t* sums) {
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<int16_t, DF> d16;
  const auto sum = hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(d16, sums)));
  return hn::MulAdd(hn::Mul(hn::Set(d, head.slope), gain), sum, hn::Set(d, head.centre));
}

/// What weights need of a head, in units of log2.
struct WeightHead {
  explicit WeightHead(const ScanHead& head)
      : half_noise2(0.5F * ladder_exp::kLog2E * head.noise * head.noise),
        reference(ladder_exp::kLog2E * head.reference) {}
  float half_noise2;
  float reference;
};

HWY_INLINE hn::Vec<DF> Weight(DF d, const WeightHead& head, hn::Vec<DF> gain2,
                              hn::Vec<DF> estimate) {
  const auto offset = hn::MulAdd(hn::Set(d, head.half_noise2), gain2, hn::Set(d, head.reference));
  const auto exponent = hn::MulSub(estimate, hn::Set(d, ladder_exp::kLog2E), offset);
  return Exp2Coarse(d, hn::Min(exponent, hn::Set(d, kExponentMax * ladder_exp::kLog2E)));
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
