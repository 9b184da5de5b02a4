// The scan over product codes: an estimate of every key's score, the choice of candidates, and the
// weight of every key that is not chosen. Layout and terms: product_codes.h.
//
// A code's centroids are the means of the keys that share it, so the estimate s^ is the mean of
// these keys' scores, and their deviation sigma is what the level says. Candidates are chosen by
// s^ + sigma, the *upper* estimate: keys far from their code would be missed otherwise. The weight
// of a key that is not chosen is exp(s^ + min(sigma^2, 2) / 4), half way between exp(s^), which is
// too small on average, and the mean exp(s^ + sigma^2 / 2), to which a few keys of large sigma
// contribute most.
//
// All functions are pure, noexcept and allocate nothing.
#ifndef KVSEEK_KERNELS_CPU_PRODUCT_SCAN_H_
#define KVSEEK_KERNELS_CPU_PRODUCT_SCAN_H_

#include <cstdint>

#include "kernels/cpu/product_codes.h"

namespace kvseek::kernels {

/// One head's tables for one codebook. Entries count in units; unit * (sum over the symbols, the
/// level too, of the table entries) + base is the upper estimate, without the segment's centre.
struct ProductTables {
  float base;  ///< natural-log units, as all below
  float unit;  ///< 0: all keys score as their centres
  /// Of each level: what a key has in its upper estimate less what it has in its weight, sigma -
  /// min(sigma^2, 2) / 4.
  float excess[kCentroids];
  float sigma[kCentroids];  ///< of each level
};

/// Builds the tables of `heads` queries. queries is (heads, dim), in the coordinates of the codes
/// and times the softmax scale; centroids is (dim, 64) bf16, and sub-space g has the coordinates
/// [starts[g], starts[g + 1]); errors is (64), the distance that each level stands for. entries is
/// (heads, layout.Symbols(), 64), |entry| <= kTableMax.
void BuildProductTables(const float* queries, int heads, int dim, const uint16_t* centroids,
                        const uint32_t* starts, const float* errors, const ProductLayout& layout,
                        int8_t* entries, ProductTables* tables) noexcept;

/// Adds up table entries for every key of `blocks` consecutive blocks: sums[h * sums_stride + key].
/// Alignment, strides and `next_codes` as ScanCodes (ladder_scan.h). The same bits at every level.
void ScanProducts(const uint8_t* codes, int blocks, const ProductLayout& layout,
                  const int8_t* entries, int heads, int16_t* sums, int sums_stride,
                  const uint8_t* next_codes = nullptr) noexcept;

/// What turns sums into scores, for one head and one segment.
struct ProductHead {
  const ProductTables* tables;
  float centre;     ///< scale * <c, q>
  float threshold;  ///< a key is chosen when its upper estimate exceeds this in any head
  float reference;  ///< a weight is exp(min(80, s^ + min(sigma^2, 2) / 4 - reference))
};

/// estimates[h * stride + key] for every key of `blocks` blocks: upper estimates; and, where they
/// are not null, weights and deviations beside them (same stride). For sampling, audits and tests.
void EstimateProducts(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                      const ProductLayout& layout, const ProductHead* heads, int count,
                      float* estimates, float* weights, float* deviations, int stride) noexcept;

/// Appends first_index + key of every chosen key to `chosen` (ascending; room for blocks * 64 more
/// is needed); writes weights[h * weights_stride + key], bf16, 0 for a chosen key, and their sums
/// for every block and head: block_weights[h * blocks_stride + block]. Returns how many were
/// chosen. weights_stride is a multiple of 64, weights is 64-byte aligned. `next_codes`: see
/// ScanProducts.
int SelectProducts(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                   const ProductLayout& layout, const ProductHead* heads, int count,
                   uint32_t first_index, uint32_t* chosen, uint16_t* weights, int weights_stride,
                   float* block_weights, int blocks_stride,
                   const uint8_t* next_codes = nullptr) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_PRODUCT_SCAN_H_
