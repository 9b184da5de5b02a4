#include "kernels/cpu/ladder_sample.h"

#include <cassert>
#include <cmath>
#include <cstddef>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/ladder_sample.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_estimate-inl.h"
#include "kernels/cpu/ladder_lookup-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// One head of a sample.
struct OneHead {
  const SampleBlocks& sample;
  int number;
  SampleHead head;
  int gain_offset;
  const float* noises;

  const uint16_t* Gains(int b) const {
    return reinterpret_cast<const uint16_t*>(sample.codes[b] + gain_offset);
  }
  ScanHead At(int b, float reference) const {
    return {sample.centres[b][number], head.slope, head.noise * noises[b], 0.0F, reference};
  }
};

/// Writes the estimates; returns the largest.
HWY_INLINE float EstimateAll(const OneHead& head, const int16_t* sums, float* estimates) {
  const DF d;
  auto most = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int b = 0; b < head.sample.count; ++b) {
    const uint16_t* const gains = head.Gains(b);
    const ScanHead scan = head.At(b, 0.0F);
    for (int i = 0; i < kScanBlock; i += kLanes, sums += kLanes, estimates += kLanes) {
      const auto estimate = Estimate(d, scan, LoadGains(d, gains + i), sums);
      hn::StoreU(estimate, d, estimates);
      most = hn::Max(most, estimate);
    }
  }
  return hn::GetLane(hn::MaxOfLanes(d, most));
}

/// Returns the summed weight over exp(largest).
HWY_INLINE float WeighAll(const OneHead& head, const float* estimates, float largest) {
  const DF d;
  auto mass = hn::Zero(d);
  for (int b = 0; b < head.sample.count; ++b) {
    const uint16_t* const gains = head.Gains(b);
    const WeightHead weights(head.At(b, largest));
    auto sum = hn::Zero(d);
    for (int i = 0; i < kScanBlock; i += kLanes, estimates += kLanes) {
      const auto gain = LoadGains(d, gains + i);
      sum = hn::Add(sum, Weight(d, weights, hn::Mul(gain, gain), hn::LoadU(d, estimates)));
    }
    mass = hn::MulAdd(hn::Set(d, head.sample.factors[b]), sum, mass);
  }
  return hn::GetLane(hn::SumOfLanes(d, mass));
}

void SampleCodesImpl(const SampleBlocks& sample, const float* noises, int symbols, int planes,
                     const int8_t* tables, const SampleHead* heads, int count, int16_t* sums,
                     const SampleResults& results) {
  const int stride = sample.count * kScanBlock;
  const ScatteredBlocks blocks = {sample.codes, sample.count, ScanBlockBytes(symbols, planes)};
  LookUpAll(blocks, {symbols, planes}, tables, count, sums, stride);
  for (int h = 0; h < count; ++h) {
    const OneHead head = {sample, h, heads[h], ScanGainOffset(symbols, planes), noises};
    float* const estimates = results.estimates + static_cast<ptrdiff_t>(h) * results.stride;
    const float most = EstimateAll(head, sums + static_cast<ptrdiff_t>(h) * stride, estimates);
    float& largest = results.largest[h];
    if (most > largest) {
      results.mass[h] *= std::exp(largest - most);
      largest = most;
    }
    results.mass[h] += WeighAll(head, estimates, largest);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(SampleCodesImpl);

void SampleCodes(const SampleBlocks& sample, const float* noises, int symbols, int planes,
                 const int8_t* tables, const SampleHead* heads, int count, int16_t* sums,
                 const SampleResults& results) noexcept {
  assert(results.stride >= sample.count * kScanBlock);
  HWY_DYNAMIC_DISPATCH(SampleCodesImpl)
  (sample, noises, symbols, planes, tables, heads, count, sums, results);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
