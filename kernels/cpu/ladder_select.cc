#include "kernels/cpu/ladder_select.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstddef>

#include "kernels/cpu/ladder_codes.h"
#include "kernels/cpu/log_bits.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/ladder_select.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_estimate-inl.h"
#include "kernels/cpu/ladder_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kHeadsMax = 64;

void EstimateScoresImpl(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                        int symbols, int planes, const ScanHead* scan_heads, int heads,
                        float* estimates, int estimates_stride, float* weights) {
  const DF d;
  const int block_bytes = ScanBlockBytes(symbols, planes);
  for (int b = 0; b < blocks; ++b) {
    const auto* gains = reinterpret_cast<const uint16_t*>(
        codes + static_cast<ptrdiff_t>(b) * block_bytes + ScanGainOffset(symbols, planes));
    for (int i = 0; i < kScanBlock; i += kLanes) {
      const auto gain = LoadGains(d, gains + i);
      const auto gain2 = hn::Mul(gain, gain);
      const int key = b * kScanBlock + i;
      for (int h = 0; h < heads; ++h) {
        const ptrdiff_t at = static_cast<ptrdiff_t>(h) * estimates_stride + key;
        const auto estimate =
            Estimate(d, scan_heads[h], gain, sums + static_cast<ptrdiff_t>(h) * sums_stride + key);
        hn::StoreU(estimate, d, estimates + at);
        if (weights == nullptr) continue;
        hn::StoreU(Weight(d, WeightHead(scan_heads[h]), gain2, estimate), d, weights + at);
      }
    }
  }
}

/// What a call of SelectAndWeigh is about.
struct Selection {
  const int16_t* sums;
  int sums_stride;
  const ScanHead* scan_heads;
  int heads;
  float* block_weights;
  int weights_stride;
  float largest_sum;
};

/// What an estimate in single precision needs of vector v of a block.
HWY_INLINE hn::Vec<DF> EstimateWide(DF d, const Selection& selection, int h, int block, int v,
                                    hn::Vec<DF> gain) {
  const int16_t* const sums = selection.sums + static_cast<ptrdiff_t>(h) * selection.sums_stride +
                              static_cast<ptrdiff_t>(block) * kScanBlock + v * kLanes;
  return Estimate(d, selection.scan_heads[h], gain, sums);
}

/// Which keys of one vector some head chooses, by estimates in single precision.
HWY_INLINE hn::Mask<DF> AnyWide(DF d, const Selection& selection, int block, int v,
                                hn::Vec<DF> gain) {
  auto any = hn::MaskFromVec(hn::Zero(d));
  for (int h = 0; h < selection.heads; ++h) {
    const auto threshold = hn::Set(d, selection.scan_heads[h].threshold);
    any = hn::Or(any, hn::Gt(EstimateWide(d, selection, h, block, v, gain), threshold));
  }
  return any;
}

/// One block in single precision: which keys are chosen.
HWY_INLINE uint64_t ChooseWide(const Selection& selection, int block, const uint16_t* gains) {
  const DF d;
  constexpr int kVectors = kScanBlock / kLanes;
  hn::Mask<DF> any[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    any[v] = AnyWide(d, selection, block, v, LoadGains(d, gains + v * kLanes));
  }
  return MaskBits(d, any);
}

/// Every head's weight of the keys of one block that are not chosen: weights[h * weights_stride].
HWY_INLINE void WeighWide(const Selection& selection, int block, const uint16_t* gains,
                          float* weights) {
  const DF d;
  constexpr int kVectors = kScanBlock / kLanes;
  hn::Vec<DF> gain[kVectors];
  hn::Mask<DF> any[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    gain[v] = LoadGains(d, gains + v * kLanes);
    any[v] = AnyWide(d, selection, block, v, gain[v]);
  }
  for (int h = 0; h < selection.heads; ++h) {
    const WeightHead weight_head(selection.scan_heads[h]);
    auto total = hn::Zero(d);
    for (int v = 0; v < kVectors; ++v) {
      const auto estimate = EstimateWide(d, selection, h, block, v, gain[v]);
      const auto weight = Weight(d, weight_head, hn::Mul(gain[v], gain[v]), estimate);
      total = hn::IfThenElse(any[v], total, hn::Add(total, weight));
    }
    weights[static_cast<ptrdiff_t>(h) * selection.weights_stride] =
        hn::GetLane(hn::SumOfLanes(d, total));
  }
}

// In 16 bits, scores are relative to a head's reference, in the units of log_bits.h.
using DI16 = hn::ScalableTag<int16_t>;
constexpr int kLanes16 = static_cast<int>(hn::MaxLanes(DI16()));
constexpr int kFixedOne = 32767;    ///< 1 for MulFixedPoint15
constexpr int kFixedBound = 32000;  ///< on scores
constexpr int kFixedMax = static_cast<int>(kExponentMax * kLogNat);
constexpr int kExponentBias = kLogOne - 7;
constexpr float kLeftOver = 0.99805F;  ///< kLogExcess is 7.36, of which the bias has 7
constexpr int kFixedBlocks = 16;       ///< at a time

struct FixedHead {
  int16_t centre;  ///< relative to the reference
  int16_t slope;   ///< of shifted sum times gain
  int16_t half_noise2;
  int16_t bound;  ///< a key is chosen when its shifted sum times gain exceeds it
};

/// The largest x such that (x * slope + 2^14) >> 15, as MulFixedPoint15, is no more than `score`.
HWY_INLINE int16_t LargestBelow(int score, int slope) {
  constexpr int kLimit = 32767;
  if (slope == 0) return static_cast<int16_t>(score < 0 ? -kLimit - 1 : kLimit);
  const int64_t product = (int64_t{score} + 1) * (kLimit + 1) - (kLimit + 1) / 2 - 1;
  const int64_t floor = product >= 0 ? product / slope : -((slope - 1 - product) / slope);
  return static_cast<int16_t>(std::clamp<int64_t>(floor, -kLimit - 1, kLimit));
}

/// Of the gains of consecutive blocks.
struct GainRange {
  float largest;
  float scale;   ///< a power of two above the largest: 1 of the fixed gains
  int exponent;  ///< of the largest, as it stands in its bits
};

/// False if 16 bits do not hold the head's scores.
HWY_INLINE bool MakeFixedHead(const ScanHead& head, const GainRange& gains, float largest_sum,
                              int shift, FixedHead& fixed) {
  const float centre = (head.centre - head.reference) * kLogNat;
  const float largest = head.slope * gains.largest * largest_sum * kLogNat;
  const float slope =
      head.slope * gains.scale * kLogNat / static_cast<float>(1 << shift) * kFixedOne;
  const float noise = head.noise * gains.scale;
  const float half_noise2 = 0.5F * noise * noise * kLogNat;
  if (!(std::abs(centre) + largest < kFixedBound) || !(slope < kFixedOne) ||
      !(half_noise2 < kFixedOne)) {
    return false;
  }
  const float threshold = (head.threshold - head.reference) * kLogNat;
  constexpr float kLimit = 32767.0F;
  fixed = {static_cast<int16_t>(std::lrint(centre)), static_cast<int16_t>(std::lrint(slope)),
           static_cast<int16_t>(std::lrint(half_noise2)), 0};
  const auto score = static_cast<int>(std::lrint(std::clamp(threshold, -kLimit, kLimit)));
  fixed.bound = LargestBelow(score - fixed.centre, fixed.slope);
  return true;
}

/// Of `blocks` blocks, which stand block_bytes apart.
HWY_INLINE GainRange RangeOf(const uint8_t* gains, int blocks, int block_bytes) {
  const DI16 d;  // bf16 numbers above zero are ordered as their bits are
  auto most = hn::Zero(d);
  for (int b = 0; b < blocks; ++b, gains += block_bytes) {
    for (int i = 0; i < kScanBlock; i += kLanes16) {
      most = hn::Max(most, hn::LoadU(d, reinterpret_cast<const int16_t*>(gains) + i));
    }
  }
  HWY_ALIGN int16_t lanes[kLanes16];
  hn::Store(most, d, lanes);
  // Not zero, so that a gain of zero is below all that FixGains tells from it.
  constexpr int16_t kLeast = 32 << 7;
  const auto bits =
      static_cast<uint32_t>(std::max(*std::max_element(lanes, lanes + kLanes16), kLeast));
  const uint32_t exponent = bits >> 7;
  return {std::bit_cast<float>(bits << 16), std::bit_cast<float>((exponent + 1) << 23),
          static_cast<int>(exponent)};
}

/// 64 gains as 15-bit fractions of the range's scale: exact down to 2^-7 of it, since a gain has
/// eight bits.
HWY_INLINE void FixGains(const uint16_t* gains, const GainRange& range, int16_t* fixed) {
  const hn::RebindToUnsigned<DI16> d;
  const auto exponent = hn::Set(d, static_cast<uint16_t>(range.exponent));
  for (int i = 0; i < kScanBlock; i += kLanes16) {
    const auto bits = hn::LoadU(d, gains + i);
    const auto mantissa = hn::Or(hn::And(bits, hn::Set(d, 0x7f)), hn::Set(d, 0x80));
    const auto below = hn::Min(hn::Sub(exponent, hn::ShiftRight<7>(bits)), hn::Set(d, 15));
    const auto fraction = hn::Shr(hn::ShiftLeft<7>(mantissa), below);
    hn::StoreU(hn::BitCast(DI16(), fraction), DI16(), fixed + i);
  }
}

/// Sum of 64 weights given as bits, without those of keys in `any`.
template <class M>
HWY_INLINE hn::Vec<DF> SumWeights(const int16_t* bits, const M* any) {
  const DI16 d16;
  const DF d;
  auto total = hn::Zero(d);
  for (int v = 0; v < kScanBlock / kLanes16; ++v) {
    const auto kept = hn::IfThenZeroElse(any[v], hn::Load(d16, bits + v * kLanes16));
    total = hn::Add(total, SumPairs(d, kept));
  }
  return hn::Mul(total, hn::Set(d, kLeftOver));
}

/// kLanes16 sums times their gains, for one head.
template <int kShift>
HWY_INLINE hn::Vec<DI16> GainedSums(const Selection& selection, int h, int block, int v,
                                    hn::Vec<DI16> gain) {
  const int16_t* const sums = selection.sums + static_cast<ptrdiff_t>(h) * selection.sums_stride +
                              static_cast<ptrdiff_t>(block) * kScanBlock + v * kLanes16;
  return hn::MulFixedPoint15(hn::ShiftLeft<kShift>(hn::LoadU(DI16(), sums)), gain);
}

/// One block in 16 bits; `gains`: its fixed gains; `bounds`: (heads, kLanes16), each head's in all
/// lanes.
template <int kShift>
HWY_INLINE uint64_t ChooseFixed(const Selection& selection, const int16_t* bounds, int block,
                                const int16_t* gains) {
  const DI16 d;
  constexpr int kVectors = kScanBlock / kLanes16;
  hn::Vec<DI16> gain[kVectors];
  hn::Mask<DI16> any[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    gain[v] = hn::LoadU(d, gains + v * kLanes16);
    any[v] = hn::MaskFromVec(hn::Zero(d));
  }
  for (int h = 0; h < selection.heads; ++h) {
    const auto bound = hn::Load(d, bounds + h * kLanes16);
    for (int v = 0; v < kVectors; ++v) {
      const auto gained = GainedSums<kShift>(selection, h, block, v, gain[v]);
      any[v] = hn::Or(any[v], hn::Gt(gained, bound));
    }
  }
  return MaskBits(d, any);
}

/// As WeighWide; returns which keys are chosen.
template <int kShift>
HWY_INLINE uint64_t WeighFixed(const Selection& selection, const FixedHead* fixed_heads, int block,
                               const int16_t* gains, float* weights) {
  const DI16 d;
  constexpr int kVectors = kScanBlock / kLanes16;
  HWY_ALIGN int16_t bits[kHeadsMax * kScanBlock];
  hn::Vec<DI16> gain[kVectors];
  hn::Vec<DI16> gain2[kVectors];
  hn::Mask<DI16> any[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    gain[v] = hn::LoadU(d, gains + v * kLanes16);
    gain2[v] = hn::MulFixedPoint15(gain[v], gain[v]);
    any[v] = hn::MaskFromVec(hn::Zero(d));
  }
  const auto least = hn::Set(d, static_cast<int16_t>(kLogLeast - kLogOne));
  const auto most = hn::Set(d, static_cast<int16_t>(kFixedMax));
  const auto bias = hn::Set(d, static_cast<int16_t>(kExponentBias));
  const int heads = selection.heads;
  for (int h = 0; h < heads; ++h) {
    const auto centre = hn::Set(d, fixed_heads[h].centre);
    const auto slope = hn::Set(d, fixed_heads[h].slope);
    const auto half_noise2 = hn::Set(d, fixed_heads[h].half_noise2);
    const auto bound = hn::Set(d, fixed_heads[h].bound);
    for (int v = 0; v < kVectors; ++v) {
      const auto gained = GainedSums<kShift>(selection, h, block, v, gain[v]);
      any[v] = hn::Or(any[v], hn::Gt(gained, bound));
      const auto score = hn::Add(hn::MulFixedPoint15(gained, slope), centre);
      const auto exponent = hn::SaturatedSub(score, hn::MulFixedPoint15(gain2[v], half_noise2));
      const auto weight = hn::Add(hn::Min(hn::Max(exponent, least), most), bias);
      hn::Store(weight, d, bits + h * kScanBlock + v * kLanes16);
    }
  }
  const DF df;
  for (int h = 0; h < heads; h += 4) {
    hn::Vec<DF> totals[4] = {hn::Zero(df), hn::Zero(df), hn::Zero(df), hn::Zero(df)};
    const int some = std::min(4, heads - h);
    for (int j = 0; j < some; ++j) totals[j] = SumWeights(bits + (h + j) * kScanBlock, any);
    float sums_of_four[4];
    SumFour(df, totals, sums_of_four);
    for (int j = 0; j < some; ++j) {
      weights[static_cast<ptrdiff_t>(h + j) * selection.weights_stride] = sums_of_four[j];
    }
  }
  return MaskBits(d, any);
}

/// Up to kFixedBlocks blocks of a call.
struct SomeBlocks {
  const uint8_t* gains;  ///< of the first block
  const uint8_t* next_codes;
  int block_bytes;
  int first;
  int count;
  WeighedBlocks weighed;  ///< of the call's
  uint32_t first_index;
};

template <int kShift>
HWY_INLINE int SelectSome(const Selection& selection, const SomeBlocks& some, uint32_t* chosen) {
  const GainRange range = RangeOf(some.gains, some.count, some.block_bytes);
  FixedHead fixed_heads[kHeadsMax];
  bool fits = true;
  for (int h = 0; h < selection.heads; ++h) {
    fits = MakeFixedHead(selection.scan_heads[h], range, selection.largest_sum, kShift,
                         fixed_heads[h]) &&
           fits;
  }
  HWY_ALIGN int16_t bounds[kHeadsMax * kLanes16];
  for (int h = 0; h < selection.heads; ++h) {
    hn::Store(hn::Set(DI16(), fixed_heads[h].bound), DI16(), bounds + h * kLanes16);
  }
  const auto gains_of = [&](int b) {
    return reinterpret_cast<const uint16_t*>(some.gains +
                                             static_cast<ptrdiff_t>(b) * some.block_bytes);
  };
  // All of them first: a load waits long for narrower stores just before it.
  HWY_ALIGN int16_t fixed_gains[kFixedBlocks * kScanBlock];
  for (int b = 0; b < some.count && fits; ++b) {
    FixGains(gains_of(b), range, fixed_gains + b * kScanBlock);
  }
  const WeighedBlocks& weighed = some.weighed;
  const bool weighs_all = fits && weighed.step == 1;  // one look at the sums is enough
  int count = 0;
  BlockIndices indices(some.first_index);
  for (int b = 0; b < some.count; ++b) {
    if (some.next_codes != nullptr) {  // the half that ScanCodes left
      const uint8_t* next = some.next_codes + static_cast<ptrdiff_t>(b) * some.block_bytes;
      for (int i = some.block_bytes / 2; i < some.block_bytes; i += 64) {
        __builtin_prefetch(next + i, 0, 2);
      }
    }
    const int block = some.first + b;
    const int16_t* const gains = fixed_gains + b * kScanBlock;
    uint64_t bits;
    if (!fits) {
      bits = ChooseWide(selection, block, gains_of(b));
    } else if (weighs_all) {
      bits =
          WeighFixed<kShift>(selection, fixed_heads, block, gains, selection.block_weights + block);
    } else {
      bits = ChooseFixed<kShift>(selection, bounds, block, gains);
    }
    count += indices.Put(bits, chosen + count);
  }
  if (weighs_all) return count;
  int w = weighed.first >= some.first ? 0 : weighed.Count(some.first);
  for (; weighed.first + w * weighed.step < some.first + some.count; ++w) {
    const int block = weighed.first + w * weighed.step;
    const int b = block - some.first;
    if (fits) {
      WeighFixed<kShift>(selection, fixed_heads, block, fixed_gains + b * kScanBlock,
                         selection.block_weights + w);
    } else {
      WeighWide(selection, block, gains_of(b), selection.block_weights + w);
    }
  }
  return count;
}

int SelectAndWeighImpl(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                       WeighedBlocks weighed, int symbols, int planes, const ScanHead* scan_heads,
                       int heads, uint32_t first_index, uint32_t* chosen, float* block_weights,
                       int weights_stride, const uint8_t* next_codes) {
  const int block_bytes = ScanBlockBytes(symbols, planes);
  const int largest_sum = kTableMax * symbols * (planes == 1 ? 1 : 3);
  const Selection selection = {sums,
                               sums_stride,
                               scan_heads,
                               heads,
                               block_weights,
                               weights_stride,
                               static_cast<float>(largest_sum)};
  codes += ScanGainOffset(symbols, planes);
  int count = 0;
  for (int b = 0; b < blocks; b += kFixedBlocks) {
    const ptrdiff_t offset = static_cast<ptrdiff_t>(b) * block_bytes;
    const SomeBlocks some = {codes + offset,
                             next_codes == nullptr ? nullptr : next_codes + offset,
                             block_bytes,
                             b,
                             std::min(kFixedBlocks, blocks - b),
                             weighed,
                             first_index + static_cast<uint32_t>(b * kScanBlock)};
    // Sums go as far to the left as the largest allows.
    if (largest_sum < 1 << 10) {
      count += SelectSome<5>(selection, some, chosen + count);
    } else if (largest_sum < 1 << 11) {
      count += SelectSome<4>(selection, some, chosen + count);
    } else if (largest_sum < 1 << 12) {
      count += SelectSome<3>(selection, some, chosen + count);
    } else {
      count += SelectSome<2>(selection, some, chosen + count);
    }
  }
  return count;
}
}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(EstimateScoresImpl);
HWY_EXPORT(SelectAndWeighImpl);

void EstimateScores(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                    int symbols, int planes, const ScanHead* scan_heads, int heads,
                    float* estimates, int estimates_stride, float* weights) noexcept {
  HWY_DYNAMIC_DISPATCH(EstimateScoresImpl)
  (sums, sums_stride, codes, blocks, symbols, planes, scan_heads, heads, estimates,
   estimates_stride, weights);
}

int SelectAndWeigh(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                   WeighedBlocks weighed, int symbols, int planes, const ScanHead* scan_heads,
                   int heads, uint32_t first_index, uint32_t* chosen, float* block_weights,
                   int weights_stride, const uint8_t* next_codes) noexcept {
  assert(heads <= 64);
  assert(weighed.step >= 1 && weighed.first < std::min(weighed.step, std::max(blocks, 1)));
  return HWY_DYNAMIC_DISPATCH(SelectAndWeighImpl)(
      sums, sums_stride, codes, blocks, weighed, symbols, planes, scan_heads, heads, first_index,
      chosen, block_weights, weights_stride, next_codes);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
