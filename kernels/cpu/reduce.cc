#include "kernels/cpu/reduce.h"

#include <cstddef>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/reduce.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;

float MaxElementImpl(const float* values, int count) {
  const D d;
  const auto lanes = static_cast<int>(hn::Lanes(d));
  float best = -std::numeric_limits<float>::infinity();
  int i = 0;
  if (count >= lanes) {
    auto largest = hn::LoadU(d, values);
    for (i = lanes; i + lanes <= count; i += lanes) {
      largest = hn::Max(largest, hn::LoadU(d, values + i));
    }
    best = hn::GetLane(hn::MaxOfLanes(d, largest));
  }
  for (; i < count; ++i) best = values[i] > best ? values[i] : best;
  return best;
}

void MaxOfShiftedImpl(const float* rows, int stride, int heads, const float* shifts,
                      const float* bounds, int count, float* out) {
  const D d;
  const auto lanes = static_cast<int>(hn::Lanes(d));
  const float infinity = std::numeric_limits<float>::infinity();
  int i = 0;
  for (; i + lanes <= count; i += lanes) {
    const float* row = rows + i;
    auto value = hn::LoadU(d, row);
    auto best = hn::Sub(value, hn::Set(d, shifts[0]));
    auto over = hn::Gt(value, hn::Set(d, bounds[0]));
    for (int h = 1; h < heads; ++h) {
      row += stride;
      value = hn::LoadU(d, row);
      best = hn::Max(best, hn::Sub(value, hn::Set(d, shifts[h])));
      over = hn::Or(over, hn::Gt(value, hn::Set(d, bounds[h])));
    }
    hn::StoreU(hn::IfThenElse(over, hn::Set(d, infinity), best), d, out + i);
  }
  for (; i < count; ++i) {
    float best = -infinity;
    for (int h = 0; h < heads; ++h) {
      const float value = rows[static_cast<ptrdiff_t>(h) * stride + i];
      const float shifted = value > bounds[h] ? infinity : value - shifts[h];
      best = shifted > best ? shifted : best;
    }
    out[i] = best;
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {
namespace {
HWY_EXPORT(MaxElementImpl);
HWY_EXPORT(MaxOfShiftedImpl);
}  // namespace

float MaxElement(const float* values, int count) noexcept {
  return HWY_DYNAMIC_DISPATCH(MaxElementImpl)(values, count);
}

void MaxOfShifted(const float* rows, int stride, int heads, const float* shifts,
                  const float* bounds, int count, float* out) noexcept {
  HWY_DYNAMIC_DISPATCH(MaxOfShiftedImpl)(rows, stride, heads, shifts, bounds, count, out);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
