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
// Weights are looked up: a window of 64 steps ends at the threshold, below which all keys are that
// are not chosen. It spans at least 11 nats where that is less than all that there is; what is
// further below weighs nothing, so n such keys lose less than n * exp(-10) keys at the threshold.
//
// All functions are pure, noexcept and allocate nothing.
#ifndef KVSEEK_KERNELS_CPU_PRODUCT_SCAN_H_
#define KVSEEK_KERNELS_CPU_PRODUCT_SCAN_H_

#include <cstdint>

#include "kernels/cpu/product_codes.h"
#include "kernels/cpu/sample.h"

namespace kvseek::kernels {

inline constexpr int kProductSumMax = 254;  ///< of a key's table entries

/// One head's tables for one codebook. Entries count in units; unit * (sum over the symbols, the
/// level too, of the table entries) + base is the upper estimate, without the segment's centre. The
/// unit is such that every sum fits a byte.
struct ProductTables {
  float base;  ///< natural-log units, as all below
  float unit;  ///< 0: all keys score as their centres
  /// Of each level: what a key has in its upper estimate less what it has in its weight, sigma -
  /// min(sigma^2, 2) / 4.
  float excess[kCentroids];
  float sigma[kCentroids];  ///< of each level

  // The window of weights, in units up to Top(), where the threshold is, and in 64 steps.
  int Top() const { return (kCentroids << shift) - 2; }
  int shift;                                     ///< a step has two to its power of units; 0..2
  alignas(64) uint8_t excess_units[kCentroids];  ///< excess, rounded to units
  /// The weight of each step, relative to the threshold's: (256 * high + low - 128) / 65280.
  alignas(64) uint8_t high[kCentroids];
  alignas(64) uint8_t low[kCentroids];
};

/// Builds the tables of `heads` queries. queries is (heads, dim), in the coordinates of the codes
/// and times the softmax scale; centroids is (dim, 64) bf16, and sub-space g has the coordinates
/// [starts[g], starts[g + 1]); errors is (64), the distance that each level stands for. entries is
/// (heads, layout.Symbols(), 64).
void BuildProductTables(const float* queries, int heads, int dim, const uint16_t* centroids,
                        const uint32_t* starts, const float* errors, const ProductLayout& layout,
                        uint8_t* entries, ProductTables* tables) noexcept;

/// Adds up table entries for every key of `blocks` consecutive blocks: sums[h * sums_stride + key].
/// Alignment, strides and `next_codes` as ScanCodes (ladder_scan.h). The same bits at every level.
void ScanProducts(const uint8_t* codes, int blocks, const ProductLayout& layout,
                  const uint8_t* entries, int heads, uint8_t* sums, int sums_stride,
                  const uint8_t* next_codes = nullptr) noexcept;

/// What turns sums into scores, for one head and one segment.
struct ProductHead {
  const ProductTables* tables;
  float centre;     ///< scale * <c, q>
  float threshold;  ///< a key is chosen when its upper estimate exceeds this in any head
  float reference;  ///< a weight is exp(min(80, s^ + min(sigma^2, 2) / 4 - reference))
};

/// estimates[h * stride + key] for every key of `blocks` blocks: upper estimates; and, where they
/// are not null, weights and deviations beside them (same stride). For audits and tests.
void EstimateProducts(const uint8_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                      const ProductLayout& layout, const ProductHead* heads, int count,
                      float* estimates, float* weights, float* deviations, int stride) noexcept;

/// Scans, estimates and weighs a sample, whose blocks have the same tables; estimates are upper
/// ones, and weights of levels rounded to units, as SelectProducts'. sums is (heads, sample.count *
/// 64), 64-byte aligned, and overwritten.
void SampleProducts(const SampleBlocks& sample, const ProductLayout& layout, const uint8_t* entries,
                    const ProductTables* tables, int heads, uint8_t* sums,
                    const SampleResults& results) noexcept;

/// What SelectProducts finds, for `blocks` blocks, of which `weighed` are weighed, and `count`
/// heads.
struct ProductResults {
  uint32_t* chosen;  ///< room for blocks * 64
  /// (count, weights_stride): of each key of the weighed blocks, side by side, in weight_units; 0
  /// if it is chosen.
  uint8_t* weights;
  int weights_stride;    ///< a multiple of 64; weights is 64-byte aligned
  float* weight_units;   ///< (count)
  float* sums;           ///< (count): summed weight of the weighed blocks
  float* block_weights;  ///< (count, blocks_stride): of each of them, or null: nobody wants them
  int blocks_stride;     ///< of block_weights
};

/// Writes first_index + key of every chosen key, ascending, and the weights of the others of the
/// weighed blocks: single ones are rounded to a 255th of one at the threshold, sums are of 256
/// times finer ones. Returns how many keys were chosen. Where a threshold is above all sums, the
/// window ends at the largest sum of these keys. `next_codes`: see ScanProducts. The same whole
/// numbers at every level.
int SelectProducts(const uint8_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                   WeighedBlocks weighed, const ProductLayout& layout, const ProductHead* heads,
                   int count, uint32_t first_index, const ProductResults& results,
                   const uint8_t* next_codes = nullptr) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_PRODUCT_SCAN_H_
