// The kernel behind MergeStates (attention.h): a thread merges four elements of a head.
#ifndef KVSEEK_KERNELS_CUDA_MERGE_STATES_CUH_
#define KVSEEK_KERNELS_CUDA_MERGE_STATES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention.h"

namespace kvseek::kernels::cuda {

inline constexpr int kMergeThreads = 256;
inline constexpr int kStatesAtOnce = 4;  // that a thread has in flight

struct MergeArguments {
  StateList lists[kMaxStateLists];
  int count;  // states of all lists
  int heads;
  int value_dim;
  int head_threads;  // that share a head; all of one block
  void* out;
  float* lse;
};

__device__ inline void StoreQuad(float* to, const float4& quad) {
  *reinterpret_cast<float4*>(to) = quad;
}

__device__ inline void StoreQuad(__nv_bfloat16* to, const float4& quad) {
  const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(quad.x, quad.y),
                                   __floats2bfloat162_rn(quad.z, quad.w)};
  *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
}

__device__ inline void StoreQuad(__half* to, const float4& quad) {
  const __half2 pairs[2] = {__floats2half2_rn(quad.x, quad.y), __floats2half2_rn(quad.z, quad.w)};
  *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
}

// Running state of four elements of a head.
struct MergedQuad {
  float max = -INFINITY;
  float sum = 0.0F;
  float4 acc = make_float4(0.0F, 0.0F, 0.0F, 0.0F);

  // Adds states [first, first + kStatesAtOnce), as far as there are so many.
  __device__ void Add(const MergeArguments& arguments, int first, int head, int element) {
    float lses[kStatesAtOnce];
    float4 quads[kStatesAtOnce];
    float new_max = max;
#pragma unroll
    for (int i = 0; i < kStatesAtOnce; ++i) {
      lses[i] = -INFINITY;
      quads[i] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      if (first + i >= arguments.count) continue;
      int state = first + i;
      int list = 0;
#pragma unroll
      for (int l = 0; l < kMaxStateLists - 1; ++l) {
        if (list == l && state >= arguments.lists[l].count) {
          state -= arguments.lists[l].count;
          list = l + 1;
        }
      }
      const StateList& states = arguments.lists[list];
      const int64_t row = int64_t{state} * arguments.heads + head;
      lses[i] = states.lses[row];
      quads[i] =
          *reinterpret_cast<const float4*>(states.outs + row * arguments.value_dim + element);
    }
#pragma unroll
    for (int i = 0; i < kStatesAtOnce; ++i) new_max = fmaxf(new_max, lses[i]);
    if (new_max == -INFINITY) return;
    const float factor = __expf(max - new_max);
    max = new_max;
    sum *= factor;
    acc = make_float4(acc.x * factor, acc.y * factor, acc.z * factor, acc.w * factor);
#pragma unroll
    for (int i = 0; i < kStatesAtOnce; ++i) {
      if (lses[i] == -INFINITY) continue;  // its outs may be anything
      const float weight = __expf(lses[i] - max);
      sum += weight;
      acc.x = fmaf(weight, quads[i].x, acc.x);
      acc.y = fmaf(weight, quads[i].y, acc.y);
      acc.z = fmaf(weight, quads[i].z, acc.z);
      acc.w = fmaf(weight, quads[i].w, acc.w);
    }
  }
};

// A block has kMergeThreads / head_threads heads. Grid: as many blocks as that takes.
template <typename Out>
__global__ void __launch_bounds__(kMergeThreads)
    MergeStatesKernel(const __grid_constant__ MergeArguments arguments) {
  const int block_heads = kMergeThreads / arguments.head_threads;
  const int block_head = static_cast<int>(threadIdx.x) / arguments.head_threads;
  const int64_t head = int64_t{blockIdx.x} * block_heads + block_head;
  const bool has_work = block_head < block_heads && head < arguments.heads;
  const int first = static_cast<int>(threadIdx.x) % arguments.head_threads * 4;
  float lse = -INFINITY;
  for (int element = first; has_work && element < arguments.value_dim;
       element += arguments.head_threads * 4) {
    MergedQuad merged;
    for (int i = 0; i < arguments.count; i += kStatesAtOnce) {
      merged.Add(arguments, i, static_cast<int>(head), element);
    }
    const float factor = merged.sum > 0.0F ? 1.0F / merged.sum : 0.0F;
    StoreQuad(static_cast<Out*>(arguments.out) + head * arguments.value_dim + element,
              make_float4(merged.acc.x * factor, merged.acc.y * factor, merged.acc.z * factor,
                          merged.acc.w * factor));
    if (merged.sum > 0.0F) lse = merged.max + logf(merged.sum);
  }
  if (arguments.lse == nullptr) return;
  __syncthreads();  // `lse` may be one of the inputs
  if (has_work && first == 0) arguments.lse[head] = lse;
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_MERGE_STATES_CUH_
