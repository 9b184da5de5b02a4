#include "kernels/cpu/ladder_codes.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>

#include "kernels/cpu/rotation.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/ladder_codes.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/ladder_lanes-inl.h"

#ifndef KVSEEK_KERNELS_CPU_LADDER_CODES_ONCE
#define KVSEEK_KERNELS_CPU_LADDER_CODES_ONCE
namespace kvseek::kernels {
namespace {

inline constexpr int kDimMax = 512;
inline constexpr int kPlaneBytesMax = kDimMax / 8;
inline constexpr int kPad = 8;  // symbols past the last dimension read zero bits from here

/// What one key's code knows of its residual: <x, r>, |x|^2 and |r|^2.
struct CodeSums {
  float dot;
  float code_norm2;
  float norm2;
};

/// A residual shorter than this (1e-15, squared) cannot matter to any score and is taken for zero.
inline constexpr float kNorm2Min = 1e-30F;

inline float Gain(const CodeSums& sums) {
  return sums.norm2 < kNorm2Min ? 0.0F : sums.norm2 / sums.dot;
}

inline float Noise(const CodeSums& sums, int padded_dim) {
  const float along = sums.dot * (sums.dot / sums.norm2);
  return std::sqrt(std::max(0.0F, sums.code_norm2 - along) / static_cast<float>(padded_dim - 1));
}

/// Mean of the noise over keys that have one, summed by blocks of 64 keys.
class NoiseMean {
 public:
  void Add(const CodeSums& sums, int padded_dim) {
    if (sums.norm2 >= kNorm2Min) {
      block_ += static_cast<double>(Noise(sums, padded_dim));
      ++count_;
    }
    if (++keys_ % kScanBlock == 0) {
      total_ += block_;
      block_ = 0.0;
    }
  }
  float Mean() const { return count_ == 0 ? 0.0F : static_cast<float>((total_ + block_) / count_); }

 private:
  double total_ = 0.0;
  double block_ = 0.0;
  int keys_ = 0;
  int count_ = 0;
};

inline uint16_t Bf16Downward(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + (value < 0.0F ? 0xffffU : 0U)) >> 16);
}

/// REQUIRES: value >= 0.
inline uint16_t Bf16Upward(float value) {
  return static_cast<uint16_t>((std::bit_cast<uint32_t>(value) + 0xffffU) >> 16);
}

/// Puts one plane of one key, D bits, into the rows of its block: byte `key` of each row. `bits`
/// has kPad zero bytes behind its D bits.
inline void PutSymbols(const uint8_t* bits, int symbols, uint8_t* rows) {
  const int quads = symbols / 4;
  for (int m = 0; m < quads; ++m, rows += 3 * kScanBlock) {
    uint32_t quad;
    std::memcpy(&quad, bits + 3 * m, sizeof(quad));
    rows[0] = static_cast<uint8_t>((quad & 63U) | ((quad >> 18 & 3U) << 6));
    rows[kScanBlock] = static_cast<uint8_t>((quad >> 6 & 63U) | ((quad >> 20 & 3U) << 6));
    rows[2 * kScanBlock] = static_cast<uint8_t>((quad >> 12 & 63U) | ((quad >> 22 & 3U) << 6));
  }
  uint32_t rest;
  std::memcpy(&rest, bits + 3 * quads, sizeof(rest));
  for (int g = 4 * quads; g < symbols; ++g, rest >>= kSymbolBits, rows += kScanBlock) {
    rows[0] = static_cast<uint8_t>(rest & 63U);
  }
}

}  // namespace
}  // namespace kvseek::kernels
#endif  // KVSEEK_KERNELS_CPU_LADDER_CODES_ONCE

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using DF8 = hn::CappedTag<float, 8>;  // stored rows have a multiple of 8 elements
using DF4 = hn::CappedTag<float, 4>;  // halves of value rows a multiple of 4

/// Sum of the lanes, by halves.
template <class D>
HWY_INLINE float SumByHalves(D d, hn::Vec<D> v) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (hn::MaxLanes(D()) > 4) {
    const hn::Half<D> half;
    return SumByHalves(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  } else {
    v = hn::Add(v, hn::Shuffle1032(v));
    v = hn::Add(v, hn::Shuffle2301(v));
  }
#endif
  (void)d;
  return hn::GetLane(v);
}

/// The sixteen running sums of ladder_codes.h, in as many vectors as they take.
struct RunningSums {
  static constexpr int kCount = 16;
  static constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
  static constexpr int kVectors = kCount / kLanes;

  HWY_INLINE RunningSums() {
    for (auto& v : vectors) v = hn::Zero(DF());
  }
  HWY_INLINE float Total() {
    for (int n = kVectors / 2; n > 0; n /= 2) {
      for (int j = 0; j < n; ++j) vectors[j] = hn::Add(vectors[j], vectors[j + n]);
    }
    return SumByHalves(DF(), vectors[0]);
  }

  hn::Vec<DF> vectors[kVectors];
};

template <bool kBf16, class D>
HWY_INLINE hn::Vec<D> LoadRow(D d, const uint16_t* row) {
  const hn::Rebind<uint16_t, D> d16;
  if constexpr (kBf16) {
    const hn::Rebind<uint32_t, D> d32;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, row))));
  } else {
    const hn::Rebind<hwy::float16_t, D> half;
    return hn::PromoteTo(d, hn::BitCast(half, hn::LoadU(d16, row)));
  }
}

HWY_INLINE float Norm2(const float* residual, int padded_dim) {
  const DF d;
  RunningSums sums;
  for (int i = 0; i < padded_dim; i += RunningSums::kCount) {
    for (int v = 0; v < RunningSums::kVectors; ++v) {
      const auto r = hn::LoadU(d, residual + i + v * RunningSums::kLanes);
      sums.vectors[v] = hn::Add(sums.vectors[v], hn::Mul(r, r));
    }
  }
  return sums.Total();
}

/// The scan code of one residual: a plane of D bits, zeroed before, for each of kPlanes.
template <int kPlanes>
HWY_INLINE CodeSums ScanCode(const float* residual, int padded_dim, uint8_t* high, uint8_t* low) {
  const DF d;
  const auto zero = hn::Zero(d);
  const float norm2 = Norm2(residual, padded_dim);
  // |u| >= step, as a bound on |r|; no residual reaches it where all are zero.
  const float bound =
      norm2 < kNorm2Min ? 3e38F : kTwoBitStep * std::sqrt(norm2 / static_cast<float>(padded_dim));
  const auto outer_bound = hn::Set(d, bound);
  const auto negative_outer_bound = hn::Set(d, -bound);
  const auto inner = hn::Set(d, 0.5F * kTwoBitStep);
  const auto outer = hn::Set(d, 1.5F * kTwoBitStep);
  RunningSums dot;
  RunningSums code_norm2;
  for (int i = 0; i < padded_dim; i += RunningSums::kCount) {
    for (int v = 0; v < RunningSums::kVectors; ++v) {
      const int first = i + v * RunningSums::kLanes;
      const auto r = hn::LoadU(d, residual + first);
      const auto positive = hn::Ge(r, zero);
      PutMaskBits(d, positive, first, high);
      if constexpr (kPlanes == 1) {
        dot.vectors[v] = hn::Add(dot.vectors[v], hn::Abs(r));
      } else {
        const auto top = hn::Ge(r, outer_bound);
        const auto bottom = hn::Lt(r, negative_outer_bound);
        // Levels -2, -1, 0, 1 have the low bits 0, 1, 0, 1.
        PutMaskBits(d, hn::Or(top, hn::Not(hn::Or(positive, bottom))), first, low);
        const auto x = hn::IfThenElse(hn::Or(top, bottom), outer, inner);
        dot.vectors[v] = hn::Add(dot.vectors[v], hn::Mul(x, hn::Abs(r)));
        code_norm2.vectors[v] = hn::Add(code_norm2.vectors[v], hn::Mul(x, x));
      }
    }
  }
  return {dot.Total(), kPlanes == 1 ? static_cast<float>(padded_dim) : code_norm2.Total(), norm2};
}

template <int kPlanes>
float EncodeScanBlocksT(const float* residuals, int blocks, int padded_dim, uint8_t* out) {
  const int symbols = Symbols(padded_dim);
  const int plane_bytes = PlaneRows(symbols) * kScanBlock;
  NoiseMean noise;
  for (int b = 0; b < blocks; ++b) {
    uint8_t* block = out + static_cast<ptrdiff_t>(b) * ScanBlockBytes(symbols, kPlanes);
    uint16_t gains[kScanBlock];
    for (int key = 0; key < kScanBlock; ++key, residuals += padded_dim) {
      uint8_t bits[2][kPlaneBytesMax + kPad] = {};
      const CodeSums sums = ScanCode<kPlanes>(residuals, padded_dim, bits[0], bits[1]);
      for (int plane = 0; plane < kPlanes; ++plane) {
        PutSymbols(bits[plane], symbols, block + plane * plane_bytes + key);
      }
      gains[key] = FloatToBf16(Gain(sums));
      noise.Add(sums, padded_dim);
    }
    std::memcpy(block + kPlanes * plane_bytes, gains, sizeof(gains));
  }
  return noise.Mean();
}

float EncodeScanBlocksImpl(const float* residuals, int blocks, int padded_dim, int planes,
                           uint8_t* out) {
  return planes == 1 ? EncodeScanBlocksT<1>(residuals, blocks, padded_dim, out)
                     : EncodeScanBlocksT<2>(residuals, blocks, padded_dim, out);
}

/// out (count) := low | high << 4. `count` is a multiple of 32.
HWY_INLINE void PackNibbles(const uint8_t* low, const uint8_t* high, int count, uint8_t* out) {
  const hn::CappedTag<uint8_t, 32> d;
  for (int i = 0; i < count; i += static_cast<int>(hn::Lanes(d))) {
    hn::StoreU(hn::Or(hn::LoadU(d, low + i), hn::ShiftLeft<4>(hn::LoadU(d, high + i))), d, out + i);
  }
}

/// Writes D/2 bytes of nibbles.
HWY_INLINE CodeSums FineKeyCode(const float* residual, int padded_dim, uint8_t* out) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<uint8_t, DF> d8;
  const float norm2 = Norm2(residual, padded_dim);
  const float to_steps = norm2 < kNorm2Min ? 0.0F
                                           : std::sqrt(static_cast<float>(padded_dim)) /
                                                 (std::sqrt(norm2) * kFourBitStep);
  const auto scale = hn::Set(d, to_steps);
  const auto lowest = hn::Set(d, -8.0F);
  const auto highest = hn::Set(d, 7.0F);
  const auto eight = hn::Set(di, 8);
  const auto half = hn::Set(d, 0.5F);
  RunningSums dot;
  RunningSums code_norm2;
  uint8_t nibbles[kDimMax];
  for (int i = 0; i < padded_dim; i += RunningSums::kCount) {
    for (int v = 0; v < RunningSums::kVectors; ++v) {
      const int first = i + v * RunningSums::kLanes;
      const auto r = hn::LoadU(d, residual + first);
      const auto level = hn::Max(hn::Min(hn::Floor(hn::Mul(r, scale)), highest), lowest);
      const auto x = hn::Add(level, half);
      dot.vectors[v] = hn::Add(dot.vectors[v], hn::Mul(x, r));
      code_norm2.vectors[v] = hn::Add(code_norm2.vectors[v], hn::Mul(x, x));
      const auto nibble = hn::Add(hn::ConvertTo(di, level), eight);
      hn::StoreU(hn::DemoteTo(d8, nibble), d8, nibbles + first);
    }
  }
  PackNibbles(nibbles, nibbles + padded_dim / 2, padded_dim / 2, out);
  return {dot.Total() * kFourBitStep, code_norm2.Total() * kFourBitStep * kFourBitStep, norm2};
}

template <bool kBf16, class D>
HWY_INLINE void FineValueNibbles(D d, const uint16_t* row, int half_dim, float lo,
                                 float steps_per_unit, uint8_t* out) {
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint8_t, D> d8;
  const auto offset = hn::Set(d, lo);
  const auto scale = hn::Set(d, steps_per_unit);
  const auto half = hn::Set(d, 0.5F);  // rounds to nearest: codes are not negative
  const auto highest = hn::Set(d, 15.0F);
  const auto v0 = hn::Sub(LoadRow<kBf16>(d, row), offset);
  const auto v1 = hn::Sub(LoadRow<kBf16>(d, row + half_dim), offset);
  const auto low = hn::ConvertTo(di, hn::Min(hn::Add(hn::Mul(v0, scale), half), highest));
  const auto high = hn::ConvertTo(di, hn::Min(hn::Add(hn::Mul(v1, scale), half), highest));
  hn::StoreU(hn::DemoteTo(d8, hn::Or(low, hn::ShiftLeft<4>(high))), d8, out);
}

/// Writes value_dim/2 bytes of nibbles, and their lo and step.
template <bool kBf16>
HWY_INLINE void FineValueCode(const uint16_t* row, int value_dim, uint8_t* out,
                              FineFactors* factors) {
  const DF8 d8;
  auto min = LoadRow<kBf16>(d8, row);
  auto max = min;
  for (int i = 0; i < value_dim; i += static_cast<int>(hn::Lanes(d8))) {
    const auto v = LoadRow<kBf16>(d8, row + i);
    min = hn::Min(min, v);
    max = hn::Max(max, v);
  }
  // Of -0 and 0 either may come out of a minimum; adding 0 makes both 0.
  factors->lo = Bf16Downward(hn::GetLane(hn::MinOfLanes(d8, min)) + 0.0F);
  const float lo = Bf16ToFloat(factors->lo);
  const float highest = hn::GetLane(hn::MaxOfLanes(d8, max)) + 0.0F;
  factors->step = Bf16Upward((highest - lo) * (1.0F / 15.0F));
  const float step = Bf16ToFloat(factors->step);
  const float steps_per_unit = step < 1e-37F ? 0.0F : 1.0F / step;
  const DF d;
  const DF4 d4;
  const int half_dim = value_dim / 2;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int i = 0;
  for (; i + lanes <= half_dim; i += lanes) {
    FineValueNibbles<kBf16>(d, row + i, half_dim, lo, steps_per_unit, out + i);
  }
  for (; i < half_dim; i += static_cast<int>(hn::Lanes(d4))) {
    FineValueNibbles<kBf16>(d4, row + i, half_dim, lo, steps_per_unit, out + i);
  }
}

float EncodeFineImpl(const float* residuals, const uint16_t* values, DType dtype, int count,
                     int padded_dim, int value_dim, uint8_t* records, FineFactors* factors) {
  const int record_bytes = FineRecordBytes(padded_dim, value_dim);
  const int used_bytes = padded_dim / 2 + value_dim / 2;
  NoiseMean noise;
  for (int t = 0; t < count; ++t) {
    const CodeSums sums = FineKeyCode(residuals, padded_dim, records);
    factors[t].gain = Gain(sums);
    noise.Add(sums, padded_dim);
    uint8_t* nibbles = records + FineValueOffset(padded_dim);
    if (dtype == DType::kBf16) {
      FineValueCode<true>(values, value_dim, nibbles, factors + t);
    } else {
      FineValueCode<false>(values, value_dim, nibbles, factors + t);
    }
    std::memset(records + used_bytes, 0, static_cast<size_t>(record_bytes - used_bytes));
    residuals += padded_dim;
    values += value_dim;
    records += record_bytes;
  }
  return noise.Mean();
}

template <bool kBf16>
void MeanRowT(const uint16_t* rows, int count, int dim, float* mean) {
  const DF8 d;
  const auto scale = hn::Set(d, count > 0 ? 1.0F / static_cast<float>(count) : 0.0F);
  for (int i = 0; i < dim; i += static_cast<int>(hn::Lanes(d))) {
    auto even = hn::Zero(d);
    auto odd = hn::Zero(d);
    const uint16_t* row = rows + i;
    int t = 0;
    for (; t + 2 <= count; t += 2, row += 2 * dim) {
      even = hn::Add(even, LoadRow<kBf16>(d, row));
      odd = hn::Add(odd, LoadRow<kBf16>(d, row + dim));
    }
    if (t < count) even = hn::Add(even, LoadRow<kBf16>(d, row));
    hn::StoreU(hn::Mul(hn::Add(even, odd), scale), d, mean + i);
  }
}

void MeanRowImpl(const uint16_t* rows, DType dtype, int count, int dim, float* mean) {
  if (dtype == DType::kBf16) {
    MeanRowT<true>(rows, count, dim, mean);
  } else {
    MeanRowT<false>(rows, count, dim, mean);
  }
}

template <bool kBf16>
void SubtractT(const uint16_t* keys, int count, int dim, const float* centre, float* out) {
  const DF8 d;
  for (int t = 0; t < count; ++t, keys += dim, out += dim) {
    for (int i = 0; i < dim; i += static_cast<int>(hn::Lanes(d))) {
      hn::StoreU(hn::Sub(LoadRow<kBf16>(d, keys + i), hn::LoadU(d, centre + i)), d, out + i);
    }
  }
}

/// out (count, dim) := keys - centre.
void SubtractImpl(const uint16_t* keys, DType dtype, int count, int dim, const float* centre,
                  float* out) {
  if (dtype == DType::kBf16) {
    SubtractT<true>(keys, count, dim, centre, out);
  } else {
    SubtractT<false>(keys, count, dim, centre, out);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(EncodeScanBlocksImpl);
HWY_EXPORT(EncodeFineImpl);
HWY_EXPORT(MeanRowImpl);
HWY_EXPORT(SubtractImpl);

float EncodeScanBlocks(const float* residuals, int blocks, int padded_dim, int planes,
                       uint8_t* out) noexcept {
  assert(padded_dim >= 64 && padded_dim <= kDimMax && padded_dim % 64 == 0);
  assert(planes == 1 || planes == 2);
  return HWY_DYNAMIC_DISPATCH(EncodeScanBlocksImpl)(residuals, blocks, padded_dim, planes, out);
}

float EncodeFine(const float* residuals, const uint16_t* values, DType dtype, int count,
                 int padded_dim, int value_dim, uint8_t* records, FineFactors* factors) noexcept {
  assert(padded_dim >= 64 && padded_dim <= kDimMax && padded_dim % 64 == 0);
  assert(value_dim >= 8 && value_dim <= kDimMax && value_dim % 8 == 0);
  return HWY_DYNAMIC_DISPATCH(EncodeFineImpl)(residuals, values, dtype, count, padded_dim,
                                              value_dim, records, factors);
}

void MeanRow(const uint16_t* rows, DType dtype, int count, int dim, float* mean) noexcept {
  HWY_DYNAMIC_DISPATCH(MeanRowImpl)(rows, dtype, count, dim, mean);
}

void BlockMeans(const uint16_t* values, DType dtype, int blocks, int value_dim,
                uint16_t* means) noexcept {
  float mean[kDimMax];
  for (int b = 0; b < blocks; ++b) {
    MeanRow(values, dtype, kScanBlock, value_dim, mean);
    for (int i = 0; i < value_dim; ++i) means[i] = FloatToBf16(mean[i]);
    values += static_cast<ptrdiff_t>(kScanBlock) * value_dim;
    means += value_dim;
  }
}

void RotateResiduals(const uint16_t* keys, DType dtype, int count, int key_dim, const float* centre,
                     float* residuals) noexcept {
  constexpr int kRows = 8;  // so that the differences stay in the first-level cache
  float differences[kRows * kDimMax];
  const int padded_dim = PaddedDim(key_dim);
  for (int t = 0; t < count; t += kRows) {
    const int rows = std::min(kRows, count - t);
    HWY_DYNAMIC_DISPATCH(SubtractImpl)
    (keys, dtype, rows, key_dim, centre, differences);
    Rotate(differences, rows, key_dim, residuals);
    keys += static_cast<ptrdiff_t>(rows) * key_dim;
    residuals += static_cast<ptrdiff_t>(rows) * padded_dim;
  }
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
