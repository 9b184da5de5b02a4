// Whole tensors from one element type to another. One element at a time: kernels/dtype.h.
#ifndef KVSEEK_KERNELS_CPU_CONVERT_H_
#define KVSEEK_KERNELS_CPU_CONVERT_H_

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace kvseek::kernels {

/// out[i] = in[i] for `count` finite elements of `dtype`; exact. `in` and `out` must not overlap.
void ConvertToFloat(const void* in, DType dtype, size_t count, float* out) noexcept;

/// out[i] = in[i] as fp16, rounded to nearest even; the same bits as FloatToFp16 at every SIMD
/// level.
void ConvertToFp16(const float* in, size_t count, uint16_t* out) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_CONVERT_H_
