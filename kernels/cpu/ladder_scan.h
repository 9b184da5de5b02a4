// The ladder's scan rung: the sums that estimate every key's score from its 1- or 2-bit code; what
// is made of them stands in ladder_select.h. Layout and terms: ladder_codes.h.
//
// All functions are pure, noexcept and allocate nothing.
#ifndef KVSEEK_KERNELS_CPU_LADDER_SCAN_H_
#define KVSEEK_KERNELS_CPU_LADDER_SCAN_H_

#include <cstdint>

namespace kvseek::kernels {

/// Builds the tables of partial sums of `heads` rotated queries (heads, padded_dim): entry
/// [h][g][s] is round(sum_b +-Rq[6g+b] / unit[h]), bit b of s choosing the sign, |entry| <=
/// kTableMax. tables is (heads, Symbols(padded_dim), 64); units is (heads), the value of one table
/// step (0 for a zero query).
void BuildTables(const float* rotated_queries, int heads, int padded_dim, int8_t* tables,
                 float* units) noexcept;

/// Adds up table entries for every key of `blocks` consecutive scan blocks: sums[h * sums_stride +
/// key]. With one plane the sum is <x, Rq> / unit; with two it is 2 * high + low, that is <x, Rq> /
/// (unit * 0.9957 / 2). codes is 64-byte aligned, sums too; sums_stride is a multiple of 64 and >=
/// 64 * blocks. The same bits at every level. Tables may lie anywhere, but are read faster from a
/// 64-byte boundary, and a call of many blocks is cheaper than many calls: each call prepares a
/// quarter of the tables.
/// `next_codes`: as many blocks again that will be scanned next, or null. ScanCodes fetches one
/// half of them meanwhile, SelectAndWeigh the other, so that memory is busy all the time.
void ScanCodes(const uint8_t* codes, int blocks, int symbols, int planes, const int8_t* tables,
               int heads, int16_t* sums, int sums_stride,
               const uint8_t* next_codes = nullptr) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_LADDER_SCAN_H_
