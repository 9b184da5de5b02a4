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

/// One block: which keys are chosen, and every head's weight of the others.
HWY_INLINE int SelectInBlock(const int16_t* sums, int sums_stride, const uint16_t* gains,
                             const ScanHead* scan_heads, const WeightHead* weight_heads, int heads,
                             uint32_t first_index, uint32_t* chosen, float* block_weights,
                             int weights_stride) {
  const DF d;
  constexpr int kVectors = kScanBlock / kLanes;
  HWY_ALIGN float estimates[kHeadsMax * kScanBlock];
  hn::Vec<DF> gain[kVectors];
  hn::Mask<DF> any[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    gain[v] = LoadGains(d, gains + v * kLanes);
    any[v] = hn::MaskFromVec(hn::Zero(d));
  }
  for (int h = 0; h < heads; ++h) {
    const int16_t* head_sums = sums + static_cast<ptrdiff_t>(h) * sums_stride;
    const auto threshold = hn::Set(d, scan_heads[h].threshold);
    for (int v = 0; v < kVectors; ++v) {
      const auto estimate = Estimate(d, scan_heads[h], gain[v], head_sums + v * kLanes);
      any[v] = hn::Or(any[v], hn::Gt(estimate, threshold));
      hn::Store(estimate, d, estimates + h * kScanBlock + v * kLanes);
    }
  }
  uint8_t bytes[kScanBlock / 8] = {};
  for (int v = 0; v < kVectors; ++v) {
    PutMaskBits(d, any[v], v * kLanes, bytes);
    gain[v] = hn::Mul(gain[v], gain[v]);
  }
  uint64_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  const int count = std::popcount(bits);
  for (; bits != 0; bits &= bits - 1) {
    *chosen++ = first_index + static_cast<uint32_t>(std::countr_zero(bits));
  }
  for (int h = 0; h < heads; h += 4) {
    hn::Vec<DF> totals[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
    const int some = std::min(4, heads - h);
    for (int j = 0; j < some; ++j) {
      auto total = hn::Zero(d);
      for (int v = 0; v < kVectors; ++v) {
        const auto estimate = hn::Load(d, estimates + (h + j) * kScanBlock + v * kLanes);
        const auto weight = Weight(d, weight_heads[h + j], gain[v], estimate);
        total = hn::IfThenElse(any[v], total, hn::Add(total, weight));
      }
      totals[j] = total;
    }
    float sums_of_four[4];
    SumFour(d, totals, sums_of_four);
    for (int j = 0; j < some; ++j) {
      block_weights[static_cast<ptrdiff_t>(h + j) * weights_stride] = sums_of_four[j];
    }
  }
  return count;
}

int SelectAndWeighImpl(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                       int symbols, int planes, const ScanHead* scan_heads, int heads,
                       uint32_t first_index, uint32_t* chosen, float* block_weights,
                       int weights_stride, const uint8_t* next_codes) {
  const int block_bytes = ScanBlockBytes(symbols, planes);
  WeightHead weight_heads[kHeadsMax];
  for (int h = 0; h < heads; ++h) weight_heads[h] = WeightHead(scan_heads[h]);
  codes += ScanGainOffset(symbols, planes);
  int count = 0;
  for (int b = 0; b < blocks; ++b, codes += block_bytes) {
    if (next_codes != nullptr) {  // the half that ScanCodes left
      const uint8_t* block = next_codes + static_cast<ptrdiff_t>(b) * block_bytes;
      for (int i = block_bytes / 2; i < block_bytes; i += 64) __builtin_prefetch(block + i, 0, 2);
    }
    count += SelectInBlock(sums + b * kScanBlock, sums_stride,
                           reinterpret_cast<const uint16_t*>(codes), scan_heads, weight_heads,
                           heads, first_index + static_cast<uint32_t>(b * kScanBlock),
                           chosen + count, block_weights + b, weights_stride);
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
