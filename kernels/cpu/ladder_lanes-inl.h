// What the ladder's kernels do across the lanes of a vector, per SIMD level: sums, masks as bits
// and as indices.
#if defined(KVSEEK_KERNELS_CPU_LADDER_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSEEK_KERNELS_CPU_LADDER_LANES_INL_H_
#undef KVSEEK_KERNELS_CPU_LADDER_LANES_INL_H_
#else
#define KVSEEK_KERNELS_CPU_LADDER_LANES_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/cpu/ladder_codes.h"

// For functions of the level avx512-vbmi with products of bytes by intrinsics: every machine of
// that level has them, but Highway 1.0 does not tell the compiler.
#ifndef KVSEEK_VNNI
#define KVSEEK_VNNI __attribute__((target("avx512vnni")))
#endif

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {

namespace ladder_lanes {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET != HWY_SCALAR
/// out[j] := sum of lane j of every block of four.
template <class D>
HWY_INLINE void Blocks(D d, hn::Vec<D> v, hn::TFromD<D>* out) {
  if constexpr (hn::MaxLanes(D()) > 4) {
    const hn::Half<D> half;
    Blocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), out);
  } else {
    hn::StoreU(v, d, out);
  }
}
#endif

}  // namespace ladder_lanes

/// out[j] := sum of the lanes of v[j], for four vectors of 32-bit lanes at once.
template <class D>
HWY_INLINE void SumFour(D d, const ladder_lanes::hn::Vec<D>* v, ladder_lanes::hn::TFromD<D>* out) {
  namespace hn = ladder_lanes::hn;
#if HWY_TARGET == HWY_SCALAR
  (void)d;
  for (int j = 0; j < 4; ++j) out[j] = hn::GetLane(v[j]);
#else
  const hn::Repartition<uint64_t, D> d64;
  // Lanes of a block of four belong to vectors 0 1 0 1 (2 3 2 3), then to 0 1 2 3.
  const auto v01 = hn::Add(hn::InterleaveLower(d, v[0], v[1]), hn::InterleaveUpper(d, v[0], v[1]));
  const auto v23 = hn::Add(hn::InterleaveLower(d, v[2], v[3]), hn::InterleaveUpper(d, v[2], v[3]));
  const auto w01 = hn::BitCast(d64, v01);
  const auto w23 = hn::BitCast(d64, v23);
  const auto low = hn::BitCast(d, hn::InterleaveLower(d64, w01, w23));
  const auto high = hn::BitCast(d, hn::InterleaveUpper(d64, w01, w23));
  ladder_lanes::Blocks(d, hn::Add(low, high), out);
#endif
}

#if HWY_TARGET <= HWY_AVX3_DL

/// Each lane of 32 bits of `sums`, and the products of its four bytes, unsigned with signed ones.
/// Not by the intrinsic: GCC 12 copies the sums twice around each, and of a dozen spills some.
HWY_INLINE __m512i AddProducts(__m512i sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sums;
}

/// The same, with four signed bytes for all lanes.
HWY_INLINE __m512i AddProducts(__m512i sums, __m512i unsigned_bytes, const int8_t* four) {
  struct Four {
    int8_t bytes[4];
  };
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sums)
      : "v"(unsigned_bytes), "m"(*reinterpret_cast<const Four*>(four)));
  return sums;
}

#endif

/// Bits [first, first + Lanes) of `bits`, zero before, := mask. `first` is a multiple of Lanes.
template <class D, class M>
HWY_INLINE void PutMaskBits(D d, M mask, int first, uint8_t* bits) {
  namespace hn = ladder_lanes::hn;
  if constexpr (hn::MaxLanes(D()) >= 8) {
    hn::StoreMaskBits(d, mask, bits + first / 8);
  } else {
    uint8_t few[8];
    hn::StoreMaskBits(d, mask, few);
    bits[first / 8] = static_cast<uint8_t>(bits[first / 8] | (few[0] << (first % 8)));
  }
}

/// Keys of one block that some head chooses, as bits. `any`: masks of its vectors.
template <class D, class M>
HWY_INLINE uint64_t MaskBits(D d, const M* any) {
  constexpr int kLanesOfD = static_cast<int>(ladder_lanes::hn::MaxLanes(D()));
#if HWY_TARGET <= HWY_AVX3
  (void)d;
  uint64_t bits = 0;
  for (int v = 0; v < kScanBlock / kLanesOfD; ++v) {
    bits |= static_cast<uint64_t>(any[v].raw) << (v * kLanesOfD);
  }
#else
  uint8_t bytes[kScanBlock / 8] = {};
  for (int v = 0; v < kScanBlock / kLanesOfD; ++v) PutMaskBits(d, any[v], v * kLanesOfD, bytes);
  uint64_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
#endif
  return bits;
}

#if HWY_TARGET <= HWY_AVX3_DL
using FirstIndex = __m512i;  ///< in all lanes: a broadcast from a register is a shuffle
#else
using FirstIndex = uint32_t;
#endif

/// Writes first + i for every set bit i; returns how many there are.
HWY_INLINE int PutIndices(uint64_t bits, FirstIndex first, uint32_t* chosen) {
  const int count = std::popcount(bits);
#if HWY_TARGET <= HWY_AVX3_DL
  alignas(64) static constexpr uint8_t kNumbers[64] = {
      0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
      22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
      44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  __m512i keys = _mm512_maskz_compress_epi8(bits, _mm512_load_si512(kNumbers));
  for (int i = 0;; i += 16) {  // few blocks have more than 16
    const __m512i some = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(keys));
    const auto left = static_cast<uint32_t>(count - i);
    _mm512_mask_storeu_epi32(chosen + i, static_cast<__mmask16>(_bzhi_u32(0xffff, left)),
                             _mm512_add_epi32(some, first));
    if (i + 16 >= count) break;
    keys = _mm512_alignr_epi64(keys, keys, 2);
  }
#elif HWY_TARGET <= HWY_AVX3
  // Without branches: how many there are cannot be foreseen.
  __m512i indices =
      _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int v = 0; v < 4; ++v, bits >>= 16) {
    const auto mask = static_cast<__mmask16>(bits);
    const int some = std::popcount(static_cast<uint32_t>(mask));
    _mm512_mask_storeu_epi32(chosen, static_cast<__mmask16>((1U << some) - 1U),
                             _mm512_maskz_compress_epi32(mask, indices));
    chosen += some;
    indices = _mm512_add_epi32(indices, _mm512_set1_epi32(16));
  }
#else
  for (; bits != 0; bits &= bits - 1) {
    *chosen++ = first + static_cast<uint32_t>(std::countr_zero(bits));
  }
#endif
  return count;
}

/// The same for one block after the other.
class BlockIndices {
 public:
#if HWY_TARGET <= HWY_AVX3_DL
  explicit BlockIndices(uint32_t first) : first_(_mm512_set1_epi32(static_cast<int>(first))) {}
#else
  explicit BlockIndices(uint32_t first) : first_(first) {}
#endif
  HWY_INLINE int Put(uint64_t bits, uint32_t* chosen) {
    const int count = PutIndices(bits, first_, chosen);
#if HWY_TARGET <= HWY_AVX3_DL
    first_ = _mm512_add_epi32(first_, _mm512_set1_epi32(kScanBlock));
#else
    first_ += kScanBlock;
#endif
    return count;
  }

 private:
  FirstIndex first_;
};

/// Sums of neighbouring numbers of bf16, which are in the 16-bit lanes of `bits`, in lanes of D.
template <class D, class V16>
HWY_INLINE ladder_lanes::hn::Vec<D> SumPairs(D d, V16 bits) {
  namespace hn = ladder_lanes::hn;
  const hn::RebindToUnsigned<D> d32;
#if HWY_TARGET == HWY_SCALAR
  const hn::Rebind<uint16_t, D> d16;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::BitCast(d16, bits))));
#else
  const auto pairs = hn::BitCast(d32, bits);
  return hn::Add(hn::BitCast(d, hn::ShiftLeft<16>(pairs)),
                 hn::BitCast(d, hn::And(pairs, hn::Set(d32, 0xFFFF0000U))));
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
