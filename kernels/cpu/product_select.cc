#include <algorithm>
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

/// The largest sum of a key that head does not choose, -1 to kProductSumMax, or
/// kProductSumMax + 1: all sums are below the threshold.
inline int LargestUnread(const ProductHead& head) {
  const ProductTables& tables = *head.tables;
  const float base = head.centre + tables.base;
  if (tables.unit == 0.0F) return base > head.threshold ? -1 : 0;
  constexpr auto kMost = static_cast<float>(kProductSumMax) + 1.0F;
  const float sum = std::clamp((head.threshold - base) / tables.unit, -1.0F, kMost);
  const int whole = static_cast<int>(sum);
  return static_cast<float>(whole) > sum ? whole - 1 : whole;
}

/// Of a key whose sum is `sum`.
inline float WeightAt(const ProductHead& head, int sum) {
  const float exponent = head.centre + head.tables->base +
                         head.tables->unit * static_cast<float>(sum) - head.reference;
  return exponent < kExponentLeast ? 0.0F : std::exp(std::min(exponent, kExponentMax));
}

}  // namespace
}  // namespace kvseek::kernels
#endif  // KVSEEK_KERNELS_CPU_PRODUCT_SELECT_ONCE

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kChosen = kProductSumMax + 1;  ///< a chosen key's lifted sum, saturated

/// One head, for consecutive blocks. Sums are lifted so that kProductSumMax is the largest of a key
/// that is not chosen; less their excess and shifted, their low six bits are the steps.
struct SelectHead {
  alignas(64) uint8_t lift[kScanBlock];    ///< the same for all keys
  alignas(64) uint8_t excess[kCentroids];  ///< of each level, and from the window's top to 254
  alignas(64) uint8_t high[kCentroids];    ///< as in ProductTables
  alignas(64) uint8_t low[kCentroids];
  alignas(64) uint16_t shifts[kScanBlock / 2];
  int shift;
  const uint8_t* sums;  ///< of all keys, and their weights
  uint8_t* weights;
};

/// All blocks of a call.
struct SelectCall {
  const uint8_t* codes;
  const uint8_t* next;  ///< as many blocks that are scanned next, or null
  int block_bytes;
  int symbols;
  uint32_t first_index;
  int count;
  const SelectHead* heads;
};

/// Some of them, and where they go. Totals are sums of 256 * high + low - 128 over all keys of the
/// range so far that are not chosen.
struct SelectRange {
  int begin;
  int end;  ///< begin + kRangeBlocks at most
  uint32_t* chosen;
  int32_t* totals;  ///< (blocks, kHeadsMax), or
  bool last_only;   ///< (kHeadsMax), of the last block only
};
constexpr int kRangeBlocks = 16;

/// The half of a block that ScanProducts left.
HWY_INLINE void FetchRest(const uint8_t* block, int block_bytes) {
  for (int i = block_bytes / 2; i < block_bytes; i += 64) __builtin_prefetch(block + i, 0, 2);
}

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128 || HWY_HAVE_SCALABLE

void FillHead(const ProductTables& tables, int largest_unread, SelectHead& head) {
  const int above = kProductSumMax - tables.Top();
  for (int i = 0; i < kCentroids; ++i) {
    head.lift[i] = static_cast<uint8_t>(kProductSumMax - largest_unread);
    head.excess[i] = static_cast<uint8_t>(std::min(tables.excess_units[i] + above, kChosen));
    head.high[i] = tables.high[i];
    head.low[i] = tables.low[i];
  }
  head.shift = tables.shift;
}

/// Of `blocks` blocks' sums.
int LargestSum(const uint8_t* sums, int blocks) {
  return *std::max_element(sums, sums + static_cast<ptrdiff_t>(blocks) * kScanBlock);
}

/// Chooses and weighs; returns how many keys are chosen.
int SelectIn(const SelectCall& call, const SelectRange& range) {
  uint32_t* chosen = range.chosen;
  int32_t* totals = range.totals;
  for (int h = 0; h < call.count; ++h) totals[h] = 0;
  for (int b = range.begin; b < range.end; ++b) {
    const ptrdiff_t offset = static_cast<ptrdiff_t>(b) * call.block_bytes;
    if (call.next != nullptr) FetchRest(call.next + offset, call.block_bytes);
    if (!range.last_only && b > range.begin) {
      std::copy_n(totals, call.count, totals + kHeadsMax);
      totals += kHeadsMax;
    }
    for (int i = 0; i < kScanBlock; ++i) {
      const int key = b * kScanBlock + i;
      const int level = SymbolOf(call.codes + offset, call.symbols, call.symbols - 1, i);
      bool any = false;
      for (int h = 0; h < call.count; ++h) {
        any |= call.heads[h].sums[key] + call.heads[h].lift[i] >= kChosen;
      }
      if (any) *chosen++ = call.first_index + static_cast<uint32_t>(key);
      for (int h = 0; h < call.count; ++h) {
        const SelectHead& head = call.heads[h];
        const int lifted = head.sums[key] + head.lift[i];
        const int step = std::max(lifted - head.excess[level], 0) >> head.shift & (kCentroids - 1);
        head.weights[key] = any ? uint8_t{0} : head.high[step];
        if (!any) totals[h] += 256 * head.high[step] + head.low[step] - 128;
      }
    }
  }
  return static_cast<int>(chosen - range.chosen);
}

#else

constexpr int kByteVectors = kScanBlock / kByteLanes;

HWY_INLINE void FillHead(const ProductTables& tables, int largest_unread, SelectHead& head) {
  const D8 d8;
  const auto lift = hn::Set(d8, static_cast<uint8_t>(kProductSumMax - largest_unread));
  const auto above = hn::Set(d8, static_cast<uint8_t>(kProductSumMax - tables.Top()));
  const auto shifts = hn::Set(D16(), static_cast<uint16_t>(tables.shift));
  for (int i = 0; i < kCentroids; i += kByteLanes) {
    hn::Store(lift, d8, head.lift + i);
    hn::Store(hn::SaturatedAdd(hn::Load(d8, tables.excess_units + i), above), d8, head.excess + i);
    hn::Store(hn::Load(d8, tables.high + i), d8, head.high + i);
    hn::Store(hn::Load(d8, tables.low + i), d8, head.low + i);
    hn::Store(shifts, D16(), head.shifts + i / 2);
  }
  head.shift = tables.shift;
}

/// Of `blocks` blocks' sums.
HWY_INLINE int LargestSum(const uint8_t* sums, int blocks) {
  const D8 d8;
  auto most = hn::Zero(d8);
  for (int i = 0; i < blocks * kScanBlock; i += kByteLanes) {
    most = hn::Max(most, hn::Load(d8, sums + i));
  }
  HWY_ALIGN uint8_t lanes[kByteLanes];
  hn::Store(most, d8, lanes);
  const hn::CappedTag<uint8_t, 16> d16;
  auto few = hn::Load(d16, lanes);
  for (int i = 16; i < kByteLanes; i += 16) few = hn::Max(few, hn::Load(d16, lanes + i));
  few = hn::Max(few, hn::CombineShiftRightBytes<8>(d16, few, few));
  const hn::Repartition<uint64_t, decltype(d16)> d64;
  uint64_t eight = hn::GetLane(hn::BitCast(d64, few));
  int largest = 0;
  for (; eight != 0; eight >>= 8) largest = std::max(largest, static_cast<int>(eight & 255));
  return largest;
}

/// The low bits of every byte shifted down; what comes from its neighbour is in the top two.
HWY_INLINE V8 ShiftBytes(V8 bytes, const SelectHead& head) {
#if HWY_TARGET <= HWY_AVX3
  return V8{_mm512_srlv_epi16(bytes.raw, _mm512_load_si512(head.shifts))};
#else
  return hn::BitCast(D8(), hn::ShiftRightSame(hn::BitCast(D16(), bytes), head.shift));
#endif
}

/// The weights of the keys that are not chosen, 0 for the others.
HWY_INLINE V8 LookUpUnread(const uint8_t* table, const Index& step, hn::Mask<D8> chosen) {
#if HWY_TARGET <= HWY_AVX3_DL
  return V8{
      _mm512_maskz_permutexvar_epi8(_knot_mask64(chosen.raw), step.raw, _mm512_load_si512(table))};
#else
  return hn::IfThenZeroElse(chosen, LookUp(table, step));
#endif
}

using D32 = hn::Repartition<int32_t, D8>;
using V32 = hn::Vec<D32>;

#if HWY_TARGET <= HWY_AVX3_DL
#define KVSEEK_SELECT KVSEEK_VNNI
/// Adds bytes to lanes of any kind.
KVSEEK_VNNI HWY_INLINE V32 AddBytes(V32 sums, V8 bytes) {
  return V32{_mm512_dpbusd_epi32(sums.raw, bytes.raw, _mm512_set1_epi8(1))};
}
#else
#define KVSEEK_SELECT
HWY_INLINE V32 AddBytes(V32 sums, V8 bytes) {
  return hn::Add(sums, hn::BitCast(D32(), hn::SumsOf8(bytes)));
}
#endif

/// For kHeads heads; 0: for call.count.
template <int kHeads>
KVSEEK_SELECT HWY_NOINLINE int SelectInOf(const SelectCall& call, const SelectRange& range) {
  constexpr int kRoom = kHeads == 0 ? kHeadsMax : kHeads;
  const D8 d8;
  const int count = kHeads == 0 ? call.count : kHeads;
  const SelectHead* const heads = call.heads;
  const int block_bytes = call.block_bytes;
  V32 high_sums[kRoom];
  V32 low_sums[kRoom];
  for (int h = 0; h < count; ++h) high_sums[h] = low_sums[h] = hn::Zero(D32());
  const LastSymbols levels_of(call.symbols);
  const uint8_t* block = call.codes + static_cast<ptrdiff_t>(range.begin) * block_bytes;
  const ptrdiff_t ahead = call.next == nullptr ? 0 : call.next - call.codes;
  uint32_t* chosen = range.chosen;
  int32_t* totals = range.totals;
  const ptrdiff_t end = static_cast<ptrdiff_t>(range.end) * kScanBlock;
  ptrdiff_t at = static_cast<ptrdiff_t>(range.begin) * kScanBlock;
  BlockIndices indices(call.first_index + static_cast<uint32_t>(at));
  int unread = 0;
  while (at < end) {
    const ptrdiff_t stop = range.last_only ? end : at + kScanBlock;
    const uint32_t* const chosen_before = chosen;
    unread += static_cast<int>(stop - at);
    for (; at < stop; at += kScanBlock, block += block_bytes) {
      if (ahead != 0) FetchRest(block + ahead, block_bytes);
      hn::Mask<D8> any[kByteVectors];
      for (int v = 0; v < kByteVectors; ++v) {
        const ptrdiff_t i = at + v * kByteLanes;
        const Index levels = MakeIndex(levels_of.Load(block, v * kByteLanes));
        V8 lifted[kRoom];
        auto most = hn::Zero(d8);
        for (int h = 0; h < count; ++h) {
          lifted[h] =
              hn::SaturatedAdd(hn::Load(d8, heads[h].sums + i), hn::Load(d8, heads[h].lift));
          most = h == 0 ? lifted[0] : hn::Max(most, lifted[h]);
        }
        any[v] = hn::Eq(most, hn::Set(d8, kChosen));
        for (int h = 0; h < count; ++h) {
          const SelectHead& head = heads[h];
          const Index step =
              MakeIndex(ShiftBytes(hn::SaturatedSub(lifted[h], LookUp(head.excess, levels)), head));
          const auto high = LookUpUnread(head.high, step, any[v]);
          hn::Store(high, d8, head.weights + i);
          high_sums[h] = AddBytes(high_sums[h], high);
          low_sums[h] = AddBytes(low_sums[h], LookUpUnread(head.low, step, any[v]));
        }
      }
      chosen += indices.Put(MaskBits(d8, any), chosen);
    }
    unread -= static_cast<int>(chosen - chosen_before);
    for (int h = 0; h < count; h += 4) {
      V32 sums[4];
      for (int j = 0; j < 4; ++j) {
        sums[j] = hn::Zero(D32());
        if (h + j < count) sums[j] = hn::Add(hn::ShiftLeft<8>(high_sums[h + j]), low_sums[h + j]);
      }
      const hn::CappedTag<int32_t, 4> d4;
      HWY_ALIGN int32_t four[4];
      SumFour(D32(), sums, four);
      hn::StoreU(hn::Sub(hn::Load(d4, four), hn::Set(d4, 128 * unread)), d4, totals + h);
    }
    totals += kHeadsMax;
  }
  return static_cast<int>(chosen - range.chosen);
}

/// As the scalar level's.
HWY_INLINE int SelectIn(const SelectCall& call, const SelectRange& range) {
  switch (call.count) {
    case 1:
      return SelectInOf<1>(call, range);
    case 2:
      return SelectInOf<2>(call, range);
    case 3:
      return SelectInOf<3>(call, range);
    case 4:
      return SelectInOf<4>(call, range);
    case 5:
      return SelectInOf<5>(call, range);
    case 6:
      return SelectInOf<6>(call, range);
    case 7:
      return SelectInOf<7>(call, range);
    case 8:
      return SelectInOf<8>(call, range);
    default:
      return SelectInOf<0>(call, range);
  }
}

#endif

int SelectProductsImpl(const uint8_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                       const ProductLayout& layout, const ProductHead* heads, int count,
                       uint32_t first_index, const ProductResults& results,
                       const uint8_t* next_codes) {
  SelectHead select[kHeadsMax];
  float fine_units[kHeadsMax];  // what one of the totals weighs
  for (int h = 0; h < count; ++h) {
    SelectHead& head = select[h];
    head.sums = sums + static_cast<ptrdiff_t>(h) * sums_stride;
    head.weights = results.weights + static_cast<ptrdiff_t>(h) * results.weights_stride;
    int largest_unread = LargestUnread(heads[h]);
    if (largest_unread > kProductSumMax) {
      largest_unread = LargestSum(head.sums, blocks);
    }
    FillHead(*heads[h].tables, largest_unread, head);
    const float weight = WeightAt(heads[h], largest_unread);
    results.weight_units[h] = weight * (1.0F / 255.0F);
    fine_units[h] = weight * (1.0F / (255.0F * 256.0F));
    results.sums[h] = 0.0F;
  }
  const SelectCall call = {codes, next_codes, layout.BlockBytes(), layout.Symbols(), first_index,
                           count, select};
  int found = 0;
  const bool by_block = results.block_weights != nullptr;
  int32_t totals[kRangeBlocks * kHeadsMax];
  for (int b = 0; b < blocks; b += kRangeBlocks) {
    const int end = std::min(blocks, b + kRangeBlocks);
    found += SelectIn(call, {b, end, results.chosen + found, totals, !by_block});
    const int32_t* const last = by_block ? totals + (end - 1 - b) * kHeadsMax : totals;
    for (int h = 0; h < count; ++h) {
      results.sums[h] += fine_units[h] * static_cast<float>(last[h]);
    }
    if (!by_block) continue;
    for (int h = 0; h < count; ++h) {
      int32_t before = 0;
      float* const weights =
          results.block_weights + static_cast<ptrdiff_t>(h) * results.blocks_stride;
      for (int i = b; i < end; ++i) {
        const int32_t total = totals[(i - b) * kHeadsMax + h];
        weights[i] = fine_units[h] * static_cast<float>(total - before);
        before = total;
      }
    }
  }
  return found;
}

#undef KVSEEK_SELECT

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
