// Memory layout and encoding of the ladder's codes (design: docs/architecture.md, "The precision
// ladder").
//
// A *residual* is R(k - c): a key less its segment's centre c, rotated (rotation.h), D = PaddedDim
// dimensions. Its code x is a point of a fixed grid. With gain = |r|^2 / <x, r>, gain * <x, Rq> is
// an unbiased estimate of <k - c, q>, with standard deviation noise * gain * |q|, where noise = |x|
// sqrt(1 - a^2) / sqrt(D - 1) and a is the cosine between r and x. gain differs from key to key;
// noise hardly does and is kept as one mean a segment.
//
// Scan code (1 or 2 bits a dimension), for the look at every key. Keys stand in blocks of 64. The D
// dimensions are cut into groups of six; a group's six bits are one *symbol*, the index into a
// 64-entry table of partial sums. One block, ScanBlockBytes() in all:
//
//   for each plane (high first): for each row j: 64 bytes, byte i belongs to key i of the block
//   64 gains, bf16 (0 for a key that does not exist: it estimates as its centre)
//
// Four symbols take three rows: rows 3m, 3m+1, 3m+2 hold symbols 4m, 4m+1, 4m+2 in their low six
// bits, and symbol 4m+3 in their top two (row 3m its lowest bits). Symbols that do not fill a quad
// take a row each. Bit b of symbol g is dimension 6g+b; dimensions past D are zero bits and their
// table entries count nothing.
//
//   1 bit:   x = +1 (bit set) or -1. One plane.
//   2 bits:  x = 0.9957 * (h + l / 2) with h, l = +-1 from the high and the low plane, so both
//            share one table. These levels are those for a residual scaled to unit variance,
//            u = r sqrt(D) / |r|.
//
// Fine code (4 bits a dimension of K, 4 bits an element of V), for candidates. One record a key,
// FineRecordBytes():
//
//   D/2 bytes K: byte i has dimension i in its low nibble and dimension i + D/2 in its high
//                nibble; a nibble n means 0.3352 * (n - 7.5)
//   value_dim/2 bytes V: byte i has element i low and element i + value_dim/2 high;
//                element = lo + step * nibble
//   zero bytes up to a multiple of 64
//
// Factors of a record stand in an array of their own (FineFactors).
//
// Codes are the same bits on every machine: at every SIMD level, and from a GPU
// (kernels/cuda/ladder_encode.h). Every operation is IEEE single precision and rounds on its own;
// nothing is fused. A sum over dimensions has sixteen running sums, element i goes to number
// i mod 16 in ascending i, and they are then added by halves: (j, j + 8), (j, j + 4), (j, j + 2),
// (j, j + 1). A mean of rows adds the even and the odd rows apart, each in ascending order, adds
// the two and multiplies by 1 / count. A mean noise is summed in double precision, in key order
// over each 64 keys and then over these sums. A lo or step of zero is +0.
#ifndef KVSEEK_KERNELS_CPU_LADDER_CODES_H_
#define KVSEEK_KERNELS_CPU_LADDER_CODES_H_

#include <cstdint>

#include "kernels/dtype.h"

namespace kvseek::kernels {

inline constexpr int kScanBlock = 64;  ///< keys of one scan block
inline constexpr int kSymbolBits = 6;  ///< dimensions of one symbol
inline constexpr int kTableSize = 64;  ///< entries of one symbol's table
inline constexpr int kTableMax = 31;   ///< |table entry| at most: four of them add up in an int8
inline constexpr float kTwoBitStep = 0.9957F;
inline constexpr float kFourBitStep = 0.3352F;

/// Symbols of one plane.
constexpr int Symbols(int padded_dim) { return (padded_dim + kSymbolBits - 1) / kSymbolBits; }
/// Rows of 64 bytes of one plane: three for each four symbols, one each for what is left.
constexpr int PlaneRows(int symbols) { return symbols / 4 * 3 + symbols % 4; }
/// Bytes of one scan block, its gains included. A multiple of 64.
constexpr int ScanBlockBytes(int symbols, int planes) {
  return (planes * PlaneRows(symbols) + 2) * kScanBlock;
}
/// Offset of the 64 bf16 gains in a scan block.
constexpr int ScanGainOffset(int symbols, int planes) {
  return planes * PlaneRows(symbols) * kScanBlock;
}

/// Of consecutive blocks those whose unchosen keys are weighed and stand for the others': first,
/// first + step, and so on. A choice is made among the keys of all.
struct WeighedBlocks {
  int first = 0;  ///< 0..step - 1, and less than the number of blocks
  int step = 1;   ///< 1: all blocks

  constexpr int Count(int blocks) const { return (blocks - first + step - 1) / step; }
};

struct FineFactors {
  float gain;     ///< of the 4-bit key code
  uint16_t lo;    ///< bf16
  uint16_t step;  ///< bf16
};

constexpr int FineValueOffset(int padded_dim) { return padded_dim / 2; }
constexpr int FineRecordBytes(int padded_dim, int value_dim) {
  return (padded_dim / 2 + value_dim / 2 + 63) / 64 * 64;
}

/// Encodes `blocks` whole blocks of residuals (blocks * 64, padded_dim) at 1 or 2 planes into `out`
/// (blocks * ScanBlockBytes). Returns the mean noise (see above) over keys with a non-zero
/// residual, 0 if there are none. A zero residual (|r| < 1e-15) gets gain 0.
float EncodeScanBlocks(const float* residuals, int blocks, int padded_dim, int planes,
                       uint8_t* out) noexcept;

/// Encodes `count` keys and values for the 4-bit rung: residuals (count, padded_dim); values
/// (count, value_dim), bf16 or fp16. Writes count records and count factors; returns the mean noise
/// of the 4-bit key code. A row of equal bf16 values gets step 0; every element decodes to within
/// half a step.
float EncodeFine(const float* residuals, const uint16_t* values, DType dtype, int count,
                 int padded_dim, int value_dim, uint8_t* records, FineFactors* factors) noexcept;

/// Mean of each block's 64 value rows, bf16: means (blocks, value_dim).
void BlockMeans(const uint16_t* values, DType dtype, int blocks, int value_dim,
                uint16_t* means) noexcept;

/// Mean of `count` key rows: mean (key_dim).
void MeanRow(const uint16_t* rows, DType dtype, int count, int dim, float* mean) noexcept;

/// residuals (count, PaddedDim(key_dim)) := R (keys - centre), with centre (key_dim).
void RotateResiduals(const uint16_t* keys, DType dtype, int count, int key_dim, const float* centre,
                     float* residuals) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_LADDER_CODES_H_
