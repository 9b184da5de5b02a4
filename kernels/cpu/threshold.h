// Selection by rank: the value that the best `rank` of many exceed or equal.
#ifndef KVSEEK_KERNELS_CPU_THRESHOLD_H_
#define KVSEEK_KERNELS_CPU_THRESHOLD_H_

#include <cstdint>

namespace kvseek::kernels {

/// A value t between which the best `rank` of `count` values and the others are divided: at most
/// `rank` values are > t, at least `rank` are >= t. +infinity for rank <= 0, -infinity for rank >
/// count. Values are not NaN; -infinity is allowed. `work` has room for `count` more.
///
/// Bisection on the values' bit patterns: some twenty counting passes, vectorised, whatever the
/// order, over the values that can be among the best if these are few. A radix select took several
/// times as long at 4K-16K values. The same bits at every SIMD level. Pure; thread-safe.
float RankThreshold(const float* values, int64_t count, int64_t rank, int32_t* work) noexcept;

/// Writes the indices of the values that are >= threshold, ascending; returns how many. `indices`
/// has room for `count`, and all of it may be written. Pure; thread-safe.
int64_t IndicesFrom(const float* values, int64_t count, float threshold,
                    uint32_t* indices) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_THRESHOLD_H_
