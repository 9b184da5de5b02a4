#include "kernels/cpu/threshold.h"

#include <algorithm>
#include <bit>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/threshold.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#ifndef KVSEEK_KERNELS_CPU_THRESHOLD_CC_
#define KVSEEK_KERNELS_CPU_THRESHOLD_CC_
namespace kvseek::kernels {

/// Maps the bits of floats to integers of the same order, and back: it is its own inverse.
constexpr int32_t ToOrder(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

}  // namespace kvseek::kernels
#endif  // KVSEEK_KERNELS_CPU_THRESHOLD_CC_

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using DI = hn::ScalableTag<int32_t>;
// Parts are the same at every level: a number that the lanes of all of them divide.
constexpr int64_t kPartsStep = 16;
constexpr int64_t kPartsMax = 1024;
constexpr int64_t kWorthwhile = 4;  // at least so many values a part

/// Writes the ordered integers of all values to `work` and finds the least and the largest.
void Order(const float* values, int64_t count, int32_t* work, int32_t* least, int32_t* largest) {
  const DI d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto* bits = reinterpret_cast<const int32_t*>(values);
  *least = std::numeric_limits<int32_t>::max();
  *largest = std::numeric_limits<int32_t>::min();
  int64_t i = 0;
  if (count >= lanes) {
    auto low = hn::Set(d, *least);
    auto high = hn::Set(d, *largest);
    for (; i + lanes <= count; i += lanes) {
      const auto value = hn::LoadU(d, bits + i);
      const auto magnitude = hn::Set(d, 0x7fffffff);
      const auto order = hn::Xor(value, hn::And(hn::BroadcastSignBit(value), magnitude));
      hn::StoreU(order, d, work + i);
      low = hn::Min(low, order);
      high = hn::Max(high, order);
    }
    *least = hn::GetLane(hn::MinOfLanes(d, low));
    *largest = hn::GetLane(hn::MaxOfLanes(d, high));
  }
  for (; i < count; ++i) {
    work[i] = ToOrder(bits[i]);
    *least = std::min(*least, work[i]);
    *largest = std::max(*largest, work[i]);
  }
}

/// How many of `order` are >= bound.
int64_t CountFrom(const int32_t* order, int64_t count, int32_t bound) {
  const DI d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto limit = hn::Set(d, bound);
  int64_t less = 0;
  int64_t i = 0;
  // -1 in each lane that is less; two sums hide the latency.
  auto sum0 = hn::Zero(d);
  auto sum1 = hn::Zero(d);
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    sum0 = hn::Add(sum0, hn::VecFromMask(d, hn::Lt(hn::LoadU(d, order + i), limit)));
    sum1 = hn::Add(sum1, hn::VecFromMask(d, hn::Lt(hn::LoadU(d, order + i + lanes), limit)));
  }
  less -= hn::GetLane(hn::SumOfLanes(d, hn::Add(sum0, sum1)));
  for (; i < count; ++i) less += order[i] < bound ? 1 : 0;
  return count - less;
}

/// The integers of the values at `bits`.
HWY_INLINE hn::Vec<DI> LoadOrder(const int32_t* bits) {
  const DI d;
  const auto value = hn::LoadU(d, bits);
  return hn::Xor(value, hn::And(hn::BroadcastSignBit(value), hn::Set(d, 0x7fffffff)));
}

/// Where bisection begins: at least `rank` values are >= least, and none is > largest. Of as many
/// strided parts as the rank, or a few more, each has one that is its best; `least` is the least of
/// these. False if `rank` is too large for that to pay.
bool BoundBest(const int32_t* bits, int64_t count, int64_t rank, int32_t* least, int32_t* largest) {
  const DI d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t parts = (rank + kPartsStep - 1) / kPartsStep * kPartsStep;
  if (parts > kPartsMax || parts * kWorthwhile > count) return false;
  const int64_t whole = count / parts * parts;
  auto low = hn::Set(d, std::numeric_limits<int32_t>::max());
  auto high = hn::Set(d, std::numeric_limits<int32_t>::min());
  // Four vectors of parts at a time stay in registers.
  constexpr int64_t kStrip = 4;
  int64_t p = 0;
  for (; p + kStrip * lanes <= parts; p += kStrip * lanes) {
    hn::Vec<DI> most[kStrip];
    for (int64_t v = 0; v < kStrip; ++v) most[v] = LoadOrder(bits + p + v * lanes);
    for (int64_t i = p + parts; i < whole; i += parts) {
      for (int64_t v = 0; v < kStrip; ++v) {
        most[v] = hn::Max(most[v], LoadOrder(bits + i + v * lanes));
      }
    }
    for (int64_t v = 0; v < kStrip; ++v) {
      low = hn::Min(low, most[v]);
      high = hn::Max(high, most[v]);
    }
  }
  for (; p < parts; p += lanes) {
    auto most = LoadOrder(bits + p);
    for (int64_t i = p + parts; i < whole; i += parts) most = hn::Max(most, LoadOrder(bits + i));
    low = hn::Min(low, most);
    high = hn::Max(high, most);
  }
  *least = hn::GetLane(hn::MinOfLanes(d, low));
  *largest = hn::GetLane(hn::MaxOfLanes(d, high));
  for (int64_t i = whole; i < count; ++i) *largest = std::max(*largest, ToOrder(bits[i]));
  return true;
}

#if HWY_TARGET != HWY_SCALAR
/// Writes the kept lanes to `next`, in their order, and returns the end of them; behind it, no
/// further than all lanes go, anything.
template <class D, class T = hn::TFromD<D>>
HWY_INLINE T* StoreKept(D d, hn::Vec<D> values, hn::Mask<D> keeps, T* next) {
#if HWY_TARGET <= HWY_AVX3 || HWY_HAVE_SCALABLE
  // No branch on whether there is any: it would be guessed wrong too often.
  hn::StoreU(hn::Compress(values, keeps), d, next);
  return next + hn::CountTrue(d, keeps);
#else
  // Compressing takes many instructions, and few are kept.
  uint8_t bytes[8] = {};  // a bit for each lane
  hn::StoreMaskBits(d, keeps, bytes);
  uint32_t left = bytes[0];
  static_assert(hn::MaxLanes(D()) <= 8);
  if (left == 0) return next;
  HWY_ALIGN T lanes[hn::MaxLanes(D())];
  hn::Store(values, d, lanes);
  for (; left != 0; left &= left - 1) *next++ = lanes[std::countr_zero(left)];
  return next;
#endif
}
#endif

/// Writes the integers of the values that are no less than `bound` to `kept`, in their order;
/// returns how many.
int64_t KeepFrom(const int32_t* bits, int64_t count, int32_t bound, int32_t* kept) {
  int32_t* next = kept;
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const DI d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto limit = hn::Set(d, bound);
  for (; i + lanes <= count; i += lanes) {
    const auto order = LoadOrder(bits + i);
    next = StoreKept(d, order, hn::Not(hn::Lt(order, limit)), next);
  }
#endif
  for (; i < count; ++i) {
    if (ToOrder(bits[i]) >= bound) *next++ = ToOrder(bits[i]);
  }
  return next - kept;
}

float RankThresholdImpl(const float* values, int64_t count, int64_t rank, int32_t* work) {
  const auto* const bits = reinterpret_cast<const int32_t*>(values);
  int32_t low = 0;   // at least `rank` values are >= low
  int32_t high = 0;  // and fewer than that are > high
  if (BoundBest(bits, count, rank, &low, &high)) {
    count = KeepFrom(bits, count, low, work);
  } else {
    Order(values, count, work, &low, &high);
  }
  while (low < high) {
    const auto middle = static_cast<int32_t>((int64_t{low} + high + 1) >> 1);
    const int64_t found = CountFrom(work, count, middle);
    if (found == rank) return std::bit_cast<float>(ToOrder(middle));
    if (found > rank) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return std::bit_cast<float>(ToOrder(low));
}

int64_t IndicesFromImpl(const float* values, int64_t count, float threshold, uint32_t* indices) {
  uint32_t* next = indices;
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::ScalableTag<float> df;
  const hn::RebindToUnsigned<decltype(df)> du;
  const auto lanes = static_cast<int64_t>(hn::Lanes(df));
  const auto limit = hn::Set(df, threshold);
  auto index = hn::Iota(du, 0);
  for (; i + lanes <= count; i += lanes) {
    const auto reaches = hn::RebindMask(du, hn::Ge(hn::LoadU(df, values + i), limit));
    next = StoreKept(du, index, reaches, next);
    index = hn::Add(index, hn::Set(du, static_cast<uint32_t>(lanes)));
  }
#endif
  for (; i < count; ++i) {
    if (values[i] >= threshold) *next++ = static_cast<uint32_t>(i);
  }
  return next - indices;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {
namespace {
HWY_EXPORT(RankThresholdImpl);
HWY_EXPORT(IndicesFromImpl);
}  // namespace

float RankThreshold(const float* values, int64_t count, int64_t rank, int32_t* work) noexcept {
  if (rank <= 0) return std::numeric_limits<float>::infinity();
  if (rank > count) return -std::numeric_limits<float>::infinity();
  return HWY_DYNAMIC_DISPATCH(RankThresholdImpl)(values, count, rank, work);
}

int64_t IndicesFrom(const float* values, int64_t count, float threshold,
                    uint32_t* indices) noexcept {
  return HWY_DYNAMIC_DISPATCH(IndicesFromImpl)(values, count, threshold, indices);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
