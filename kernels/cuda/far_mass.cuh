// The kernels behind MeasureFarMass (query_statistics.h).
#ifndef KVSEEK_KERNELS_CUDA_FAR_MASS_CUH_
#define KVSEEK_KERNELS_CUDA_FAR_MASS_CUH_

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cub/block/block_reduce.cuh>

#include "kernels/cuda/query_statistics.h"
#include "kernels/cuda/score_block.cuh"

namespace kvseek::kernels::cuda {

// Running sums of exp(score - max) of one row, near (sink and recent window) and far.
struct MassState {
  float max;
  float near;
  float far;
};

// Grid: rows. Adds a block of scores to the rows' states; the block with key 0 begins anew.
__global__ void __launch_bounds__(kScoreThreads)
    AddMassKernel(const ScoreBlock block, const SteadyZone zone, MassState* states) {
  constexpr int kItems = kKeyBlock / kScoreThreads;
  using Reduce = cub::BlockReduce<float, kScoreThreads>;
  __shared__ typename Reduce::TempStorage shared[3];
  __shared__ float new_max;
  const int thread = static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(blockIdx.x);
  const float* row_scores = block.Row(row);
  const int visible = block.VisibleKeys(row);
  const int recent_begin = max(0, block.Limit(row) - zone.recent) - block.first_key;
  const int sink_end = zone.sink - block.first_key;

  float scores[kItems];
  float max = -INFINITY;
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    const int i = kScoreThreads * n + thread;
    scores[n] = i < visible ? zone.softmax_scale * row_scores[i] : -INFINITY;
    max = fmaxf(max, scores[n]);
  }
  max = Reduce(shared[0]).Reduce(max, [](float a, float b) { return fmaxf(a, b); });
  MassState state{-INFINITY, 0.0F, 0.0F};
  if (thread == 0) {
    if (block.first_key != 0) state = states[row];
    new_max = fmaxf(max, state.max);
  }
  __syncthreads();
  // The maximum of nothing (-infinity) must not make a NaN.
  const float base = new_max == -INFINITY ? 0.0F : new_max;
  float near = 0.0F;
  float far = 0.0F;
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    const int i = kScoreThreads * n + thread;
    const float weight = __expf(scores[n] - base);
    const bool is_near = i < sink_end || i >= recent_begin;
    near += is_near ? weight : 0.0F;
    far += is_near ? 0.0F : weight;
  }
  near = Reduce(shared[1]).Sum(near);
  far = Reduce(shared[2]).Sum(far);
  if (thread == 0) {
    const float old = __expf(state.max - base);
    states[row] = {new_max, fmaf(old, state.near, near), fmaf(old, state.far, far)};
  }
}

// Grid: rows / kScoreThreads, rounded up. Writes shares (count, heads).
__global__ void __launch_bounds__(kScoreThreads)
    WriteSharesKernel(const ScoreBlock block, int rows, const MassState* states, float* shares) {
  const int row = static_cast<int>(blockIdx.x) * kScoreThreads + static_cast<int>(threadIdx.x);
  if (row >= rows) return;
  const float total = states[row].near + states[row].far;
  shares[block.OutputRow(row)] = total > 0.0F ? states[row].far / total : 0.0F;
}

// Grid: kv_heads. means (kv_heads) of shares (count, kv_heads * group).
__global__ void __launch_bounds__(kScoreThreads)
    MeanSharesKernel(const float* shares, int count, int group, float* means) {
  using Reduce = cub::BlockReduce<double, kScoreThreads>;
  __shared__ typename Reduce::TempStorage shared;
  const size_t heads = static_cast<size_t>(gridDim.x) * group;
  const size_t rows = static_cast<size_t>(count) * group;
  double sum = 0.0;
  for (size_t i = threadIdx.x; i < rows; i += kScoreThreads) {
    sum += static_cast<double>(shares[i / group * heads + blockIdx.x * group + i % group]);
  }
  sum = Reduce(shared).Sum(sum);
  if (threadIdx.x == 0) means[blockIdx.x] = rows == 0 ? 0.0F : static_cast<float>(sum / rows);
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_FAR_MASS_CUH_
