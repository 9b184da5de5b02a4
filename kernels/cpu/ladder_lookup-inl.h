// The inner loop of ScanCodes (ladder_scan.h), per SIMD level: LookUpHeads.
//
// Up to four table entries add up in int8. They are widened without unpacking: biased to unsigned
// bytes, a pair of keys is one uint16 lane w = even + 256 * odd; sum(w) and sum(w >> 8) give both
// keys' sums at the end, modulo 2^16.
#if defined(KVSEEK_KERNELS_CPU_LADDER_LOOKUP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSEEK_KERNELS_CPU_LADDER_LOOKUP_INL_H_
#undef KVSEEK_KERNELS_CPU_LADDER_LOOKUP_INL_H_
#else
#define KVSEEK_KERNELS_CPU_LADDER_LOOKUP_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/ladder_codes.h"
#include "kernels/cpu/sample.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

struct ScanShape {
  int symbols;
  int planes;
};

/// Blocks to be scanned: side by side, or anywhere. Where they are, and what is fetched while one
/// of them is worked on.
struct AdjacentBlocks {
  const uint8_t* codes;
  int count;
  int block_bytes;
  const uint8_t* next;  ///< as many blocks again that will be scanned next, or null

  HWY_INLINE const uint8_t* At(int b) const {
    return codes + static_cast<ptrdiff_t>(b) * block_bytes;
  }
  /// The first half of block b of what comes next into L2; SelectAndWeigh fetches the second. Pages
  /// are too small and segments too many for the hardware to guess.
  HWY_INLINE void Fetch(int b) const {
    if (next == nullptr) return;
    const uint8_t* const block = next + static_cast<ptrdiff_t>(b) * block_bytes;
    for (int i = 0; i < block_bytes / 2; i += 64) __builtin_prefetch(block + i, 0, 2);
  }
  void StopFetching() { next = nullptr; }
};

struct ScatteredBlocks {
  const uint8_t* const* codes;
  int count;
  int block_bytes;
  bool fetches = true;

  HWY_INLINE const uint8_t* At(int b) const { return codes[b]; }
  /// One of those that come soon.
  HWY_INLINE void Fetch(int b) const {
    if (!fetches || b + kSampleAhead >= count) return;
    const uint8_t* const block = codes[b + kSampleAhead];
    for (int i = 0; i < block_bytes; i += 64) __builtin_prefetch(block + i, 0, 3);
  }
  void StopFetching() { fetches = false; }
};

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128 || HWY_HAVE_SCALABLE

constexpr int kLookupHeads = 8;

/// Symbol g of one plane of one key.
HWY_INLINE int SymbolOf(const uint8_t* rows, int symbols, int g, int key) {
  const int quads = symbols / 4;
  const uint8_t* quad = rows + g / 4 * 3 * kScanBlock + key;
  if (g >= 4 * quads) return rows[(3 * quads + g - 4 * quads) * kScanBlock + key] & 63;
  if (g % 4 < 3) return quad[g % 4 * kScanBlock] & 63;
  return quad[0] >> 6 | quad[kScanBlock] >> 6 << 2 | quad[2 * kScanBlock] >> 6 << 4;
}

template <class Blocks>
HWY_INLINE void LookUpHeads(const Blocks& blocks, const ScanShape& shape, const int8_t* tables,
                            int heads, int16_t* sums, int sums_stride) {
  const int plane_bytes = PlaneRows(shape.symbols) * kScanBlock;
  const int table_bytes = shape.symbols * kTableSize;
  for (int b = 0; b < blocks.count; ++b, sums += kScanBlock) {
    const uint8_t* const codes = blocks.At(b);
    for (int key = 0; key < kScanBlock; ++key) {
      int totals[kLookupHeads] = {};
      for (int plane = 0; plane < shape.planes; ++plane) {
        for (int h = 0; h < heads; ++h) totals[h] *= 2;
        for (int g = 0; g < shape.symbols; ++g) {
          const int symbol = SymbolOf(codes + plane * plane_bytes, shape.symbols, g, key);
          const int8_t* table = tables + g * kTableSize + symbol;
          for (int h = 0; h < heads; ++h, table += table_bytes) totals[h] += *table;
        }
      }
      for (int h = 0; h < heads; ++h) {
        sums[static_cast<ptrdiff_t>(h) * sums_stride + key] = static_cast<int16_t>(totals[h]);
      }
    }
  }
}

#else

using D8 = hn::CappedTag<uint8_t, kScanBlock>;
using D16 = hn::Repartition<uint16_t, D8>;
using V8 = hn::Vec<D8>;
using V16 = hn::Vec<D16>;
constexpr int kByteLanes = static_cast<int>(hn::MaxLanes(D8()));

#if HWY_TARGET <= HWY_AVX3_DL

constexpr int kLookupHeads = 8;
/// What is prepared once for all heads; the instruction ignores the top two bits.
using Index = V8;
HWY_INLINE Index MakeIndex(V8 symbols) { return symbols; }
HWY_INLINE V8 LookUp(const uint8_t* table, const Index& index) {
  return V8{_mm512_permutexvar_epi8(index.raw, _mm512_loadu_si512(table))};
}

#elif HWY_ARCH_ARM_A64

constexpr int kLookupHeads = 4;
/// The instruction takes indices past the table for zero.
using Index = V8;
HWY_INLINE Index MakeIndex(V8 symbols) { return hn::And(symbols, hn::Set(D8(), 63)); }
HWY_INLINE V8 LookUp(const uint8_t* table, const Index& index) {
  return V8{vqtbl4q_u8(vld1q_u8_x4(table), index.raw)};
}

#else

constexpr int kLookupHeads = HWY_TARGET <= HWY_AVX3 ? 8 : 4;
/// One index for each 16 entries of the table, out of range (top bit set) for the other 48.
struct Index {
  V8 quarter[4];
};
HWY_INLINE Index MakeIndex(V8 symbols) {
  const D8 d;
  const auto bound = hn::Set(d, 0x70);
  const auto symbol = hn::And(symbols, hn::Set(d, 63));
  return {{hn::SaturatedAdd(symbol, bound),
           hn::SaturatedAdd(hn::Xor(symbol, hn::Set(d, 0x10)), bound),
           hn::SaturatedAdd(hn::Xor(symbol, hn::Set(d, 0x20)), bound),
           hn::SaturatedAdd(hn::Xor(symbol, hn::Set(d, 0x30)), bound)}};
}
HWY_INLINE V8 LookUp(const uint8_t* table, const Index& index) {
  const D8 d;
  const auto a = hn::TableLookupBytesOr0(hn::LoadDup128(d, table), index.quarter[0]);
  const auto b = hn::TableLookupBytesOr0(hn::LoadDup128(d, table + 16), index.quarter[1]);
  const auto c = hn::TableLookupBytesOr0(hn::LoadDup128(d, table + 32), index.quarter[2]);
  const auto e = hn::TableLookupBytesOr0(hn::LoadDup128(d, table + 48), index.quarter[3]);
  return hn::Or(hn::Or(a, b), hn::Or(c, e));
}

#endif

constexpr int kGroupsMax = (Symbols(512) + 3) / 4;
constexpr uint8_t kBias = 0x80;

/// Tables of kHeads heads. Symbols are added in groups of four (the last one of fewer); the last
/// table of every group is copied with the bias that makes the group's sum an unsigned byte.
template <int kHeads>
struct Tables {
  Tables(const int8_t* tables, int symbols)
      : plain(reinterpret_cast<const uint8_t*>(tables)),
        head_bytes(static_cast<ptrdiff_t>(symbols) * kTableSize) {
    const D8 d;
    for (int h = 0; h < kHeads; ++h) {
      for (int group = 0; 4 * group < symbols; ++group) {
        const int last = 4 * group + 3 < symbols ? 4 * group + 3 : symbols - 1;
        for (int i = 0; i < kTableSize; i += kByteLanes) {
          const auto entries = hn::LoadU(d, Plain(h, last) + i);
          hn::Store(hn::Xor(entries, hn::Set(d, kBias)), d, biased[h][group] + i);
        }
      }
    }
  }
  const uint8_t* Plain(int h, int symbol) const {
    return plain + h * head_bytes + symbol * kTableSize;
  }

  const uint8_t* plain;
  ptrdiff_t head_bytes;
  alignas(64) uint8_t biased[kHeads][kGroupsMax][kTableSize];
};

/// Running sums of kHeads heads: all = sum(w), odd = sum(w >> 8).
template <int kHeads>
struct WideSums {
  V16 all[kHeads];
  V16 odd[kHeads];
};

HWY_INLINE void Widen(V8 sum, V16* all, V16* odd) {
  const D16 d16;
  const auto pair = hn::BitCast(d16, sum);
  *all = hn::Add(*all, pair);
  *odd = hn::Add(*odd, hn::ShiftRight<8>(pair));
}

/// The fourth symbol of a quad, from the top bits of its three rows; its own top bits are anything.
HWY_INLINE V8 FourthSymbol(V8 row0, V8 row1, V8 row2) {
  const D8 d8;
  const D16 d16;
  const auto low = hn::BitCast(d8, hn::ShiftRight<6>(hn::BitCast(d16, row0)));
  const auto middle = hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, row1)));
  const auto high = hn::BitCast(d8, hn::ShiftRight<2>(hn::BitCast(d16, row2)));
#if HWY_TARGET <= HWY_AVX3
  constexpr int kPick =
      0xca;  // bits of the second operand where the first has ones, else the third
  const __m512i low_middle =
      _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x03), low.raw, middle.raw, kPick);
  return V8{_mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0f), low_middle, high.raw, kPick)};
#else
  const auto low_middle =
      hn::Or(hn::And(low, hn::Set(d8, 0x03)), hn::And(middle, hn::Set(d8, 0x0c)));
  return hn::Or(low_middle, hn::And(high, hn::Set(d8, 0x30)));
#endif
}

/// Where a plane of a block has its keys' last symbols: the low six bits of a row, or the top two
/// of three.
struct LastSymbols {
  explicit LastSymbols(int symbols)
      : last((PlaneRows(symbols) - 1) * kScanBlock), top_bits(symbols % 4 == 0) {}
  /// Bytes whose low six bits are these symbols, kByteLanes of them from i on.
  HWY_INLINE V8 Load(const uint8_t* plane, int i) const {
    const D8 d8;
    const uint8_t* const row = plane + last + i;
    const auto bytes = hn::LoadU(d8, row);
    if (!top_bits) return bytes;
    return FourthSymbol(hn::LoadU(d8, row - 2 * kScanBlock), hn::LoadU(d8, row - kScanBlock),
                        bytes);
  }

  ptrdiff_t last;
  bool top_bits;
};

template <int kHeads>
HWY_INLINE void AddSymbol(V8 row, int symbol, const Tables<kHeads>& tables, V8* sum) {
  const Index index = MakeIndex(row);
  for (int h = 0; h < kHeads; ++h) {
    sum[h] = hn::Add(sum[h], LookUp(tables.Plain(h, symbol), index));
  }
}

/// Adds one plane of kByteLanes keys.
template <int kHeads>
HWY_INLINE void AddPlane(const uint8_t* rows, int symbols, const Tables<kHeads>& tables,
                         WideSums<kHeads>& sums) {
  const D8 d8;
  const int groups = symbols / 4;
  for (int group = 0; group < groups; ++group, rows += 3 * kScanBlock) {
    const auto row0 = hn::LoadU(d8, rows);
    const auto row1 = hn::LoadU(d8, rows + kScanBlock);
    const auto row2 = hn::LoadU(d8, rows + 2 * kScanBlock);
    V8 sum[kHeads];
    const Index last = MakeIndex(FourthSymbol(row0, row1, row2));
    for (int h = 0; h < kHeads; ++h) sum[h] = LookUp(tables.biased[h][group], last);
    AddSymbol(row0, 4 * group, tables, sum);
    AddSymbol(row1, 4 * group + 1, tables, sum);
    AddSymbol(row2, 4 * group + 2, tables, sum);
    for (int h = 0; h < kHeads; ++h) Widen(sum[h], &sums.all[h], &sums.odd[h]);
  }
  const int rest = symbols - 4 * groups;
  if (rest == 0) return;
  V8 sum[kHeads];
  const Index last = MakeIndex(hn::LoadU(d8, rows + (rest - 1) * kScanBlock));
  for (int h = 0; h < kHeads; ++h) sum[h] = LookUp(tables.biased[h][groups], last);
  for (int r = 0; r + 1 < rest; ++r) {
    AddSymbol(hn::LoadU(d8, rows + r * kScanBlock), 4 * groups + r, tables, sum);
  }
  for (int h = 0; h < kHeads; ++h) Widen(sum[h], &sums.all[h], &sums.odd[h]);
}

/// Puts the sums of even and odd keys in order.
HWY_INLINE void StoreSums(V16 all, V16 biased_odd, V16 bias, int16_t* sums) {
  [[maybe_unused]] const D16 d16;
  const hn::RebindToSigned<D16> di16;
  const auto even = hn::Sub(hn::Sub(all, hn::ShiftLeft<8>(biased_odd)), bias);
  const auto odd = hn::Sub(biased_odd, bias);
#if HWY_TARGET <= HWY_AVX3
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const auto first = hn::Load(d16, kOrder);
  const auto second = hn::Add(first, hn::Set(d16, 16));
  using VI16 = hn::Vec<decltype(di16)>;
  hn::Store(VI16{_mm512_permutex2var_epi16(even.raw, first.raw, odd.raw)}, di16, sums);
  hn::Store(VI16{_mm512_permutex2var_epi16(even.raw, second.raw, odd.raw)}, di16, sums + 32);
#else
  hn::StoreInterleaved2(hn::BitCast(di16, even), hn::BitCast(di16, odd), di16, sums);
#endif
}

template <int kHeads, class Blocks>
HWY_NOINLINE void LookUpT(const Blocks& blocks, const ScanShape& shape, const int8_t* head_tables,
                          int16_t* sums, int sums_stride) {
  const D16 d16;
  const Tables<kHeads> tables(head_tables, shape.symbols);
  const int plane_bytes = PlaneRows(shape.symbols) * kScanBlock;
  const int widened = (shape.symbols + 3) / 4 * (shape.planes == 2 ? 3 : 1);
  const auto bias = hn::Set(d16, static_cast<uint16_t>(widened * kBias));
  for (int b = 0; b < blocks.count; ++b) {
    blocks.Fetch(b);
    const uint8_t* const codes = blocks.At(b);
    for (int i = 0; i < kScanBlock; i += kByteLanes, sums += kByteLanes) {
      WideSums<kHeads> wide;
      for (int h = 0; h < kHeads; ++h) wide.all[h] = wide.odd[h] = hn::Zero(d16);
      AddPlane<kHeads>(codes + i, shape.symbols, tables, wide);
      if (shape.planes == 2) {
        for (int h = 0; h < kHeads; ++h) {
          wide.all[h] = hn::Add(wide.all[h], wide.all[h]);
          wide.odd[h] = hn::Add(wide.odd[h], wide.odd[h]);
        }
        AddPlane<kHeads>(codes + plane_bytes + i, shape.symbols, tables, wide);
      }
      for (int h = 0; h < kHeads; ++h) {
        StoreSums(wide.all[h], wide.odd[h], bias, sums + static_cast<ptrdiff_t>(h) * sums_stride);
      }
    }
  }
}

template <class Blocks>
HWY_INLINE void LookUpHeads(const Blocks& blocks, const ScanShape& shape, const int8_t* tables,
                            int heads, int16_t* sums, int sums_stride) {
  switch (heads) {
    case 1:
      return LookUpT<1>(blocks, shape, tables, sums, sums_stride);
    case 2:
      return LookUpT<2>(blocks, shape, tables, sums, sums_stride);
    case 3:
      return LookUpT<3>(blocks, shape, tables, sums, sums_stride);
    case 4:
      return LookUpT<4>(blocks, shape, tables, sums, sums_stride);
    case 5:
      return LookUpT<5>(blocks, shape, tables, sums, sums_stride);
    case 6:
      return LookUpT<6>(blocks, shape, tables, sums, sums_stride);
    case 7:
      return LookUpT<7>(blocks, shape, tables, sums, sums_stride);
    default:
      return LookUpT<8>(blocks, shape, tables, sums, sums_stride);
  }
}

#endif

/// Adds up table entries for every key of the blocks: sums[h * sums_stride + key].
template <class Blocks>
HWY_INLINE void LookUpAll(Blocks blocks, const ScanShape& shape, const int8_t* tables, int heads,
                          int16_t* sums, int sums_stride) {
  for (int h = 0; h < heads; h += kLookupHeads) {
    LookUpHeads(blocks, shape, tables + static_cast<ptrdiff_t>(h) * shape.symbols * kTableSize,
                std::min(kLookupHeads, heads - h), sums + static_cast<ptrdiff_t>(h) * sums_stride,
                sums_stride);
    blocks.StopFetching();
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
