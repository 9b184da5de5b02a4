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

/// Of weighed blocks [begin, end), kRangeBlocks at most. Totals are sums of 256 * high + low - 128
/// over all keys of the range so far that are not chosen.
struct WeighRange {
  int begin;
  int end;
  WeighedBlocks blocks;
  int32_t* totals;  ///< (blocks, kHeadsMax), or
  bool last_only;   ///< (kHeadsMax), of the last block only

  int BlockOf(int i) const { return blocks.first + i * blocks.step; }
};
constexpr int kRangeBlocks = 16;

/// The half of a block's codes that ScanProducts left.
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

/// Whether some head chooses a key.
bool IsChosen(const SelectCall& call, int key) {
  return std::any_of(call.heads, call.heads + call.count, [key](const SelectHead& head) {
    return head.sums[key] + head.lift[0] >= kChosen;
  });
}

/// Returns how many keys of `blocks` blocks are chosen.
int Choose(const SelectCall& call, int blocks, uint32_t* chosen) {
  const uint32_t* const begin = chosen;
  for (int b = 0; b < blocks; ++b) {
    if (call.next != nullptr) {
      FetchRest(call.next + static_cast<ptrdiff_t>(b) * call.block_bytes, call.block_bytes);
    }
    for (int key = b * kScanBlock; key < (b + 1) * kScanBlock; ++key) {
      if (IsChosen(call, key)) *chosen++ = call.first_index + static_cast<uint32_t>(key);
    }
  }
  return static_cast<int>(chosen - begin);
}

void Weigh(const SelectCall& call, const WeighRange& range) {
  int32_t* totals = range.totals;
  for (int h = 0; h < call.count; ++h) totals[h] = 0;
  for (int w = range.begin; w < range.end; ++w) {
    if (!range.last_only && w > range.begin) {
      std::copy_n(totals, call.count, totals + kHeadsMax);
      totals += kHeadsMax;
    }
    const int block = range.BlockOf(w);
    const uint8_t* const codes = call.codes + static_cast<ptrdiff_t>(block) * call.block_bytes;
    for (int i = 0; i < kScanBlock; ++i) {
      const int key = block * kScanBlock + i;
      const int level = SymbolOf(codes, call.symbols, call.symbols - 1, i);
      const bool any = IsChosen(call, key);
      for (int h = 0; h < call.count; ++h) {
        const SelectHead& head = call.heads[h];
        const int lifted = head.sums[key] + head.lift[i];
        const int step = std::max(lifted - head.excess[level], 0) >> head.shift & (kCentroids - 1);
        head.weights[w * kScanBlock + i] = any ? uint8_t{0} : head.high[step];
        if (!any) totals[h] += 256 * head.high[step] + head.low[step] - 128;
      }
    }
  }
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

/// kByteLanes keys of all heads from `at` on, lifted; returns the largest of each.
template <int kHeads>
HWY_INLINE V8 Lift(const SelectCall& call, int count, ptrdiff_t at, V8* lifted) {
  const D8 d8;
  auto most = hn::Zero(d8);
  for (int h = 0; h < count; ++h) {
    const SelectHead& head = call.heads[h];
    const auto sum = hn::SaturatedAdd(hn::Load(d8, head.sums + at), hn::Load(d8, head.lift));
    if (lifted != nullptr) lifted[h] = sum;
    most = h == 0 ? sum : hn::Max(most, sum);
  }
  return most;
}

/// As the scalar level's, for kHeads heads; 0: for call.count.
template <int kHeads>
HWY_NOINLINE int ChooseOf(const SelectCall& call, int blocks, uint32_t* chosen) {
  const D8 d8;
  const int count = kHeads == 0 ? call.count : kHeads;
  const uint32_t* const begin = chosen;
  const uint8_t* next = call.next;
  BlockIndices indices(call.first_index);
  for (int b = 0; b < blocks; ++b) {
    if (next != nullptr) {
      FetchRest(next, call.block_bytes);
      next += call.block_bytes;
    }
    hn::Mask<D8> any[kByteVectors];
    for (int v = 0; v < kByteVectors; ++v) {
      const ptrdiff_t at = static_cast<ptrdiff_t>(b) * kScanBlock + v * kByteLanes;
      any[v] = hn::Eq(Lift<kHeads>(call, count, at, nullptr), hn::Set(d8, kChosen));
    }
    chosen += indices.Put(MaskBits(d8, any), chosen);
  }
  return static_cast<int>(chosen - begin);
}

template <int kHeads>
KVSEEK_SELECT HWY_NOINLINE void WeighOf(const SelectCall& call, const WeighRange& range) {
  constexpr int kRoom = kHeads == 0 ? kHeadsMax : kHeads;
  const D8 d8;
  const int count = kHeads == 0 ? call.count : kHeads;
  const SelectHead* const heads = call.heads;
  V32 high_sums[kRoom];
  V32 low_sums[kRoom];
  for (int h = 0; h < count; ++h) high_sums[h] = low_sums[h] = hn::Zero(D32());
  const LastSymbols levels_of(call.symbols);
  int32_t* totals = range.totals;
  int unread = 0;
  for (int w = range.begin; w < range.end; ++w) {
    const int number = range.BlockOf(w);
    const uint8_t* const block = call.codes + static_cast<ptrdiff_t>(number) * call.block_bytes;
    hn::Mask<D8> any[kByteVectors];
    for (int v = 0; v < kByteVectors; ++v) {
      const int i = v * kByteLanes;
      const Index levels = MakeIndex(levels_of.Load(block, i));
      V8 lifted[kRoom];
      const auto most =
          Lift<kHeads>(call, count, static_cast<ptrdiff_t>(number) * kScanBlock + i, lifted);
      any[v] = hn::Eq(most, hn::Set(d8, kChosen));
      for (int h = 0; h < count; ++h) {
        const SelectHead& head = heads[h];
        const Index step =
            MakeIndex(ShiftBytes(hn::SaturatedSub(lifted[h], LookUp(head.excess, levels)), head));
        const auto high = LookUpUnread(head.high, step, any[v]);
        hn::Store(high, d8, head.weights + static_cast<ptrdiff_t>(w) * kScanBlock + i);
        high_sums[h] = AddBytes(high_sums[h], high);
        low_sums[h] = AddBytes(low_sums[h], LookUpUnread(head.low, step, any[v]));
      }
    }
    unread += kScanBlock - std::popcount(MaskBits(d8, any));
    if (range.last_only && w + 1 < range.end) continue;
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
}

/// Calls function.operator()<heads>(), or <0> where they are many.
template <class Function>
HWY_INLINE auto ForHeads(int heads, const Function& function) {
  switch (heads) {
    case 1:
      return function.template operator()<1>();
    case 2:
      return function.template operator()<2>();
    case 3:
      return function.template operator()<3>();
    case 4:
      return function.template operator()<4>();
    case 5:
      return function.template operator()<5>();
    case 6:
      return function.template operator()<6>();
    case 7:
      return function.template operator()<7>();
    case 8:
      return function.template operator()<8>();
    default:
      return function.template operator()<0>();
  }
}

HWY_INLINE int Choose(const SelectCall& call, int blocks, uint32_t* chosen) {
  return ForHeads(call.count, [&]<int kHeads>() { return ChooseOf<kHeads>(call, blocks, chosen); });
}

HWY_INLINE void Weigh(const SelectCall& call, const WeighRange& range) {
  ForHeads(call.count, [&]<int kHeads>() { WeighOf<kHeads>(call, range); });
}

#endif

int SelectProductsImpl(const uint8_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                       WeighedBlocks weighed, const ProductLayout& layout, const ProductHead* heads,
                       int count, uint32_t first_index, const ProductResults& results,
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
  const int found = Choose(call, blocks, results.chosen);
  const bool by_block = results.block_weights != nullptr;
  const int weighed_blocks = weighed.Count(blocks);
  int32_t totals[kRangeBlocks * kHeadsMax];
  for (int w = 0; w < weighed_blocks; w += kRangeBlocks) {
    const int end = std::min(weighed_blocks, w + kRangeBlocks);
    Weigh(call, {w, end, weighed, totals, !by_block});
    const int32_t* const last = by_block ? totals + (end - 1 - w) * kHeadsMax : totals;
    for (int h = 0; h < count; ++h) {
      results.sums[h] += fine_units[h] * static_cast<float>(last[h]);
    }
    if (!by_block) continue;
    for (int h = 0; h < count; ++h) {
      int32_t before = 0;
      float* const weights =
          results.block_weights + static_cast<ptrdiff_t>(h) * results.blocks_stride;
      for (int i = w; i < end; ++i) {
        const int32_t total = totals[(i - w) * kHeadsMax + h];
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
                   WeighedBlocks weighed, const ProductLayout& layout, const ProductHead* heads,
                   int count, uint32_t first_index, const ProductResults& results,
                   const uint8_t* next_codes) noexcept {
  assert(count <= kHeadsMax && results.weights_stride % kScanBlock == 0);
  assert(weighed.step >= 1 && weighed.first < std::min(weighed.step, std::max(blocks, 1)));
  return HWY_DYNAMIC_DISPATCH(SelectProductsImpl)(sums, sums_stride, codes, blocks, weighed, layout,
                                                  heads, count, first_index, results, next_codes);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
