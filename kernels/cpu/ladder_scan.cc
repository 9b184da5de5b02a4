#include "kernels/cpu/ladder_scan.h"

#include <algorithm>
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
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

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
