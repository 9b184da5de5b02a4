// Loading stored rows as floats, and the few vector operations that kernels over rows share. Per
// level: include it after foreach_target.h, see simd_level.cc.
#if defined(KVSEEK_KERNELS_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSEEK_KERNELS_CPU_ROWS_INL_H_
#undef KVSEEK_KERNELS_CPU_ROWS_INL_H_
#else
#define KVSEEK_KERNELS_CPU_ROWS_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
/// For what is left of a dimension, a multiple of 8, after whole vectors.
using TailTag = hn::CappedTag<float, 8>;

/// The element types of rows: Load reads Lanes(d) elements at any 2-byte aligned address.
struct Bf16 {
  using T = uint16_t;
  template <class D>
  static HWY_INLINE hn::Vec<D> Load(D d, const T* from) {
    const hn::Rebind<uint16_t, D> narrow;
    const hn::RebindToUnsigned<D> wide;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(wide, hn::LoadU(narrow, from))));
  }
};

struct Fp16 {
  using T = uint16_t;
  template <class D>
  static HWY_INLINE hn::Vec<D> Load(D d, const T* from) {
    const hn::Rebind<hwy::float16_t, D> narrow;
    return hn::PromoteTo(d, hn::LoadU(narrow, reinterpret_cast<const hwy::float16_t*>(from)));
  }
};

struct Fp32 {
  using T = float;
  template <class D>
  static HWY_INLINE hn::Vec<D> Load(D d, const T* from) {
    return hn::LoadU(d, from);
  }
};

/// Where rows stand: one after the other, or anywhere.
template <class Element>
struct ContiguousRows {
  const typename Element::T* base;
  size_t dim;  ///< from one row to the next
  HWY_INLINE const typename Element::T* operator[](int t) const {
    return base + static_cast<size_t>(t) * dim;
  }
  HWY_INLINE ContiguousRows From(int t) const { return {(*this)[t], dim}; }
};

template <class Element>
struct GatheredRows {
  const typename Element::T* const* rows;
  HWY_INLINE const typename Element::T* operator[](int t) const { return rows[t]; }
  HWY_INLINE GatheredRows From(int t) const { return {rows + t}; }
};

template <class T>
HWY_INLINE void PrefetchRow(const T* row, size_t dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (size_t i = 0; i < dim * sizeof(T); i += 64) hwy::Prefetch(bytes + i);
}

/// exp(x) for x <= 88, relative error below 5e-7; 0 where x < -87, -infinity included.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp(D d, V x) {
  const hn::RebindToSigned<D> di;
  const V lowest = hn::Set(d, -87.0F);
  const auto vanishes = hn::Lt(x, lowest);
  x = hn::Max(x, lowest);
  const auto power = hn::NearestInt(hn::Mul(x, hn::Set(d, 1.44269504F)));
  const V n = hn::ConvertTo(d, power);
  // ln 2 in two parts, the first exact in n * part.
  V r = hn::NegMulAdd(n, hn::Set(d, 0.693359375F), x);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4F), r);
  // |r| <= ln(2) / 2: the Taylor series to the sixth power leaves 2e-7.
  V p = hn::MulAdd(r, hn::Set(d, 1.0F / 720), hn::Set(d, 1.0F / 120));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F / 24));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F / 6));
  p = hn::MulAdd(p, r, hn::Set(d, 0.5F));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F));
  const V scaled = hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(power)));
  return hn::IfThenZeroElse(vanishes, scaled);
}

/// out[i] := the sum of the lanes of vector i.
template <class D, class V = hn::Vec<D>>
HWY_INLINE void SumLanes4(D d, V a, V b, V c, V e, float* out) {
#if HWY_TARGET == HWY_SCALAR
  (void)d;
  out[0] = hn::GetLane(a);
  out[1] = hn::GetLane(b);
  out[2] = hn::GetLane(c);
  out[3] = hn::GetLane(e);
#else
  const hn::RepartitionToWide<D> pairs;
  const V ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const V ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto ab_pairs = hn::BitCast(pairs, ab);
  const auto ce_pairs = hn::BitCast(pairs, ce);
  const V all = hn::Add(hn::BitCast(d, hn::InterleaveLower(pairs, ab_pairs, ce_pairs)),
                        hn::BitCast(d, hn::InterleaveUpper(pairs, ab_pairs, ce_pairs)));
  // Each block of four lanes now holds one partial sum of a, b, c, e.
#if HWY_MAX_BYTES >= 32
  const hn::Half<D> half;
  const auto sum2 = hn::Add(hn::LowerHalf(half, all), hn::UpperHalf(half, all));
#if HWY_MAX_BYTES >= 64
  const hn::Half<decltype(half)> quarter;
  hn::StoreU(hn::Add(hn::LowerHalf(quarter, sum2), hn::UpperHalf(quarter, sum2)), quarter, out);
#else
  hn::StoreU(sum2, half, out);
#endif
#else
  hn::StoreU(all, d, out);
#endif
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#endif  // KVSEEK_KERNELS_CPU_ROWS_INL_H_
