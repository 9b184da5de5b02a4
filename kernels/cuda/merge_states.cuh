// The kernel behind MergeStates (attention.h): a thread merges four elements each of some
// heads.
#ifndef KVSEEK_KERNELS_CUDA_MERGE_STATES_CUH_
#define KVSEEK_KERNELS_CUDA_MERGE_STATES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch.h"

namespace kvseek::kernels::cuda {

inline constexpr int kMergeThreads = 128;

// What a thread has in flight: quads of `kStates` states each of `kHeads` heads.
template <int kStates, int kHeads>
struct MergeShape {
  static constexpr int kStatesAtOnce = kStates;
  static constexpr int kHeadsAtOnce = kHeads;
};
using FewStates = MergeShape<2, 2>;
using ManyStates = MergeShape<4, 2>;

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
struct MergedHead {
  float max = -INFINITY;
  float sum = 0.0F;
  float4 acc = make_float4(0.0F, 0.0F, 0.0F, 0.0F);

  template <int kStates>
  __device__ void Add(const float (&lses)[kStates], const float4 (&quads)[kStates]) {
    float new_max = max;
#pragma unroll
    for (int i = 0; i < kStates; ++i) new_max = fmaxf(new_max, lses[i]);
    if (new_max == -INFINITY) return;
    const float factor = __expf(max - new_max);
    max = new_max;
    sum *= factor;
    acc = make_float4(acc.x * factor, acc.y * factor, acc.z * factor, acc.w * factor);
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
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

// State `index` of all lists.
struct StatesOfHeads {
  const float* outs;
  const float* lses;

  __device__ StatesOfHeads(const MergeArguments& arguments, int index) {
    int list = 0;
#pragma unroll
    for (int l = 0; l < kMaxStateLists - 1; ++l) {
      if (list == l && index >= arguments.lists[l].count) {
        index -= arguments.lists[l].count;
        list = l + 1;
      }
    }
    const int64_t row = int64_t{index} * arguments.heads;
    outs = arguments.lists[list].outs + row * arguments.value_dim;
    lses = arguments.lists[list].lses + row;
  }
};

// A block has kHeadsAtOnce x (kMergeThreads / head_threads) heads. Grid: as many blocks as that
// takes.
template <typename Out, typename Shape>
__global__ void __launch_bounds__(kMergeThreads)
    MergeStatesKernel(const __grid_constant__ MergeArguments arguments) {
  WaitForEarlierWork();
  constexpr int kStatesAtOnce = Shape::kStatesAtOnce;
  constexpr int kHeadsAtOnce = Shape::kHeadsAtOnce;
  const int at_once = kMergeThreads / arguments.head_threads;
  const int block_head = static_cast<int>(threadIdx.x) / arguments.head_threads;
  const int64_t first_head = int64_t{blockIdx.x} * (kHeadsAtOnce * at_once) + block_head;
  const int first = static_cast<int>(threadIdx.x) % arguments.head_threads * 4;
  const auto head_of = [&](int i) { return first_head + i * at_once; };
  const auto has_work = [&](int i) { return block_head < at_once && head_of(i) < arguments.heads; };
  float lses_out[kHeadsAtOnce];
  for (int element = first; element < arguments.value_dim; element += arguments.head_threads * 4) {
    MergedHead merged[kHeadsAtOnce];
    for (int state = 0; state < arguments.count; state += kStatesAtOnce) {
      float lses[kHeadsAtOnce][kStatesAtOnce];
      float4 quads[kHeadsAtOnce][kStatesAtOnce];
#pragma unroll
      for (int s = 0; s < kStatesAtOnce; ++s) {
        const StatesOfHeads states(arguments, min(state + s, arguments.count - 1));
#pragma unroll
        for (int i = 0; i < kHeadsAtOnce; ++i) {
          lses[i][s] = -INFINITY;
          quads[i][s] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
          if (state + s >= arguments.count || !has_work(i)) continue;
          lses[i][s] = states.lses[head_of(i)];
          quads[i][s] = *reinterpret_cast<const float4*>(
              states.outs + head_of(i) * arguments.value_dim + element);
        }
      }
#pragma unroll
      for (int i = 0; i < kHeadsAtOnce; ++i) merged[i].Add(lses[i], quads[i]);
    }
#pragma unroll
    for (int i = 0; i < kHeadsAtOnce; ++i) {
      const MergedHead& head = merged[i];
      lses_out[i] = head.sum > 0.0F ? head.max + logf(head.sum) : -INFINITY;
      if (!has_work(i)) continue;
      const float factor = head.sum > 0.0F ? 1.0F / head.sum : 0.0F;
      StoreQuad(static_cast<Out*>(arguments.out) + head_of(i) * arguments.value_dim + element,
                make_float4(head.acc.x * factor, head.acc.y * factor, head.acc.z * factor,
                            head.acc.w * factor));
    }
  }
  if (arguments.lse == nullptr) return;
  __syncthreads();  // `lse` may be one of the inputs
#pragma unroll
  for (int i = 0; i < kHeadsAtOnce; ++i) {
    if (has_work(i) && first == 0) arguments.lse[head_of(i)] = lses_out[i];
  }
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_MERGE_STATES_CUH_
