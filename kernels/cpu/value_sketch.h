// Sums of weighted value sketches: what stands for the values of the keys that a scan does not
// choose (product_scan.h). Layout: product_codes.h.
#ifndef KVSEEK_KERNELS_CPU_VALUE_SKETCH_H_
#define KVSEEK_KERNELS_CPU_VALUE_SKETCH_H_

#include <cstdint>

#include "kernels/cpu/product_codes.h"

namespace kvseek::kernels {

/// sums[h * 8 + c] += units[h] * sum over keys of weight * component c of the key's sketch, in
/// steps, for the weighed ones of `blocks` blocks of sketches. REQUIRES: weights and units as
/// SelectProducts (product_scan.h) writes them; at most 64 blocks. Whole numbers but for the last
/// multiplication: the same at every level.
void AddSketches(const uint8_t* sketches, int blocks, WeighedBlocks weighed, const uint8_t* weights,
                 int weights_stride, const float* units, int heads, float* sums) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_VALUE_SKETCH_H_
