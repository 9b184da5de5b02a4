// exp for the ladder's kernels, per SIMD level. 2^x is split into 2^n, put together from exponent
// bits, and a polynomial in the rest, minimax in relative error on [-0.5, 0.5].
#if defined(KVSEEK_KERNELS_CPU_LADDER_EXP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSEEK_KERNELS_CPU_LADDER_EXP_INL_H_
#undef KVSEEK_KERNELS_CPU_LADDER_EXP_INL_H_
#else
#define KVSEEK_KERNELS_CPU_LADDER_EXP_INL_H_
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {

namespace ladder_exp {
namespace hn = hwy::HWY_NAMESPACE;

inline constexpr float kLog2E = 1.44269504F;
/// Exponents below it are raised to it. Far from 2^-126: what is made of such weights must not
/// become subnormal either, which Intel's cores take a hundred cycles for.
inline constexpr float kCoarseMin = -100.0F;

/// mantissa * 2^n for a whole n from -125 to 127.
template <class D>
HWY_INLINE hn::Vec<D> Scale(D d, hn::Vec<D> mantissa, hn::Vec<D> n) {
#if HWY_TARGET <= HWY_AVX3
  (void)d;
  return hn::Vec<D>{_mm512_scalef_ps(mantissa.raw, n.raw)};
#else
  const hn::RebindToSigned<D> di;
  const auto exponent = hn::ShiftLeft<23>(hn::ConvertTo(di, n));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, mantissa), exponent));
#endif
}

}  // namespace ladder_exp

/// 2^y for y <= 126, relative error at most 1e-4; y below -100 gives 2^-100.
template <class D>
HWY_INLINE ladder_exp::hn::Vec<D> Exp2Coarse(D d, ladder_exp::hn::Vec<D> any_y) {
  namespace hn = ladder_exp::hn;
  const auto y = hn::Max(any_y, hn::Set(d, ladder_exp::kCoarseMin));
  const auto n = hn::Round(y);
  const auto r = hn::Sub(y, n);
  auto p = hn::MulAdd(hn::Set(d, 0.0551716691F), r, hn::Set(d, 0.242611122F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.693260985F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.999928074F));
  return ladder_exp::Scale(d, p, n);
}

/// exp(x) for x <= 88, relative error at most 1e-5 for x > -86; x <= -86, -infinity too, gives 0.
template <class D>
HWY_INLINE ladder_exp::hn::Vec<D> ExpFine(D d, ladder_exp::hn::Vec<D> x) {
  namespace hn = ladder_exp::hn;
#if HWY_TARGET <= HWY_AVX3
  // The same polynomial on [0, 1): what is left of y, and 2^n, are one operation each.
  const auto y = hn::Mul(x, hn::Set(d, ladder_exp::kLog2E));
  constexpr int kDown = 0x09;  // and no exception
  const hn::Vec<D> r{_mm512_reduce_ps(y.raw, kDown)};
  auto p = hn::MulAdd(hn::Set(d, 0.0135341681F), r, hn::Set(d, 0.0520114603F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.241442757F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.693003835F));
  p = hn::MulAdd(p, r, hn::Set(d, 1.00000259F));
  const auto there = hn::Gt(x, hn::Set(d, -86.0F));
  return hn::Vec<D>{_mm512_maskz_scalef_ps(there.raw, p.raw, y.raw)};
#else
  const auto y = hn::Max(hn::Mul(x, hn::Set(d, ladder_exp::kLog2E)), hn::Set(d, -125.0F));
  const auto n = hn::Round(y);
  const auto r = hn::Sub(y, n);
  auto p = hn::MulAdd(hn::Set(d, 0.00957010201F), r, hn::Set(d, 0.0559178603F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.240247448F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.693121815F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.999999261F));
  return hn::IfThenElseZero(hn::Gt(x, hn::Set(d, -86.0F)), ladder_exp::Scale(d, p, n));
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
