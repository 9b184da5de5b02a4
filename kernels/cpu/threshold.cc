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
constexpr int64_t kPartsMax = 512;
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

/// At least `rank` values are no less: of as many strided parts as the rank, or a few more, each
/// has one that is its best, and the least of these is what is returned. The least integer if
/// `rank` is too large for that to pay.
int32_t BoundOfBest(const int32_t* order, int64_t count, int64_t rank) {
  const DI d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t parts = (rank + kPartsStep - 1) / kPartsStep * kPartsStep;
  if (parts > kPartsMax || parts * kWorthwhile > count) return std::numeric_limits<int32_t>::min();
  HWY_ALIGN int32_t best[kPartsMax] = {};
  std::copy_n(order, parts, best);
  for (int64_t i = parts; i + parts <= count; i += parts) {
    for (int64_t p = 0; p < parts; p += lanes) {
      hn::Store(hn::Max(hn::Load(d, best + p), hn::LoadU(d, order + i + p)), d, best + p);
    }
  }
  auto least = hn::Load(d, best);
  for (int64_t p = lanes; p < parts; p += lanes) least = hn::Min(least, hn::Load(d, best + p));
  return hn::GetLane(hn::MinOfLanes(d, least));
}

/// Drops values below `bound` and keeps the others in their order; returns how many are left.
int64_t KeepFrom(int32_t* order, int64_t count, int32_t bound) {
  int64_t kept = 0;
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const DI d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto limit = hn::Set(d, bound);
  for (; i + lanes <= count; i += lanes) {
    const auto value = hn::LoadU(d, order + i);
    // What is written past the kept ones has been read.
    kept += static_cast<int64_t>(
        hn::CompressStore(value, hn::Not(hn::Lt(value, limit)), d, order + kept));
  }
#endif
  for (; i < count; ++i) {
    if (order[i] >= bound) order[kept++] = order[i];
  }
  return kept;
}

float RankThresholdImpl(const float* values, int64_t count, int64_t rank, int32_t* work) {
  int32_t low = 0;   // at least `rank` values are >= low
  int32_t high = 0;  // and fewer than that are > high
  Order(values, count, work, &low, &high);
  const int32_t bound = BoundOfBest(work, count, rank);
  if (bound > low) {
    count = KeepFrom(work, count, bound);
    low = bound;
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

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {
namespace {
HWY_EXPORT(RankThresholdImpl);
}  // namespace

float RankThreshold(const float* values, int64_t count, int64_t rank, int32_t* work) noexcept {
  if (rank <= 0) return std::numeric_limits<float>::infinity();
  if (rank > count) return -std::numeric_limits<float>::infinity();
  return HWY_DYNAMIC_DISPATCH(RankThresholdImpl)(values, count, rank, work);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
