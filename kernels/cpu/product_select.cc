#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstddef>

#include "kernels/cpu/log_bits.h"
#include "kernels/cpu/product_scan.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/product_select.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_lanes-inl.h"
#include "kernels/cpu/ladder_lookup-inl.h"

#ifndef KVSEEK_KERNELS_CPU_PRODUCT_SELECT_ONCE
#define KVSEEK_KERNELS_CPU_PRODUCT_SELECT_ONCE
namespace kvseek::kernels {
namespace {

inline constexpr int kHeadsMax = 64;
inline constexpr float kExponentLeast = -69.0F;  ///< 2^-100: see kLogLeast

/// One head: a key is chosen when its sum is `bound` or more, at most kProductSumMax + 1.
struct SelectHead {
  SelectHead() = default;
  SelectHead(const ProductHead& head, int least) : tables(head.tables), bound(least) {
    const int threshold = bound - 1;  // the largest sum of a key that is not chosen
    const int raise = tables->Top() - threshold;
    bounds = 0x01010101U * static_cast<uint32_t>(bound);
    raises = 0x01010101U * static_cast<uint32_t>(std::clamp(raise, 0, 255));
    lowers = 0x01010101U * static_cast<uint32_t>(std::clamp(-raise, 0, 255));
    shifts = 0x00010001U * static_cast<uint32_t>(tables->shift);
    const float top =
        head.centre + tables->base + tables->unit * static_cast<float>(threshold) - head.reference;
    weight = top < kExponentLeast ? 0.0F : std::exp(std::min(top, kExponentMax));
  }

  const ProductTables* tables;
  int bound;
  // In all bytes, or both halves: the bound; what is added to and taken from a sum, so that the
  // threshold becomes the window's top; the tables' shift.
  uint32_t bounds;
  uint32_t raises;
  uint32_t lowers;
  uint32_t shifts;
  float weight;  ///< at the threshold
};

/// SelectHead::bound; above kProductSumMax + 1: all sums are below the threshold.
inline int SumBound(const ProductHead& head) {
  const ProductTables& tables = *head.tables;
  const float base = head.centre + tables.base;
  if (tables.unit == 0.0F) return base > head.threshold ? 0 : 1;
  constexpr auto kMost = static_cast<float>(kProductSumMax) + 1.0F;
  const float sum = std::floor((head.threshold - base) / tables.unit);
  return static_cast<int>(std::clamp(sum, -1.0F, kMost)) + 1;
}

}  // namespace
}  // namespace kvseek::kernels
#endif  // KVSEEK_KERNELS_CPU_PRODUCT_SELECT_ONCE

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// The heads of a call, a multiple of four of them with room for it.
struct SelectHeads {
  int count;
  SelectHead heads[kHeadsMax];
  alignas(16) float fine_units[kHeadsMax];  ///< what one of the sums of WeighBlock weighs
};

/// What is known of one block: where its heads' sums stand, and where their weights go.
struct SelectBlock {
  const uint8_t* codes;
  const uint8_t* sums;
  int sums_stride;
  uint8_t* weights;
  int weights_stride;
  float* block_weights;
  int blocks_stride;
};

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128 || HWY_HAVE_SCALABLE

/// Returns which keys are chosen.
uint64_t WeighBlock(const SelectBlock& block, const ProductLayout& layout,
                    const SelectHeads& select) {
  uint64_t chosen = 0;
  for (int key = 0; key < kScanBlock; ++key) {
    for (int h = 0; h < select.count; ++h) {
      const int sum = block.sums[static_cast<ptrdiff_t>(h) * block.sums_stride + key];
      if (sum >= select.heads[h].bound) chosen |= uint64_t{1} << key;
    }
  }
  for (int h = 0; h < select.count; ++h) {
    const ProductTables& tables = *select.heads[h].tables;
    const int raise = tables.Top() - (select.heads[h].bound - 1);
    const uint8_t* const sums = block.sums + static_cast<ptrdiff_t>(h) * block.sums_stride;
    uint8_t* const weights = block.weights + static_cast<ptrdiff_t>(h) * block.weights_stride;
    int total = -128 * (kScanBlock - std::popcount(chosen));
    for (int key = 0; key < kScanBlock; ++key) {
      const int level = SymbolOf(block.codes, layout.Symbols(), layout.subspaces, key);
      const int lowered =
          std::max(std::max(sums[key] - tables.excess_units[level], 0) - std::max(-raise, 0), 0);
      const int step = (lowered + std::max(raise, 0)) >> tables.shift;
      const bool unread = (chosen >> key & 1) == 0;
      weights[key] = unread ? tables.high[step & 63] : uint8_t{0};
      if (unread) total += 256 * tables.high[step & 63] + tables.low[step & 63];
    }
    block.block_weights[static_cast<ptrdiff_t>(h) * block.blocks_stride] =
        select.fine_units[h] * static_cast<float>(total);
  }
  return chosen;
}

#else

constexpr int kByteVectors = kScanBlock / kByteLanes;

/// Bytes whose low six bits are the levels of a block's keys, kByteLanes of them from i on.
HWY_INLINE V8 LevelBytes(const uint8_t* block, const ProductLayout& layout, int i) {
  const D8 d8;
  const int symbols = layout.Symbols();
  const uint8_t* const rows = block + (PlaneRows(symbols) - 1) * kScanBlock + i;
  const auto last = hn::LoadU(d8, rows);
  if (symbols % 4 != 0) return last;
  return FourthSymbol(hn::LoadU(d8, rows - 2 * kScanBlock), hn::LoadU(d8, rows - kScanBlock), last);
}

/// The low bits of every byte shifted down; what comes from its neighbour is in the top two.
HWY_INLINE V8 ShiftBytes(V8 bytes, const SelectHead& head) {
#if HWY_TARGET <= HWY_AVX3
  return V8{_mm512_srlv_epi16(bytes.raw, _mm512_set1_epi32(static_cast<int>(head.shifts)))};
#else
  return hn::BitCast(D8(), hn::ShiftRightSame(hn::BitCast(D16(), bytes), head.tables->shift));
#endif
}

HWY_INLINE hn::Mask<D8> AtLeast(V8 a, V8 b) {
#if HWY_TARGET <= HWY_AVX3
  return hn::Mask<D8>{_mm512_cmpge_epu8_mask(a.raw, b.raw)};
#else
  return hn::Eq(hn::Max(a, b), a);
#endif
}

using D32 = hn::Repartition<int32_t, D8>;
using DU32 = hn::Repartition<uint32_t, D8>;

/// The weights of the keys that are not chosen, 0 for the others.
HWY_INLINE V8 LookUpUnread(const uint8_t* table, const Index& step, hn::Mask<D8> chosen) {
#if HWY_TARGET <= HWY_AVX3_DL
  return V8{
      _mm512_maskz_permutexvar_epi8(_knot_mask64(chosen.raw), step.raw, _mm512_load_si512(table))};
#else
  return hn::IfThenZeroElse(chosen, LookUp(table, step));
#endif
}

/// Writes one head's weights; returns 256 times the high parts plus the low ones, in lanes.
HWY_INLINE hn::Vec<D32> WeighHead(const SelectHead& head, const Index* levels,
                                  const hn::Mask<D8>* chosen, const uint8_t* sums,
                                  uint8_t* weights) {
  const D8 d8;
  const ProductTables& tables = *head.tables;
  const hn::Repartition<uint64_t, D8> d64;
  const auto lowers = hn::BitCast(d8, hn::Set(DU32(), head.lowers));
  const auto raises = hn::BitCast(d8, hn::Set(DU32(), head.raises));
  auto high_sums = hn::Zero(d64);
  auto low_sums = hn::Zero(d64);
  for (int v = 0; v < kByteVectors; ++v) {
    const auto sum = hn::Load(d8, sums + v * kByteLanes);
    const auto lowered =
        hn::SaturatedSub(hn::SaturatedSub(sum, LookUp(tables.excess_units, levels[v])), lowers);
    const Index step = MakeIndex(ShiftBytes(hn::Add(lowered, raises), head));
    const auto high = LookUpUnread(tables.high, step, chosen[v]);
    hn::Store(high, d8, weights + v * kByteLanes);
    high_sums = hn::Add(high_sums, hn::SumsOf8(high));
    low_sums = hn::Add(low_sums, hn::SumsOf8(LookUpUnread(tables.low, step, chosen[v])));
  }
  return hn::BitCast(D32(), hn::Add(hn::ShiftLeft<8>(high_sums), low_sums));
}

/// Weighs heads [first, first + kHeads) of a block.
template <int kHeads>
HWY_INLINE void WeighHeads(const SelectBlock& block, const SelectHeads& select, int first,
                           const Index* levels, const hn::Mask<D8>* chosen, int unread) {
  const hn::CappedTag<int32_t, 4> d;
  const hn::RebindToFloat<decltype(d)> df;
  hn::Vec<D32> totals[4];
  for (int j = 0; j < 4; ++j) {
    totals[j] = hn::Zero(D32());
    if (j >= kHeads) continue;
    totals[j] = WeighHead(select.heads[first + j], levels, chosen,
                          block.sums + static_cast<ptrdiff_t>(first + j) * block.sums_stride,
                          block.weights + static_cast<ptrdiff_t>(first + j) * block.weights_stride);
  }
  HWY_ALIGN int32_t four[4];
  HWY_ALIGN float weights[4];
  SumFour(D32(), totals, four);
  const auto sums = hn::Sub(hn::Load(d, four), hn::Set(d, 128 * unread));
  hn::Store(hn::Mul(hn::ConvertTo(df, sums), hn::Load(df, select.fine_units + first)), df, weights);
  for (int j = 0; j < kHeads; ++j) {
    block.block_weights[static_cast<ptrdiff_t>(first + j) * block.blocks_stride] = weights[j];
  }
}

/// Returns which keys are chosen.
HWY_INLINE uint64_t WeighBlock(const SelectBlock& block, const ProductLayout& layout,
                               const SelectHeads& select) {
  const D8 d8;
  Index levels[kByteVectors];
  hn::Mask<D8> any[kByteVectors];
  for (int v = 0; v < kByteVectors; ++v) {
    levels[v] = MakeIndex(LevelBytes(block.codes, layout, v * kByteLanes));
    any[v] = hn::MaskFromVec(hn::Zero(d8));
    const uint8_t* sums = block.sums + v * kByteLanes;
    for (int h = 0; h < select.count; ++h, sums += block.sums_stride) {
      const auto bound = hn::BitCast(d8, hn::Set(DU32(), select.heads[h].bounds));
      any[v] = hn::Or(any[v], AtLeast(hn::Load(d8, sums), bound));
    }
  }
  const uint64_t chosen = MaskBits(d8, any);
  const int unread = kScanBlock - std::popcount(chosen);
  int h = 0;
  for (; h + 4 <= select.count; h += 4) WeighHeads<4>(block, select, h, levels, any, unread);
  switch (select.count - h) {
    case 1:
      WeighHeads<1>(block, select, h, levels, any, unread);
      break;
    case 2:
      WeighHeads<2>(block, select, h, levels, any, unread);
      break;
    case 3:
      WeighHeads<3>(block, select, h, levels, any, unread);
      break;
    default:
      break;
  }
  return chosen;
}

#endif

int SelectProductsImpl(const uint8_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                       const ProductLayout& layout, const ProductHead* heads, int count,
                       uint32_t first_index, const ProductResults& results,
                       const uint8_t* next_codes) {
  const int block_bytes = layout.BlockBytes();
  SelectHeads select;
  select.count = count;
  for (int h = 0; h < count; ++h) {
    int bound = SumBound(heads[h]);
    if (bound > kProductSumMax + 1) {
      const uint8_t* const head_sums = sums + static_cast<ptrdiff_t>(h) * sums_stride;
      bound = *std::max_element(head_sums, head_sums + blocks * kScanBlock) + 1;
    }
    select.heads[h] = SelectHead(heads[h], bound);
    results.weight_units[h] = select.heads[h].weight / 255.0F;
    select.fine_units[h] = select.heads[h].weight / (255.0F * 256.0F);
  }
  for (int h = count; h % 4 != 0; ++h) select.fine_units[h] = 0.0F;
  uint32_t* chosen = results.chosen;
  for (int b = 0; b < blocks; ++b) {
    if (next_codes != nullptr) {  // the half that ScanProducts left
      const uint8_t* next = next_codes + static_cast<ptrdiff_t>(b) * block_bytes;
      for (int i = block_bytes / 2; i < block_bytes; i += 64) {
        __builtin_prefetch(next + i, 0, 2);
      }
    }
    const SelectBlock block = {codes + static_cast<ptrdiff_t>(b) * block_bytes,
                               sums + static_cast<ptrdiff_t>(b) * kScanBlock,
                               sums_stride,
                               results.weights + static_cast<ptrdiff_t>(b) * kScanBlock,
                               results.weights_stride,
                               results.block_weights + b,
                               results.blocks_stride};
    const uint64_t bits = WeighBlock(block, layout, select);
    chosen += PutIndices(bits, first_index + static_cast<uint32_t>(b * kScanBlock), chosen);
  }
  return static_cast<int>(chosen - results.chosen);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(SelectProductsImpl);

int SelectProducts(const uint8_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                   const ProductLayout& layout, const ProductHead* heads, int count,
                   uint32_t first_index, const ProductResults& results,
                   const uint8_t* next_codes) noexcept {
  assert(count <= kHeadsMax && results.weights_stride % kScanBlock == 0);
  return HWY_DYNAMIC_DISPATCH(SelectProductsImpl)(sums, sums_stride, codes, blocks, layout, heads,
                                                  count, first_index, results, next_codes);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
