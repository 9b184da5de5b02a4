#include "kernels/cpu/product_scan.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>

#include "kernels/cpu/log_bits.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/product_scan.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_lanes-inl.h"
#include "kernels/cpu/ladder_lookup-inl.h"

#ifndef KVSEEK_KERNELS_CPU_PRODUCT_SCAN_ONCE
#define KVSEEK_KERNELS_CPU_PRODUCT_SCAN_ONCE
namespace kvseek::kernels {
namespace {

inline constexpr int kHeadsMax = 64;
inline constexpr float kLogBias = static_cast<float>(kLogOne) - kLogExcess;

inline constexpr int kSumShift = 4;  // a sum, times 16, fits 16 bits
inline constexpr float kBitsMax = kLogBias + kLogNat * kExponentMax;

/// Integers for SelectProducts. A key is chosen if its sum exceeds `bound`; its weight's bits are,
/// shifted left by `shift`,
///   (16 * sum * slope + 2^14 >> 15) + rest[level]
/// at most `most`, and 0 from `least` down.
struct SelectHead {
  SelectHead() = default;
  explicit SelectHead(const ProductHead& head) : shift(0) {
    const ProductTables& tables = *head.tables;
    const float base = head.centre + tables.base;
    if (tables.unit > 0.0F) {
      bound = Rounded(std::floor((head.threshold - base) / tables.unit));
    } else {
      bound = base > head.threshold ? int16_t{-32768} : int16_t{32767};
    }
    const float bits = kLogNat * tables.unit;  // of one unit of sum
    float scale = 1.0F;
    while (shift < 7 && bits * scale >= 16.0F) {
      ++shift;
      scale *= 0.5F;
    }
    constexpr float kFixed = 32768.0F / (1 << kSumShift);
    slope = Rounded(kFixed * scale * bits);
    most = Rounded(scale * kBitsMax);
    least = Rounded(scale * static_cast<float>(kLogLeast));
    offset = scale * (kLogNat * (base - head.reference) + kLogBias);
    excess_step = scale * kLogNat;
  }
  static int16_t Rounded(float x) {
    return static_cast<int16_t>(std::lrint(std::clamp(x, -32768.0F, 32767.0F)));
  }

  int shift;
  int16_t bound;
  int16_t slope;
  int16_t most;
  int16_t least;
  float offset;
  float excess_step;
  alignas(64) int16_t rest[kCentroids];
  alignas(64) uint8_t rest_bytes[2][kCentroids];  ///< low and high, where levels look up bytes
};

}  // namespace
}  // namespace kvseek::kernels
#endif  // KVSEEK_KERNELS_CPU_PRODUCT_SCAN_ONCE

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

void ScanProductsImpl(const uint8_t* codes, int blocks, const ProductLayout& layout,
                      const int8_t* entries, int heads, int16_t* sums, int sums_stride,
                      const uint8_t* next_codes) {
  const int symbols = layout.Symbols();
  ScanShape shape = {blocks, symbols, 1, layout.BlockBytes(), next_codes};
  for (int h = 0; h < heads; h += kLookupHeads, shape.next = nullptr) {
    LookUpHeads(codes, shape, entries + static_cast<ptrdiff_t>(h) * symbols * kTableSize,
                std::min(kLookupHeads, heads - h), sums + static_cast<ptrdiff_t>(h) * sums_stride,
                sums_stride);
  }
}

void EstimateProductsImpl(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                          const ProductLayout& layout, const ProductHead* heads, int count,
                          float* estimates, float* weights, float* deviations, int stride) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<int16_t, DF> d16;
  for (int h = 0; h < count; ++h) {
    const ProductHead& head = heads[h];
    const ProductTables& tables = *head.tables;
    const auto unit = hn::Set(d, tables.unit);
    const auto base = hn::Set(d, head.centre + tables.base);
    const int16_t* const head_sums = sums + static_cast<ptrdiff_t>(h) * sums_stride;
    float* const out = estimates + static_cast<ptrdiff_t>(h) * stride;
    for (int i = 0; i < blocks * kScanBlock; i += kLanes) {
      const auto sum = hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(d16, head_sums + i)));
      hn::StoreU(hn::MulAdd(unit, sum, base), d, out + i);
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

/// head.rest := offset - excess_step * excess, in 16 bits.
HWY_INLINE void FillRest(const float* excess, SelectHead& head) {
  const DF d;
  const hn::Rebind<int16_t, DF> d16;
  const auto low = hn::Set(d, -32768.0F);
  const auto high = hn::Set(d, 32767.0F);
  for (int c = 0; c < kCentroids; c += kLanes) {
    const auto rest = hn::NegMulAdd(hn::LoadU(d, excess + c), hn::Set(d, head.excess_step),
                                    hn::Set(d, head.offset));
    const auto bounded = hn::NearestInt(hn::Max(hn::Min(rest, high), low));
    hn::Store(hn::DemoteTo(d16, bounded), d16, head.rest + c);
  }
#if HWY_TARGET <= HWY_AVX3_DL
  for (int c = 0; c < kCentroids; c += 32) {
    const __m512i rest = _mm512_load_si512(head.rest + c);
    _mm256_store_si256(reinterpret_cast<__m256i*>(head.rest_bytes[0] + c),
                       _mm512_cvtepi16_epi8(rest));
    _mm256_store_si256(reinterpret_cast<__m256i*>(head.rest_bytes[1] + c),
                       _mm512_cvtepi16_epi8(_mm512_srli_epi16(rest, 8)));
  }
#elif HWY_TARGET > HWY_AVX3 && HWY_TARGET != HWY_SCALAR
  for (int c = 0; c < kCentroids; ++c) {
    head.rest_bytes[0][c] = static_cast<uint8_t>(head.rest[c]);
    head.rest_bytes[1][c] = static_cast<uint8_t>(head.rest[c] >> 8);
  }
#endif
}

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128 || HWY_HAVE_SCALABLE

/// The levels of one block.
struct Levels {
  Levels(const uint8_t* block, const ProductLayout& layout) {
    for (int key = 0; key < kScanBlock; ++key) {
      level[key] = SymbolOf(block, layout.Symbols(), layout.subspaces, key);
    }
  }
  /// out[key] := head.rest[level of key].
  void LookUpRest(const SelectHead& head, int16_t* out) const {
    for (int key = 0; key < kScanBlock; ++key) out[key] = head.rest[level[key]];
  }
  int level[kScanBlock];
};

#else

/// Rows of bytes whose low six bits are the levels of a block's keys, kByteLanes of them from i on.
HWY_INLINE V8 LevelBytes(const uint8_t* block, const ProductLayout& layout, int i) {
  const D8 d8;
  const int symbols = layout.Symbols();
  const uint8_t* const rows = block + (PlaneRows(symbols) - 1) * kScanBlock + i;
  const auto last = hn::LoadU(d8, rows);
  if (symbols % 4 != 0) return last;
  return FourthSymbol(hn::LoadU(d8, rows - 2 * kScanBlock), hn::LoadU(d8, rows - kScanBlock), last);
}

#if HWY_TARGET <= HWY_AVX3_DL

struct Levels {
  Levels(const uint8_t* block, const ProductLayout& layout) {
    // In the order that unpacking puts right again.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    level = _mm512_permutexvar_epi64(order, LevelBytes(block, layout, 0).raw);
  }
  void LookUpRest(const SelectHead& head, __m512i* rest) const {
    // The instruction ignores all but six bits of an index.
    const __m512i low = _mm512_permutexvar_epi8(level, _mm512_load_si512(head.rest_bytes[0]));
    const __m512i high = _mm512_permutexvar_epi8(level, _mm512_load_si512(head.rest_bytes[1]));
    rest[0] = _mm512_unpacklo_epi8(low, high);
    rest[1] = _mm512_unpackhi_epi8(low, high);
  }
  __m512i level;
};

#elif HWY_TARGET <= HWY_AVX3

struct Levels {
  Levels(const uint8_t* block, const ProductLayout& layout) {
    const __m512i bytes = LevelBytes(block, layout, 0).raw;
    level[0] = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(bytes));
    level[1] = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(bytes, 1));
  }
  void LookUpRest(const SelectHead& head, __m512i* rest) const {
    const __m512i low = _mm512_load_si512(head.rest);
    const __m512i high = _mm512_load_si512(head.rest + 32);
    // The instruction ignores all but six bits of an index.
    rest[0] = _mm512_permutex2var_epi16(low, level[0], high);
    rest[1] = _mm512_permutex2var_epi16(low, level[1], high);
  }
  __m512i level[2];
};

#else

struct Levels {
  Levels(const uint8_t* block, const ProductLayout& layout) {
    for (int i = 0; i < kScanBlock; i += kByteLanes) {
      level[i / kByteLanes] = MakeIndex(LevelBytes(block, layout, i));
    }
  }
  void LookUpRest(const SelectHead& head, int16_t* out) const {
    const D8 d8;
    auto* const bytes = reinterpret_cast<uint8_t*>(out);
    for (int i = 0; i < kScanBlock; i += kByteLanes) {
      const Index& index = level[i / kByteLanes];
      hn::StoreInterleaved2(LookUp(head.rest_bytes[0], index), LookUp(head.rest_bytes[1], index),
                            d8, bytes + 2 * i);
    }
  }
  Index level[kScanBlock / kByteLanes];
};

#endif
#endif

#if HWY_TARGET <= HWY_AVX3

/// Which keys of a block no head chooses: one bit each.
struct Kept {
  Kept(const int16_t* sums, int sums_stride, const SelectHead* heads, int count) {
    __mmask32 low = 0;
    __mmask32 high = 0;
    for (int h = 0; h < count; ++h, sums += sums_stride) {
      const __m512i bound = _mm512_set1_epi16(heads[h].bound);
      low |= _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(sums), bound);
      high |= _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(sums + 32), bound);
    }
    chosen = low | static_cast<uint64_t>(high) << 32;
  }
  uint64_t chosen;
};

/// Weights of one head's keys of a block; returns their sum, lane by lane.
HWY_INLINE hn::Vec<DF> WeighBlock(const int16_t* sums, const SelectHead& head, const Levels& levels,
                                  const Kept& kept, uint16_t* weights) {
  const DF d;
  const hn::CappedTag<int16_t, 32> d16;
  __m512i rest[2];
  levels.LookUpRest(head, rest);
  const __m512i slope = _mm512_set1_epi16(head.slope);
  const __m512i most = _mm512_set1_epi16(head.most);
  const __m512i least = _mm512_set1_epi16(head.least);
  const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>(head.shift));
  auto total = hn::Zero(d);
  for (int v = 0; v < 2; ++v) {
    const __m512i sum = _mm512_slli_epi16(_mm512_loadu_si512(sums + 32 * v), kSumShift);
    const __m512i exponent = _mm512_adds_epi16(_mm512_mulhrs_epi16(sum, slope), rest[v]);
    const auto unread = static_cast<__mmask32>(~kept.chosen >> (32 * v));
    const __mmask32 counts = _mm512_mask_cmpgt_epi16_mask(unread, exponent, least);
    const __m512i weight = _mm512_maskz_sllv_epi16(counts, _mm512_min_epi16(exponent, most), shift);
    _mm512_storeu_si512(weights + 32 * v, weight);
    total = hn::Add(total, SumPairs(d, hn::Vec<decltype(d16)>{weight}));
  }
  return total;
}

#else

/// Which keys of a block no head chooses: all bits of 16 set.
struct Kept {
  Kept(const int16_t* sums, int sums_stride, const SelectHead* heads, int count) {
    const hn::CappedTag<int16_t, 32> d16;
    constexpr int kLanes16 = static_cast<int>(hn::MaxLanes(decltype(d16)()));
    hn::Mask<decltype(d16)> any[kScanBlock / kLanes16];
    for (int v = 0; v < kScanBlock / kLanes16; ++v) {
      any[v] = hn::MaskFromVec(hn::Zero(d16));
      for (int h = 0; h < count; ++h) {
        const auto sum =
            hn::LoadU(d16, sums + static_cast<ptrdiff_t>(h) * sums_stride + v * kLanes16);
        any[v] = hn::Or(any[v], hn::Gt(sum, hn::Set(d16, heads[h].bound)));
      }
      hn::Store(hn::VecFromMask(d16, hn::Not(any[v])), d16, unread + v * kLanes16);
    }
    chosen = MaskBits(d16, any);
  }
  uint64_t chosen;
  HWY_ALIGN int16_t unread[kScanBlock];
};

/// Weights of one head's keys of a block; returns their sum, lane by lane.
HWY_INLINE hn::Vec<DF> WeighBlock(const int16_t* sums, const SelectHead& head, const Levels& levels,
                                  const Kept& kept, uint16_t* weights) {
  const DF d;
  const hn::CappedTag<int16_t, 32> d16;
  const hn::RebindToUnsigned<decltype(d16)> du16;
  constexpr int kLanes16 = static_cast<int>(hn::MaxLanes(decltype(d16)()));
  HWY_ALIGN int16_t rest[kScanBlock];
  levels.LookUpRest(head, rest);
  const auto slope = hn::Set(d16, head.slope);
  const auto most = hn::Set(d16, head.most);
  const auto least = hn::Set(d16, head.least);
  auto total = hn::Zero(d);
  for (int i = 0; i < kScanBlock; i += kLanes16) {
    const auto sum = hn::ShiftLeft<kSumShift>(hn::LoadU(d16, sums + i));
    const auto exponent =
        hn::SaturatedAdd(hn::MulFixedPoint15(sum, slope), hn::Load(d16, rest + i));
    const auto bits = hn::IfThenElseZero(hn::Gt(exponent, least), hn::Min(exponent, most));
    const auto weight = hn::BitCast(
        du16, hn::And(hn::ShiftLeftSame(bits, head.shift), hn::Load(d16, kept.unread + i)));
    hn::StoreU(weight, du16, weights + i);
    total = hn::Add(total, SumPairs(d, weight));
  }
  return total;
}

#endif

int SelectProductsImpl(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                       const ProductLayout& layout, const ProductHead* heads, int count,
                       uint32_t first_index, uint32_t* chosen, uint16_t* weights,
                       int weights_stride, float* block_weights, int blocks_stride,
                       const uint8_t* next_codes) {
  const DF d;
  const int block_bytes = layout.BlockBytes();
  SelectHead select[kHeadsMax];
  for (int h = 0; h < count; ++h) {
    select[h] = SelectHead(heads[h]);
    FillRest(heads[h].tables->excess, select[h]);
  }
  uint32_t* next_chosen = chosen;
  for (int b = 0; b < blocks; ++b, codes += block_bytes) {
    if (next_codes != nullptr) {  // the half that ScanProducts left
      const uint8_t* block = next_codes + static_cast<ptrdiff_t>(b) * block_bytes;
      for (int i = block_bytes / 2; i < block_bytes; i += 64) __builtin_prefetch(block + i, 0, 2);
    }
    const Kept kept(sums + b * kScanBlock, sums_stride, select, count);
    next_chosen +=
        PutIndices(kept.chosen, first_index + static_cast<uint32_t>(b * kScanBlock), next_chosen);
    const Levels levels(codes, layout);
    for (int h = 0; h < count; h += 4) {
      hn::Vec<DF> totals[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
      const int some = std::min(4, count - h);
      for (int j = 0; j < some; ++j) {
        totals[j] =
            WeighBlock(sums + static_cast<ptrdiff_t>(h + j) * sums_stride + b * kScanBlock,
                       select[h + j], levels, kept,
                       weights + static_cast<ptrdiff_t>(h + j) * weights_stride + b * kScanBlock);
      }
      float sums_of_four[4];
      SumFour(d, totals, sums_of_four);
      for (int j = 0; j < some; ++j) {
        block_weights[static_cast<ptrdiff_t>(h + j) * blocks_stride + b] = sums_of_four[j];
      }
    }
  }
  return static_cast<int>(next_chosen - chosen);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(ScanProductsImpl);
HWY_EXPORT(EstimateProductsImpl);
HWY_EXPORT(SelectProductsImpl);

void ScanProducts(const uint8_t* codes, int blocks, const ProductLayout& layout,
                  const int8_t* entries, int heads, int16_t* sums, int sums_stride,
                  const uint8_t* next_codes) noexcept {
  assert(sums_stride % kScanBlock == 0 && sums_stride >= blocks * kScanBlock);
  HWY_DYNAMIC_DISPATCH(ScanProductsImpl)
  (codes, blocks, layout, entries, heads, sums, sums_stride, next_codes);
}

void EstimateProducts(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                      const ProductLayout& layout, const ProductHead* heads, int count,
                      float* estimates, float* weights, float* deviations, int stride) noexcept {
  HWY_DYNAMIC_DISPATCH(EstimateProductsImpl)
  (sums, sums_stride, codes, blocks, layout, heads, count, estimates, weights, deviations, stride);
}

int SelectProducts(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                   const ProductLayout& layout, const ProductHead* heads, int count,
                   uint32_t first_index, uint32_t* chosen, uint16_t* weights, int weights_stride,
                   float* block_weights, int blocks_stride, const uint8_t* next_codes) noexcept {
  assert(count <= kHeadsMax);
  return HWY_DYNAMIC_DISPATCH(SelectProductsImpl)(
      sums, sums_stride, codes, blocks, layout, heads, count, first_index, chosen, weights,
      weights_stride, block_weights, blocks_stride, next_codes);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
