#include "kernels/cpu/product_scan.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <limits>

#include "kernels/cpu/log_bits.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/product_scan.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_exp-inl.h"
#include "kernels/cpu/ladder_lookup-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128 || HWY_HAVE_SCALABLE

template <class Blocks>
void ScanAll(const Blocks& blocks, int symbols, const uint8_t* entries, int heads, uint8_t* sums,
             int sums_stride) {
  for (int b = 0; b < blocks.count; ++b, sums += kScanBlock) {
    const uint8_t* const codes = blocks.At(b);
    for (int key = 0; key < kScanBlock; ++key) {
      for (int h = 0; h < heads; ++h) {
        int total = 0;
        for (int g = 0; g < symbols; ++g) {
          total += entries[(h * symbols + g) * kTableSize + SymbolOf(codes, symbols, g, key)];
        }
        sums[static_cast<ptrdiff_t>(h) * sums_stride + key] = static_cast<uint8_t>(total);
      }
    }
  }
}

/// Takes from a block's sums what upper estimates have more than weights' exponents.
void LowerSums(const uint8_t* codes, const ProductLayout& layout, const ProductTables* tables,
               int heads, uint8_t* sums, int sums_stride) {
  for (int key = 0; key < kScanBlock; ++key) {
    const int level = SymbolOf(codes, layout.Symbols(), layout.subspaces, key);
    for (int h = 0; h < heads; ++h) {
      uint8_t& sum = sums[static_cast<ptrdiff_t>(h) * sums_stride + key];
      sum = static_cast<uint8_t>(std::max(sum - tables[h].excess_units[level], 0));
    }
  }
}

#else

/// sums[h] += entries of one symbol; `tables`: of the first head.
template <int kHeads>
HWY_INLINE void AddSymbol(V8 row, const uint8_t* tables, ptrdiff_t head_bytes, V8* sums) {
  const Index index = MakeIndex(row);
  for (int h = 0; h < kHeads; ++h, tables += head_bytes) {
    sums[h] = hn::Add(sums[h], LookUp(tables, index));
  }
}

template <int kHeads, class Blocks>
HWY_NOINLINE void ScanT(const Blocks& blocks, int symbols, const uint8_t* entries, uint8_t* sums,
                        int sums_stride) {
  const D8 d8;
  const int groups = symbols / 4;
  const int rest = symbols % 4;
  const ptrdiff_t head_bytes = static_cast<ptrdiff_t>(symbols) * kTableSize;
  for (int b = 0; b < blocks.count; ++b, sums += kScanBlock) {
    blocks.Fetch(b);
    const uint8_t* const codes = blocks.At(b);
    for (int i = 0; i < kScanBlock; i += kByteLanes) {
      const uint8_t* rows = codes + i;
      const uint8_t* tables = entries;
      V8 totals[kHeads];
      for (auto& total : totals) total = hn::Zero(d8);
      for (int group = 0; group < groups; ++group) {
        const auto row0 = hn::LoadU(d8, rows);
        const auto row1 = hn::LoadU(d8, rows + kScanBlock);
        const auto row2 = hn::LoadU(d8, rows + 2 * kScanBlock);
        const V8 quad[4] = {row0, row1, row2, FourthSymbol(row0, row1, row2)};
        for (const V8& symbol : quad) {
          AddSymbol<kHeads>(symbol, tables, head_bytes, totals);
          tables += kTableSize;
        }
        rows += static_cast<ptrdiff_t>(3 * kScanBlock);
      }
      for (int r = 0; r < rest; ++r, rows += kScanBlock, tables += kTableSize) {
        AddSymbol<kHeads>(hn::LoadU(d8, rows), tables, head_bytes, totals);
      }
      for (int h = 0; h < kHeads; ++h) {
        hn::Store(totals[h], d8, sums + static_cast<ptrdiff_t>(h) * sums_stride + i);
      }
    }
  }
}

template <class Blocks>
HWY_INLINE void ScanAll(Blocks blocks, int symbols, const uint8_t* entries, int heads,
                        uint8_t* sums, int sums_stride) {
  for (int h = 0; h < heads; h += 4, blocks.StopFetching()) {
    const uint8_t* const tables = entries + static_cast<ptrdiff_t>(h) * symbols * kTableSize;
    uint8_t* const out = sums + static_cast<ptrdiff_t>(h) * sums_stride;
    switch (std::min(4, heads - h)) {
      case 1:
        ScanT<1>(blocks, symbols, tables, out, sums_stride);
        break;
      case 2:
        ScanT<2>(blocks, symbols, tables, out, sums_stride);
        break;
      case 3:
        ScanT<3>(blocks, symbols, tables, out, sums_stride);
        break;
      default:
        ScanT<4>(blocks, symbols, tables, out, sums_stride);
        break;
    }
  }
}

/// Takes from a block's sums what upper estimates have more than weights' exponents.
HWY_INLINE void LowerSums(const uint8_t* codes, const ProductLayout& layout,
                          const ProductTables* tables, int heads, uint8_t* sums, int sums_stride) {
  const D8 d8;
  const LastSymbols levels_of(layout.Symbols());
  for (int i = 0; i < kScanBlock; i += kByteLanes) {
    const Index index = MakeIndex(levels_of.Load(codes, i));
    for (int h = 0; h < heads; ++h) {
      uint8_t* const head_sums = sums + static_cast<ptrdiff_t>(h) * sums_stride + i;
      const auto excess = LookUp(tables[h].excess_units, index);
      hn::Store(hn::SaturatedSub(hn::Load(d8, head_sums), excess), d8, head_sums);
    }
  }
}

#endif

void ScanProductsImpl(const uint8_t* codes, int blocks, const ProductLayout& layout,
                      const uint8_t* entries, int heads, uint8_t* sums, int sums_stride,
                      const uint8_t* next_codes) {
  const AdjacentBlocks all = {codes, blocks, layout.BlockBytes(), next_codes};
  ScanAll(all, layout.Symbols(), entries, heads, sums, sums_stride);
}

/// kLanes sums, as floats.
HWY_INLINE hn::Vec<DF> LoadSums(const uint8_t* sums) {
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<uint8_t, DF> d8;
  return hn::ConvertTo(DF(), hn::PromoteTo(di, hn::LoadU(d8, sums)));
}

/// Writes the estimates of one head; returns the largest.
HWY_INLINE float EstimateSample(const SampleBlocks& sample, const ProductTables& tables, int head,
                                const uint8_t* sums, float* estimates) {
  const DF d;
  const auto unit = hn::Set(d, tables.unit);
  auto most = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int b = 0; b < sample.count; ++b) {
    const auto base = hn::Set(d, sample.centres[b][head] + tables.base);
    for (int i = b * kScanBlock; i < (b + 1) * kScanBlock; i += kLanes) {
      const auto estimate = hn::MulAdd(unit, LoadSums(sums + i), base);
      hn::StoreU(estimate, d, estimates + i);
      most = hn::Max(most, estimate);
    }
  }
  return hn::GetLane(hn::MaxOfLanes(d, most));
}

/// Returns one head's summed weight over exp(largest), from lowered sums.
HWY_INLINE float WeighSample(const SampleBlocks& sample, const ProductTables& tables, int head,
                             const uint8_t* sums, float largest) {
  const DF d;
  const auto unit = hn::Set(d, tables.unit * ladder_exp::kLog2E);
  auto mass = hn::Zero(d);
  for (int b = 0; b < sample.count; ++b) {
    const auto base =
        hn::Set(d, (sample.centres[b][head] + tables.base - largest) * ladder_exp::kLog2E);
    auto sum = hn::Zero(d);
    for (int i = b * kScanBlock; i < (b + 1) * kScanBlock; i += kLanes) {
      sum = hn::Add(sum, Exp2Coarse(d, hn::MulAdd(unit, LoadSums(sums + i), base)));
    }
    mass = hn::MulAdd(hn::Set(d, sample.factors[b]), sum, mass);
  }
  return hn::GetLane(hn::SumOfLanes(d, mass));
}

void SampleProductsImpl(const SampleBlocks& sample, const ProductLayout& layout,
                        const uint8_t* entries, const ProductTables* tables, int heads,
                        uint8_t* sums, const SampleResults& results) {
  const int stride = sample.count * kScanBlock;
  const ScatteredBlocks blocks = {sample.codes, sample.count, layout.BlockBytes()};
  ScanAll(blocks, layout.Symbols(), entries, heads, sums, stride);
  for (int h = 0; h < heads; ++h) {
    const float largest =
        EstimateSample(sample, tables[h], h, sums + h * stride,
                       results.estimates + static_cast<ptrdiff_t>(h) * results.stride);
    if (largest <= results.largest[h]) continue;
    results.mass[h] *= std::exp(results.largest[h] - largest);
    results.largest[h] = largest;
  }
  for (int b = 0; b < sample.count; ++b) {
    LowerSums(sample.codes[b], layout, tables, heads, sums + b * kScanBlock, stride);
  }
  for (int h = 0; h < heads; ++h) {
    results.mass[h] += WeighSample(sample, tables[h], h, sums + h * stride, results.largest[h]);
  }
}

void EstimateProductsImpl(const uint8_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                          const ProductLayout& layout, const ProductHead* heads, int count,
                          float* estimates, float* weights, float* deviations, int stride) {
  const DF d;
  for (int h = 0; h < count; ++h) {
    const ProductHead& head = heads[h];
    const ProductTables& tables = *head.tables;
    const auto unit = hn::Set(d, tables.unit);
    const auto base = hn::Set(d, head.centre + tables.base);
    const uint8_t* const head_sums = sums + static_cast<ptrdiff_t>(h) * sums_stride;
    float* const out = estimates + static_cast<ptrdiff_t>(h) * stride;
    for (int i = 0; i < blocks * kScanBlock; i += kLanes) {
      hn::StoreU(hn::MulAdd(unit, LoadSums(head_sums + i), base), d, out + i);
    }
    if (weights == nullptr && deviations == nullptr) continue;
    for (int i = 0; i < blocks * kScanBlock; ++i) {
      const uint8_t level =
          ProductSymbol(codes + static_cast<ptrdiff_t>(i / kScanBlock) * layout.BlockBytes(),
                        layout, layout.subspaces, i % kScanBlock);
      const ptrdiff_t at = static_cast<ptrdiff_t>(h) * stride + i;
      if (deviations != nullptr) deviations[at] = tables.sigma[level];
      if (weights == nullptr) continue;
      const float exponent = out[i] - tables.excess[level] - head.reference;
      weights[at] = std::exp(std::min(kExponentMax, exponent));
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(ScanProductsImpl);
HWY_EXPORT(SampleProductsImpl);
HWY_EXPORT(EstimateProductsImpl);

void ScanProducts(const uint8_t* codes, int blocks, const ProductLayout& layout,
                  const uint8_t* entries, int heads, uint8_t* sums, int sums_stride,
                  const uint8_t* next_codes) noexcept {
  assert(sums_stride % kScanBlock == 0 && sums_stride >= blocks * kScanBlock);
  HWY_DYNAMIC_DISPATCH(ScanProductsImpl)
  (codes, blocks, layout, entries, heads, sums, sums_stride, next_codes);
}

void SampleProducts(const SampleBlocks& sample, const ProductLayout& layout, const uint8_t* entries,
                    const ProductTables* tables, int heads, uint8_t* sums,
                    const SampleResults& results) noexcept {
  assert(results.stride >= sample.count * kScanBlock);
  HWY_DYNAMIC_DISPATCH(SampleProductsImpl)
  (sample, layout, entries, tables, heads, sums, results);
}

void EstimateProducts(const uint8_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                      const ProductLayout& layout, const ProductHead* heads, int count,
                      float* estimates, float* weights, float* deviations, int stride) noexcept {
  HWY_DYNAMIC_DISPATCH(EstimateProductsImpl)
  (sums, sums_stride, codes, blocks, layout, heads, count, estimates, weights, deviations, stride);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
