#include "kernels/cpu/convert.h"

#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/convert.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace {

template <class Element>
void Widen(const void* in, DType dtype, size_t count, float* out) {
  const FloatTag d;
  const auto* from = static_cast<const typename Element::T*>(in);
  size_t i = 0;
  for (; i + hn::Lanes(d) <= count; i += hn::Lanes(d))
    hn::StoreU(Element::Load(d, from + i), d, out + i);
  for (; i < count; ++i) out[i] = LoadElement(in, dtype, i);
}

void ToFp16(const float* in, size_t count, uint16_t* out) {
  size_t i = 0;
#if HWY_TARGET != HWY_SCALAR  // whose conversion does not round
  const FloatTag d;
  const hn::Rebind<hwy::float16_t, FloatTag> narrow;
  auto* const halves = reinterpret_cast<hwy::float16_t*>(out);
  for (; i + hn::Lanes(d) <= count; i += hn::Lanes(d)) {
    hn::StoreU(hn::DemoteTo(narrow, hn::LoadU(d, in + i)), narrow, halves + i);
  }
#endif
  for (; i < count; ++i) out[i] = FloatToFp16(in[i]);
}

void ToFloat(const void* in, DType dtype, size_t count, float* out) {
  switch (dtype) {
    case DType::kBf16:
      return Widen<Bf16>(in, dtype, count, out);
    case DType::kFp16:
      return Widen<Fp16>(in, dtype, count, out);
    case DType::kFp32:
      std::memcpy(out, in, count * sizeof(float));
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {
namespace {
HWY_EXPORT(ToFloat);
HWY_EXPORT(ToFp16);
}  // namespace

void ConvertToFloat(const void* in, DType dtype, size_t count, float* out) noexcept {
  HWY_DYNAMIC_DISPATCH(ToFloat)(in, dtype, count, out);
}
void ConvertToFp16(const float* in, size_t count, uint16_t* out) noexcept {
  HWY_DYNAMIC_DISPATCH(ToFp16)(in, count, out);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
