#include "kernels/cpu/ladder_scan.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstddef>

#include "kernels/cpu/ladder_codes.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/ladder_scan.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_lookup-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

/// sum + q where bit `bit` of a lane's number is set, sum - q elsewhere.
HWY_INLINE hn::Vec<DF> AddSigned(hn::Vec<DF> sum, float q, hn::Vec<DI> number, int bit) {
  const DF d;
  const auto value = hn::Set(d, q);
  const auto set = hn::TestBit(number, hn::Set(DI(), 1 << bit));
  const auto is_set = hn::MaskFromVec(hn::BitCast(d, hn::VecFromMask(DI(), set)));
  return hn::Add(sum, hn::IfThenElse(is_set, value, hn::Neg(value)));
}

/// One symbol's table: round(sum_b +-q[b]) for q in table units. Bits that are the same in all
/// lanes of a vector are those of its number.
HWY_INLINE void FillTable(const float* q, int8_t* table) {
  const DF d;
  const hn::Rebind<int8_t, DF> d8;
  constexpr int kLaneBits = std::bit_width(static_cast<unsigned>(kLanes)) - 1;
  const auto limit = hn::Set(DI(), kTableMax);
  auto sum = hn::Zero(d);
  for (int b = 0; b < kLaneBits; ++b) sum = AddSigned(sum, q[b], hn::Iota(DI(), 0), b);
  for (int v = 0; v < kTableSize / kLanes; ++v) {
    auto total = sum;
    for (int b = kLaneBits; b < kSymbolBits; ++b) {
      const bool set = (v >> (b - kLaneBits) & 1) != 0;
      total = hn::Add(total, hn::Set(d, set ? q[b] : -q[b]));
    }
    const auto entry = hn::Max(hn::Min(hn::NearestInt(total), limit), hn::Neg(limit));
    hn::StoreU(hn::DemoteTo(d8, entry), d8, table + v * kLanes);
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
  const AdjacentBlocks all = {codes, blocks, ScanBlockBytes(symbols, planes), next_codes};
  LookUpAll(all, {symbols, planes}, tables, heads, sums, sums_stride);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(BuildTablesImpl);
HWY_EXPORT(ScanCodesImpl);

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

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
