// The ladder's choice among scanned keys: scores from the sums of ladder_scan.h, candidates, and
// the weight of everything that is not chosen. Layout and terms: ladder_codes.h.
//
// All functions are pure, noexcept and allocate nothing.
#ifndef KVSEEK_KERNELS_CPU_LADDER_SELECT_H_
#define KVSEEK_KERNELS_CPU_LADDER_SELECT_H_

#include <cstdint>

#include "kernels/cpu/ladder_codes.h"

namespace kvseek::kernels {

/// What turns sums into scores, for one head and one segment. Natural-log units, softmax scale
/// included.
struct ScanHead {
  float centre;     ///< scale * <c, q>
  float slope;      ///< scale * (value of one unit of sum): estimate = centre + slope * gain * sum
  float noise;      ///< scale * |q| * segment noise: an estimate's deviation is noise * gain
  float threshold;  ///< a key is chosen when its estimate exceeds this in any head
  float reference;  ///< a weight is exp(min(80, estimate - (noise * gain)^2 / 2 - reference))
};

/// estimates[h * estimates_stride + key] for every key of `blocks` blocks (scores before
/// correction); and, where `weights` is not null, the corrected weights beside them (same stride).
/// For audits and tests.
void EstimateScores(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                    int symbols, int planes, const ScanHead* scan_heads, int heads,
                    float* estimates, int estimates_stride, float* weights) noexcept;

/// The same without writing scores: appends first_index + key of every chosen key to `chosen`
/// (ascending; room for blocks * 64 more is needed), and writes for every head and the w-th of the
/// weighed blocks the summed weight of its keys that are not chosen: block_weights[h *
/// weights_stride + w]. Returns how many were chosen. `next_codes`: see ScanCodes.
int SelectAndWeigh(const int16_t* sums, int sums_stride, const uint8_t* codes, int blocks,
                   WeighedBlocks weighed, int symbols, int planes, const ScanHead* scan_heads,
                   int heads, uint32_t first_index, uint32_t* chosen, float* block_weights,
                   int weights_stride, const uint8_t* next_codes = nullptr) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_LADDER_SELECT_H_
