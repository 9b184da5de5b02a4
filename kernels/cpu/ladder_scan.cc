#include "kernels/cpu/ladder_scan.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "kernels/cpu/ladder_codes.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/ladder_scan.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_exp-inl.h"
#include "kernels/cpu/ladder_lanes-inl.h"
#include "kernels/cpu/ladder_lookup-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
constexpr float kExponentMax = 80.0F;
constexpr int kHeadsMax = 64;

/// One symbol's table: round(sum_b +-q[b]) for q in table units.
HWY_INLINE void FillTable(const float* q, int8_t* table) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<int8_t, DF> d8;
  const auto rounding = hn::Set(d, 12582912.0F);
  const auto limit = hn::Set(di, kTableMax);
  const auto step = hn::Set(di, kLanes);
  const auto one = hn::Set(di, 1);
  auto symbol = hn::Iota(di, 0);
  for (int s = 0; s < kTableSize; s += kLanes, symbol = hn::Add(symbol, step)) {
    auto sum = hn::Zero(d);
    auto bit = one;
    for (int b = 0; b < kSymbolBits; ++b, bit = hn::Add(bit, bit)) {
      const auto value = hn::Set(d, q[b]);
      const auto set =
          hn::MaskFromVec(hn::BitCast(d, hn::VecFromMask(di, hn::TestBit(symbol, bit))));
      sum = hn::Add(sum, hn::IfThenElse(set, value, hn::Neg(value)));
    }
    const auto rounded = hn::ConvertTo(di, hn::Sub(hn::Add(sum, rounding), rounding));
    const auto entry = hn::Max(hn::Min(rounded, limit), hn::Neg(limit));
    hn::StoreU(hn::DemoteTo(d8, entry), d8, table + s);
  }
}

void BuildTablesImpl(const float* rotated_queries, int heads, int padded_dim, int8_t* tables,
                     float* units) {
  const int symbols = Symbols(padded_dim);
  for (int h = 0; h < heads; ++h, rotated_queries += padded_dim) {
    float q[512 + kSymbolBits] = {};
    float largest = 0.0F;
    for (int g = 0; g < symbols; ++g) {
      float total = 0.0F;
      for (int i = g * kSymbolBits; i < std::min((g + 1) * kSymbolBits, padded_dim); ++i) {
        total += std::abs(rotated_queries[i]);
      }
      largest = std::max(largest, total);
    }
    units[h] = largest / static_cast<float>(kTableMax);
    // Below that the inverse is infinite; such a query scores nothing.
    if (units[h] < 1e-37F) units[h] = 0.0F;
    const float inverse = units[h] == 0.0F ? 0.0F : 1.0F / units[h];
    for (int i = 0; i < padded_dim; ++i) q[i] = rotated_queries[i] * inverse;
    for (int g = 0; g < symbols; ++g, tables += kTableSize) FillTable(q + g * kSymbolBits, tables);
  }
}

void ScanCodesImpl(const uint8_t* codes, int blocks, int symbols, int planes, const int8_t* tables,
                   int heads, int16_t* sums, int sums_stride, const uint8_t* next_codes) {
  ScanShape shape = {blocks, symbols, planes, ScanBlockBytes(symbols, planes), next_codes};
  for (int h = 0; h < heads; h += kLookupHeads, shape.next = nullptr) {
    LookUpHeads(codes, shape, tables + static_cast<ptrdiff_t>(h) * symbols * kTableSize,
                std::min(kLookupHeads, heads - h), sums + static_cast<ptrdiff_t>(h) * sums_stride,
                sums_stride);
  }
}

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
  WeightHead() = default;
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

/// Keys of one block that some head chooses, as bits. `any`: masks of its vectors.
template <class D, class M>
HWY_INLINE uint64_t MaskBits(D d, const M* any) {
  constexpr int kLanesOfD = static_cast<int>(hn::MaxLanes(D()));
#if HWY_TARGET <= HWY_AVX3
  (void)d;
  uint64_t bits = 0;
  for (int v = 0; v < kScanBlock / kLanesOfD; ++v) {
    bits |= static_cast<uint64_t>(any[v].raw) << (v * kLanesOfD);
  }
#else
  uint8_t bytes[kScanBlock / 8] = {};
  for (int v = 0; v < kScanBlock / kLanesOfD; ++v) PutMaskBits(d, any[v], v * kLanesOfD, bytes);
  uint64_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
#endif
  return bits;
}

/// Writes first_index + i for every set bit i; returns how many there are.
HWY_INLINE int PutIndices(uint64_t bits, uint32_t first_index, uint32_t* chosen) {
  const int count = std::popcount(bits);
#if HWY_TARGET <= HWY_AVX3
  // Without branches: how many there are cannot be foreseen.
  __m512i indices =
      _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first_index)),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int v = 0; v < 4; ++v, bits >>= 16) {
    const auto mask = static_cast<__mmask16>(bits);
    // Sixteen always: there is room for all keys of the block.
    _mm512_storeu_si512(chosen, _mm512_maskz_compress_epi32(mask, indices));
    chosen += std::popcount(static_cast<uint32_t>(mask));
    indices = _mm512_add_epi32(indices, _mm512_set1_epi32(16));
  }
#else
  for (; bits != 0; bits &= bits - 1) {
    *chosen++ = first_index + static_cast<uint32_t>(std::countr_zero(bits));
  }
#endif
  return count;
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

/// One block in single precision: which keys are chosen, and every head's weight of the others.
HWY_INLINE int SelectWide(const Selection& selection, int block, const uint16_t* gains,
                          uint32_t first_index, uint32_t* chosen) {
  const DF d;
  constexpr int kVectors = kScanBlock / kLanes;
  HWY_ALIGN float estimates[kHeadsMax * kScanBlock];
  hn::Vec<DF> gain[kVectors];
  hn::Mask<DF> any[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    gain[v] = LoadGains(d, gains + v * kLanes);
    any[v] = hn::MaskFromVec(hn::Zero(d));
  }
  const int heads = selection.heads;
  for (int h = 0; h < heads; ++h) {
    const int16_t* head_sums = selection.sums + static_cast<ptrdiff_t>(h) * selection.sums_stride +
                               static_cast<ptrdiff_t>(block) * kScanBlock;
    const auto threshold = hn::Set(d, selection.scan_heads[h].threshold);
    for (int v = 0; v < kVectors; ++v) {
      const auto estimate = Estimate(d, selection.scan_heads[h], gain[v], head_sums + v * kLanes);
      any[v] = hn::Or(any[v], hn::Gt(estimate, threshold));
      hn::Store(estimate, d, estimates + h * kScanBlock + v * kLanes);
    }
  }
  const int count = PutIndices(MaskBits(d, any), first_index, chosen);
  for (int v = 0; v < kVectors; ++v) gain[v] = hn::Mul(gain[v], gain[v]);
  for (int h = 0; h < heads; ++h) {
    const WeightHead weight_head(selection.scan_heads[h]);
    auto total = hn::Zero(d);
    for (int v = 0; v < kVectors; ++v) {
      const auto estimate = hn::Load(d, estimates + h * kScanBlock + v * kLanes);
      const auto weight = Weight(d, weight_head, gain[v], estimate);
      total = hn::IfThenElse(any[v], total, hn::Add(total, weight));
    }
    selection.block_weights[static_cast<ptrdiff_t>(h) * selection.weights_stride + block] =
        hn::GetLane(hn::SumOfLanes(d, total));
  }
  return count;
}

// In 16 bits, scores are relative to a head's reference and in 128ths of a power of two. Such a
// number plus 127 * 128 is, read as bf16, about 2 to its power (Schraudolph 1999): the mantissa is
// linear in the fraction, so it is 0 to 6 % too large, by 4 % on average, which is taken off.
using DI16 = hn::ScalableTag<int16_t>;
constexpr int kLanes16 = static_cast<int>(hn::MaxLanes(DI16()));
constexpr float kScoreUnits = 128.0F * ladder_exp::kLog2E;  ///< of one nat
constexpr int kFixedOne = 32767;                            ///< 1 for MulFixedPoint15
constexpr int kFixedBound = 32000;                          ///< on scores
constexpr int kFixedMin = -100 * 128;                       ///< of a weight's exponent
constexpr int kFixedMax = static_cast<int>(kExponentMax * kScoreUnits);
constexpr int kExponentBias = 127 * 128 - 7;
constexpr float kLeftOver = 0.99805F;  ///< the 4 % are 7.36 units, of which the bias has 7
constexpr int kFixedBlocks = 16;       ///< at a time

struct FixedHead {
  int16_t centre;  ///< relative to the reference
  int16_t slope;   ///< of shifted sum times gain
  int16_t half_noise2;
  int16_t threshold;
};

/// False if 16 bits do not hold the head's scores. `gain_max` is 1 of the fixed gains.
HWY_INLINE bool MakeFixedHead(const ScanHead& head, float gain_max, float largest_sum, int shift,
                              FixedHead& fixed) {
  const float centre = (head.centre - head.reference) * kScoreUnits;
  const float unit = head.slope * gain_max * kScoreUnits;
  const float slope = unit / static_cast<float>(1 << shift) * kFixedOne;
  const float noise = head.noise * gain_max;
  const float half_noise2 = 0.5F * noise * noise * kScoreUnits;
  if (!(std::abs(centre) + unit * largest_sum < kFixedBound) || !(slope < kFixedOne) ||
      !(half_noise2 < kFixedOne)) {
    return false;
  }
  const float threshold = (head.threshold - head.reference) * kScoreUnits;
  constexpr float kLimit = 32767.0F;
  fixed = {static_cast<int16_t>(std::lrint(centre)), static_cast<int16_t>(std::lrint(slope)),
           static_cast<int16_t>(std::lrint(half_noise2)),
           static_cast<int16_t>(std::lrint(std::clamp(threshold, -kLimit, kLimit)))};
  return true;
}

/// Largest of the gains of `blocks` blocks, which stand block_bytes apart.
HWY_INLINE float LargestGain(const uint8_t* gains, int blocks, int block_bytes) {
  const DI16 d;  // bf16 numbers above zero are ordered as their bits are
  auto largest = hn::Zero(d);
  for (int b = 0; b < blocks; ++b, gains += block_bytes) {
    for (int i = 0; i < kScanBlock; i += kLanes16) {
      largest = hn::Max(largest, hn::LoadU(d, reinterpret_cast<const int16_t*>(gains) + i));
    }
  }
  HWY_ALIGN int16_t lanes[kLanes16];
  hn::Store(largest, d, lanes);
  const int16_t bits = *std::max_element(lanes, lanes + kLanes16);
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

/// 64 gains as 15-bit fractions of the largest one.
HWY_INLINE void FixGains(const uint16_t* gains, float to_fixed, int16_t* fixed) {
  const DF d;
  const hn::Rebind<int16_t, DF> d16;
  const auto factor = hn::Set(d, to_fixed);
  for (int i = 0; i < kScanBlock; i += kLanes) {
    const auto gain = hn::Mul(LoadGains(d, gains + i), factor);
    hn::StoreU(hn::DemoteTo(d16, hn::NearestInt(gain)), d16, fixed + i);
  }
}

/// Sum of 64 weights given as bits, without those of keys in `any`.
template <class M>
HWY_INLINE hn::Vec<DF> SumWeights(const int16_t* bits, const M* any) {
  const DI16 d16;
  const DF d;
  const hn::RebindToUnsigned<DF> d32;
  auto even = hn::Zero(d);
  auto odd = hn::Zero(d);
  for (int v = 0; v < kScanBlock / kLanes16; ++v) {
    const auto kept = hn::IfThenZeroElse(any[v], hn::Load(d16, bits + v * kLanes16));
#if HWY_TARGET == HWY_SCALAR
    (void)d32;
    odd = hn::Add(
        odd,
        hn::Set(d, std::bit_cast<float>(
                       static_cast<uint32_t>(static_cast<uint16_t>(hn::GetLane(kept))) << 16)));
#else
    const auto pairs = hn::BitCast(d32, kept);
    even = hn::Add(even, hn::BitCast(d, hn::ShiftLeft<16>(pairs)));
    odd = hn::Add(odd, hn::BitCast(d, hn::And(pairs, hn::Set(d32, 0xFFFF0000U))));
#endif
  }
  return hn::Mul(hn::Add(even, odd), hn::Set(d, kLeftOver));
}

/// One block in 16 bits; `gains`: its fixed gains.
template <int kShift>
HWY_INLINE int SelectFixed(const Selection& selection, const FixedHead* fixed_heads, int block,
                           const int16_t* gains, uint32_t first_index, uint32_t* chosen) {
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
  const auto least = hn::Set(d, static_cast<int16_t>(kFixedMin));
  const auto most = hn::Set(d, static_cast<int16_t>(kFixedMax));
  const auto bias = hn::Set(d, static_cast<int16_t>(kExponentBias));
  const int heads = selection.heads;
  for (int h = 0; h < heads; ++h) {
    const int16_t* sums = selection.sums + static_cast<ptrdiff_t>(h) * selection.sums_stride +
                          static_cast<ptrdiff_t>(block) * kScanBlock;
    const auto centre = hn::Set(d, fixed_heads[h].centre);
    const auto slope = hn::Set(d, fixed_heads[h].slope);
    const auto half_noise2 = hn::Set(d, fixed_heads[h].half_noise2);
    const auto threshold = hn::Set(d, fixed_heads[h].threshold);
    for (int v = 0; v < kVectors; ++v) {
      const auto sum = hn::ShiftLeft<kShift>(hn::LoadU(d, sums + v * kLanes16));
      const auto score =
          hn::Add(hn::MulFixedPoint15(hn::MulFixedPoint15(sum, gain[v]), slope), centre);
      any[v] = hn::Or(any[v], hn::Gt(score, threshold));
      const auto exponent = hn::SaturatedSub(score, hn::MulFixedPoint15(gain2[v], half_noise2));
      const auto weight = hn::Add(hn::Min(hn::Max(exponent, least), most), bias);
      hn::Store(weight, d, bits + h * kScanBlock + v * kLanes16);
    }
  }
  const int count = PutIndices(MaskBits(d, any), first_index, chosen);
  const DF df;
  for (int h = 0; h < heads; h += 4) {
    hn::Vec<DF> totals[4] = {hn::Zero(df), hn::Zero(df), hn::Zero(df), hn::Zero(df)};
    const int some = std::min(4, heads - h);
    for (int j = 0; j < some; ++j) totals[j] = SumWeights(bits + (h + j) * kScanBlock, any);
    float sums_of_four[4];
    SumFour(df, totals, sums_of_four);
    for (int j = 0; j < some; ++j) {
      selection.block_weights[static_cast<ptrdiff_t>(h + j) * selection.weights_stride + block] =
          sums_of_four[j];
    }
  }
  return count;
}

/// Up to kFixedBlocks blocks of a call.
struct SomeBlocks {
  const uint8_t* gains;  ///< of the first block
  const uint8_t* next_codes;
  int block_bytes;
  int first;
  int count;
  uint32_t first_index;
};

template <int kShift>
HWY_INLINE int SelectSome(const Selection& selection, const SomeBlocks& some, uint32_t* chosen) {
  const float gain_max = std::max(LargestGain(some.gains, some.count, some.block_bytes), 1e-30F);
  FixedHead fixed_heads[kHeadsMax];
  bool fits = true;
  for (int h = 0; h < selection.heads; ++h) {
    fits = MakeFixedHead(selection.scan_heads[h], gain_max, selection.largest_sum, kShift,
                         fixed_heads[h]) &&
           fits;
  }
  // All of them first: a load waits long for narrower stores just before it.
  HWY_ALIGN int16_t fixed_gains[kFixedBlocks * kScanBlock];
  for (int b = 0; b < some.count && fits; ++b) {
    FixGains(reinterpret_cast<const uint16_t*>(some.gains +
                                               static_cast<ptrdiff_t>(b) * some.block_bytes),
             static_cast<float>(kFixedOne) / gain_max, fixed_gains + b * kScanBlock);
  }
  int count = 0;
  for (int b = 0; b < some.count; ++b) {
    const ptrdiff_t offset = static_cast<ptrdiff_t>(b) * some.block_bytes;
    if (some.next_codes != nullptr) {  // the half that ScanCodes left
      const uint8_t* next = some.next_codes + offset;
      for (int i = some.block_bytes / 2; i < some.block_bytes; i += 64) {
        __builtin_prefetch(next + i, 0, 2);
      }
    }
    const auto* gains = reinterpret_cast<const uint16_t*>(some.gains + offset);
    const uint32_t first_index = some.first_index + static_cast<uint32_t>(b * kScanBlock);
    if (fits) {
      count += SelectFixed<kShift>(selection, fixed_heads, some.first + b,
                                   fixed_gains + b * kScanBlock, first_index, chosen + count);
    } else {
      count += SelectWide(selection, some.first + b, gains, first_index, chosen + count);
    }
  }
  return count;
}

int SelectAndWeighImpl(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                       int symbols, int planes, const ScanHead* scan_heads, int heads,
                       uint32_t first_index, uint32_t* chosen, float* block_weights,
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

HWY_EXPORT(BuildTablesImpl);
HWY_EXPORT(ScanCodesImpl);
HWY_EXPORT(EstimateScoresImpl);
HWY_EXPORT(SelectAndWeighImpl);

void BuildTables(const float* rotated_queries, int heads, int padded_dim, int8_t* tables,
                 float* units) noexcept {
  assert(padded_dim >= 64 && padded_dim <= 512);
  HWY_DYNAMIC_DISPATCH(BuildTablesImpl)
  (rotated_queries, heads, padded_dim, tables, units);
}

void ScanCodes(const uint8_t* codes, int blocks, int symbols, int planes, const int8_t* tables,
               int heads, int16_t* sums, int sums_stride, const uint8_t* next_codes) noexcept {
  assert(sums_stride % kScanBlock == 0 && sums_stride >= blocks * kScanBlock);
  HWY_DYNAMIC_DISPATCH(ScanCodesImpl)
  (codes, blocks, symbols, planes, tables, heads, sums, sums_stride, next_codes);
}

void EstimateScores(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                    int symbols, int planes, const ScanHead* scan_heads, int heads,
                    float* estimates, int estimates_stride, float* weights) noexcept {
  HWY_DYNAMIC_DISPATCH(EstimateScoresImpl)
  (sums, sums_stride, codes, blocks, symbols, planes, scan_heads, heads, estimates,
   estimates_stride, weights);
}

int SelectAndWeigh(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                   int symbols, int planes, const ScanHead* scan_heads, int heads,
                   uint32_t first_index, uint32_t* chosen, float* block_weights, int weights_stride,
                   const uint8_t* next_codes) noexcept {
  assert(heads <= 64);
  return HWY_DYNAMIC_DISPATCH(SelectAndWeighImpl)(sums, sums_stride, codes, blocks, symbols, planes,
                                                  scan_heads, heads, first_index, chosen,
                                                  block_weights, weights_stride, next_codes);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
