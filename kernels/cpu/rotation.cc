#include "kernels/cpu/rotation.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rotation.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#ifndef KVSEEK_KERNELS_CPU_ROTATION_SIGNS_
#define KVSEEK_KERNELS_CPU_ROTATION_SIGNS_
namespace kvseek::kernels::rotation {

/// The signs of one round, times `magnitude`.
template <size_t padded_dim>
constexpr std::array<float, padded_dim> Signs(int round, float magnitude) {
  std::array<float, padded_dim> signs{};
  for (size_t i = 0; i < padded_dim; ++i) {
    const bool flips = RotationFlips(static_cast<int>(padded_dim), round, static_cast<int>(i));
    signs[i] = flips ? -magnitude : magnitude;
  }
  return signs;
}

/// Each transform scales by sqrt(padded_dim); the second round's signs take both back.
template <size_t padded_dim>
inline constexpr auto kFirst = Signs<padded_dim>(0, 1.0F);
template <size_t padded_dim>
inline constexpr auto kSecond = Signs<padded_dim>(1, 1.0F / static_cast<float>(padded_dim));

}  // namespace kvseek::kernels::rotation
#endif  // KVSEEK_KERNELS_CPU_ROTATION_SIGNS_

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::ScalableTag<float>;
using Vector = hn::Vec<Tag>;

#if HWY_TARGET != HWY_SCALAR
/// (a, b) -> (a + b, a - b) for lanes a and b that `swapped` has exchanged; signs is -1 at every b.
/// A product with a sign is exact, so that a fused addition gives the bits of a plain one.
HWY_INLINE Vector Butterfly(Vector x, Vector swapped, Vector signs) {
  return hn::MulAdd(x, signs, swapped);
}

/// -1 in lanes whose index has the bit, else 1.
HWY_INLINE Vector LaneSigns(Tag d, int32_t bit) {
  const hn::RebindToSigned<Tag> di;
  const auto has = hn::TestBit(hn::Iota(di, 0), hn::Set(di, bit));
  return hn::IfThenElse(hn::RebindMask(d, has), hn::Set(d, -1.0F), hn::Set(d, 1.0F));
}

/// The transform's stages inside a vector.
HWY_INLINE Vector TransformLanes(Tag d, Vector x) {
  x = Butterfly(x, hn::Shuffle2301(x), LaneSigns(d, 1));
  x = Butterfly(x, hn::Shuffle1032(x), LaneSigns(d, 2));
#if HWY_MAX_BYTES >= 32
  x = Butterfly(x, hn::SwapAdjacentBlocks(x), LaneSigns(d, 4));
#endif
#if HWY_MAX_BYTES >= 64
  x = Butterfly(x, hn::ConcatLowerUpper(d, x, x), LaneSigns(d, 8));
#endif
  return x;
}
#else
HWY_INLINE Vector TransformLanes(Tag /*d*/, Vector x) { return x; }
#endif

/// Unscaled Walsh-Hadamard transform of x times signs, in place.
template <size_t padded_dim>
HWY_INLINE void Transform(const float* signs, float* x) {
  const Tag d;
  const size_t lanes = hn::Lanes(d);
  for (size_t i = 0; i < padded_dim; i += lanes) {
    const Vector signed_x = hn::Mul(hn::LoadU(d, x + i), hn::LoadU(d, signs + i));
    hn::StoreU(TransformLanes(d, signed_x), d, x + i);
  }
  for (size_t half = lanes; half < padded_dim; half *= 2) {
    for (size_t start = 0; start < padded_dim; start += 2 * half) {
      for (size_t i = start; i < start + half; i += lanes) {
        const Vector a = hn::LoadU(d, x + i);
        const Vector b = hn::LoadU(d, x + i + half);
        hn::StoreU(hn::Add(a, b), d, x + i);
        hn::StoreU(hn::Sub(a, b), d, x + i + half);
      }
    }
  }
}

template <size_t padded_dim>
void RotateRows(const float* in, int count, size_t dim, float* out) {
  for (int t = 0; t < count; ++t, in += dim, out += padded_dim) {
    std::copy_n(in, dim, out);
    std::fill(out + dim, out + padded_dim, 0.0F);
    Transform<padded_dim>(rotation::kFirst<padded_dim>.data(), out);
    Transform<padded_dim>(rotation::kSecond<padded_dim>.data(), out);
  }
}

void Rotate(const float* in, int count, int dim, float* out) {
  const auto columns = static_cast<size_t>(dim);
  if (dim <= 64) {
    RotateRows<64>(in, count, columns, out);
  } else if (dim <= 128) {
    RotateRows<128>(in, count, columns, out);
  } else if (dim <= 256) {
    RotateRows<256>(in, count, columns, out);
  } else {
    RotateRows<512>(in, count, columns, out);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(Rotate);

void Rotate(const float* in, int count, int dim, float* out) noexcept {
  HWY_DYNAMIC_DISPATCH(Rotate)(in, count, dim, out);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
