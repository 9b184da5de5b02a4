// Memory layout and encoding of product codes and value sketches (docs/indexes.md, "product").
//
// A key less its segment's centre is turned into coordinates y in which queries are alike in all
// directions. They are cut into sub-spaces, runs of consecutive coordinates; each is replaced by
// the nearest of 64 centroids (product quantisation, Jegou et al. 2011). A key's code is a symbol
// of six bits for each sub-space and one more, its *level*: how far it is from its code, one of 64
// steps. A value less its segment's mean is replaced by four bits for each of 8 principal
// components, its *sketch*.
//
// Keys stand in blocks of 64. A block is rows of 64 bytes, byte i belonging to key i:
//
//   codes      PlaneRows(symbols) rows: the symbols as in ladder_codes.h, the level last
//   sketches   4 rows: row r has component r in its low nibble and component r + 4 in its high one;
//              a nibble n means n - 7.5 steps of the component
//
// Sketches stand apart from codes: a search reads all codes one after the other, and sketches of
// some blocks.
#ifndef KVSEEK_KERNELS_CPU_PRODUCT_CODES_H_
#define KVSEEK_KERNELS_CPU_PRODUCT_CODES_H_

#include <cstdint>

#include "kernels/cpu/ladder_codes.h"

namespace kvseek::kernels {

inline constexpr int kCentroids = 64;       ///< of a sub-space, and levels
inline constexpr int kSketchDim = 8;        ///< components of a value's sketch
inline constexpr float kSketchBias = 7.5F;  ///< of a nibble
inline constexpr int kSketchBlockBytes = kSketchDim / 2 * kScanBlock;
inline constexpr int kSubspacesMax = 63;

/// What product codes are made of.
struct ProductLayout {
  int subspaces = 11;  ///< 1..kSubspacesMax
  bool sketch = true;  ///< whether values are sketched

  int Symbols() const { return subspaces + 1; }
  int BlockBytes() const { return PlaneRows(Symbols()) * kScanBlock; }  ///< of codes
  bool operator==(const ProductLayout&) const = default;
};

/// Finds for each of `count` points, `dim` coordinates of rows of `stride` floats, the nearest
/// centroid, the first of several: symbols[i * symbol_stride]; and adds the squared distance to
/// squares[i]. `centroids` is (dim, 64), the centroids' coordinates side by side. dim may be 0.
void NearestCentroids(const float* points, int stride, int count, const float* centroids, int dim,
                      uint8_t* symbols, int symbol_stride, float* squares) noexcept;

/// Writes `blocks` blocks of codes. symbols is (blocks * 64, layout.Symbols()), each < 64.
void PackProductBlocks(const uint8_t* symbols, int blocks, const ProductLayout& layout,
                       uint8_t* out) noexcept;

/// Writes `blocks` blocks of sketches. nibbles is (blocks * 64, 8), each < 16.
void PackSketchBlocks(const uint8_t* nibbles, int blocks, uint8_t* out) noexcept;

/// Symbol `index` of key `key` of a block.
uint8_t ProductSymbol(const uint8_t* block, const ProductLayout& layout, int index,
                      int key) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_PRODUCT_CODES_H_
