// Maxima over rows of scores. Pure, noexcept, any number of threads; the same bits at every SIMD
// level.
#ifndef KVSEEK_KERNELS_CPU_REDUCE_H_
#define KVSEEK_KERNELS_CPU_REDUCE_H_

namespace kvseek::kernels {

/// The largest of `count` values, -infinity if there are none. Values are not NaN.
float MaxElement(const float* values, int count) noexcept;

/// A key's best normalised score in its group: out[i] = max_h (rows[h * stride + i] - shifts[h])
/// for i < count, heads >= 1; +infinity where any head's score exceeds its bound (heads).
void MaxOfShifted(const float* rows, int stride, int heads, const float* shifts,
                  const float* bounds, int count, float* out) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_REDUCE_H_
