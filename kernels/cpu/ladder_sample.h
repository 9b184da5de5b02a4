// A sample of the ladder's scan rung (ladder_scan.h, ladder_select.h) in one call.
//
// Pure, noexcept, allocates nothing.
#ifndef KVSEEK_KERNELS_CPU_LADDER_SAMPLE_H_
#define KVSEEK_KERNELS_CPU_LADDER_SAMPLE_H_

#include <cstdint>

#include "kernels/cpu/sample.h"

namespace kvseek::kernels {

/// What turns sums into scores, for one head; the rest is the block's. As in ScanHead
/// (ladder_select.h).
struct SampleHead {
  float slope;
  float noise;  ///< scale * |q|, without the segment's noise
};

/// Scans, estimates and weighs a sample as ScanCodes and EstimateScores do. noises is
/// (sample.count): each block's segment's. sums is (count, sample.count * 64), 64-byte aligned, and
/// overwritten.
void SampleCodes(const SampleBlocks& sample, const float* noises, int symbols, int planes,
                 const int8_t* tables, const SampleHead* heads, int count, int16_t* sums,
                 const SampleResults& results) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_LADDER_SAMPLE_H_
