// The kernel behind MergeStates (attention.h): one warp a head.
#ifndef KVSEEK_KERNELS_CUDA_MERGE_STATES_CUH_
#define KVSEEK_KERNELS_CUDA_MERGE_STATES_CUH_

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>

namespace kvseek::kernels::cuda {

inline constexpr int kMergeThreads = 128;
inline constexpr int kMergeHeads = kMergeThreads / 32;  // of a block

// Grid: (heads / kMergeHeads, rounded up).
__global__ void __launch_bounds__(kMergeThreads)
    MergeStatesKernel(const float* outs, const float* lses, int count, int heads, int value_dim,
                      float* out, float* lse) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const size_t head = static_cast<size_t>(blockIdx.x) * kMergeHeads + threadIdx.x / 32;
  if (head >= static_cast<size_t>(heads)) return;

  float max = -INFINITY;
  for (int i = lane; i < count; i += 32)
    max = fmaxf(max, lses[static_cast<size_t>(i) * heads + head]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    max = fmaxf(max, __shfl_xor_sync(0xffffffffU, max, distance));
  const bool is_empty = max == -INFINITY;

  float sum = 0.0F;
  if (!is_empty) {
    for (int i = lane; i < count; i += 32)
      sum += __expf(lses[static_cast<size_t>(i) * heads + head] - max);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffU, sum, distance);

  for (int element = 4 * lane; element < value_dim; element += 4 * 32) {
    float4 acc = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    for (int i = 0; i < count && !is_empty; ++i) {
      const size_t state = static_cast<size_t>(i) * heads + head;
      if (lses[state] == -INFINITY) continue;
      const float weight = __expf(lses[state] - max) / sum;
      const float4 part = *reinterpret_cast<const float4*>(outs + state * value_dim + element);
      acc.x = fmaf(weight, part.x, acc.x);
      acc.y = fmaf(weight, part.y, acc.y);
      acc.z = fmaf(weight, part.z, acc.z);
      acc.w = fmaf(weight, part.w, acc.w);
    }
    *reinterpret_cast<float4*>(out + head * value_dim + element) = acc;
  }
  // `lse` may be one of the inputs, which other lanes still read above.
  __syncwarp();
  if (lane == 0) lse[head] = is_empty ? -INFINITY : max + logf(sum);
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_MERGE_STATES_CUH_
