// Maxima over rows of scores. Pure, noexcept, any number of threads; the same bits at every SIMD
// level.
#ifndef KVSEEK_KERNELS_CPU_REDUCE_H_
#define KVSEEK_KERNELS_CPU_REDUCE_H_

namespace kvseek::kernels {

/// The largest of `count` values, -infinity if there are none. Values are not NaN.
float MaxElement(const float* values, int count) noexcept;

/// out[i] = max_h (rows[h * stride + i] - shifts[h]) for i < count, heads >= 1: a key's best
/// normalised score in its group.
void MaxOfShifted(const float* rows, int stride, int heads, const float* shifts, int count,
                  float* out) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_REDUCE_H_
