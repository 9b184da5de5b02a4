// The kernels behind NearestKeys (query_statistics.h).
//
// A *candidate* is a 64-bit number that orders keys as the answer does: the score's bits, made to
// ascend with it, above the inverted position. All differ, so the top k are one set whatever the
// order of threads. 0 is no key.
#ifndef KVSEEK_KERNELS_CUDA_NEAREST_KEYS_CUH_
#define KVSEEK_KERNELS_CUDA_NEAREST_KEYS_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>

#include "kernels/cuda/query_statistics.h"
#include "kernels/cuda/score_block.cuh"

namespace kvseek::kernels::cuda {

__device__ inline uint64_t Candidate(float score, int position) {
  const uint32_t bits = __float_as_uint(score + 0.0F);  // -0 and 0 are equal scores
  const uint32_t ascending = bits ^ ((bits >> 31) != 0 ? 0xffffffffU : 0x80000000U);
  return static_cast<uint64_t>(ascending) << 32 | ~static_cast<uint32_t>(position);
}

__device__ inline float CandidateScore(uint64_t candidate) {
  const auto ascending = static_cast<uint32_t>(candidate >> 32);
  return __uint_as_float(ascending ^ ((ascending >> 31) != 0 ? 0x80000000U : 0xffffffffU));
}

__device__ inline int CandidatePosition(uint64_t candidate) {
  return static_cast<int>(~static_cast<uint32_t>(candidate));
}

// The best so far of each row of a block of scores: best (rows, k) in any order, and a bound that
// each of the best reaches once there are k of them.
struct NearestSoFar {
  uint64_t* best;
  uint64_t* bounds;  // (rows)
  int k;
};

inline constexpr int kDigitBits = 8;
inline constexpr int kDigits = 1 << kDigitBits;
static_assert(kDigits == kScoreThreads);

struct NearestShared {
  uint64_t pool[kKeyBlock + kMaxNearest];
  int histogram[kDigits];
  cub::BlockScan<int, kScoreThreads>::TempStorage scan;
  int pool_size;
  int digit;
  int above;  // numbers of the digits above it
  int kept;
};

// The largest bound that at least k numbers of the pool reach, or a smaller one that exactly k
// reach: digit by digit from the highest, as radix select goes. REQUIRES: pool_size >= k.
__device__ inline uint64_t SelectBound(NearestShared& shared, int k) {
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t bound = 0;
  int wanted = k;
  for (int shift = 64 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    shared.histogram[thread] = 0;
    __syncthreads();
    for (int i = thread; i < shared.pool_size; i += kScoreThreads) {
      const uint64_t differs = (shared.pool[i] ^ bound) >> shift;
      if (differs < kDigits) atomicAdd(&shared.histogram[differs], 1);
    }
    __syncthreads();
    const int digit = kDigits - 1 - thread;
    const int count = shared.histogram[digit];
    int above;
    cub::BlockScan<int, kScoreThreads>(shared.scan).ExclusiveSum(count, above);
    if (above < wanted && above + count >= wanted) {
      shared.digit = digit;
      shared.above = above;
    }
    __syncthreads();
    bound |= static_cast<uint64_t>(shared.digit) << shift;
    wanted -= shared.above;
    if (shared.histogram[shared.digit] == wanted) break;
    __syncthreads();
  }
  return bound;
}

// Grid: rows. Merges a block of scores with the best so far; the block with key 0 begins anew.
__global__ void __launch_bounds__(kScoreThreads)
    MergeNearestKernel(const ScoreBlock block, const NearestSoFar state) {
  __shared__ NearestShared shared;
  const int thread = static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(blockIdx.x);
  const bool is_first = block.first_key == 0;
  uint64_t* best = state.best + static_cast<size_t>(row) * state.k;
  const uint64_t old_bound = is_first ? 0 : state.bounds[row];
  if (thread == 0) {
    shared.pool_size = state.k;
    shared.kept = 0;
  }
  for (int i = thread; i < state.k; i += kScoreThreads) shared.pool[i] = is_first ? 0 : best[i];
  __syncthreads();

  const float* scores = block.Row(row);
  const int visible = block.VisibleKeys(row);
  for (int i = thread; i < visible; i += kScoreThreads) {
    const uint64_t candidate = Candidate(scores[i], block.first_key + i);
    if (candidate >= old_bound) shared.pool[atomicAdd(&shared.pool_size, 1)] = candidate;
  }
  __syncthreads();
  if (shared.pool_size == state.k && !is_first) return;

  const uint64_t bound = SelectBound(shared, state.k);
  for (int i = thread; i < shared.pool_size; i += kScoreThreads) {
    const uint64_t candidate = shared.pool[i];
    if (candidate != 0 && candidate >= bound) best[atomicAdd(&shared.kept, 1)] = candidate;
  }
  __syncthreads();
  for (int i = shared.kept + thread; i < state.k; i += kScoreThreads) best[i] = 0;
  if (thread == 0) state.bounds[row] = bound;
}

// Grid: rows. Sorts the best of each and writes them to positions and scores (count, heads, k).
__global__ void __launch_bounds__(kScoreThreads)
    WriteNearestKernel(const ScoreBlock block, const NearestSoFar state, int32_t* positions,
                       float* scores) {
  constexpr int kItems = kMaxNearest / kScoreThreads;
  using Sort = cub::BlockRadixSort<uint64_t, kScoreThreads, kItems>;
  __shared__ typename Sort::TempStorage shared;
  const int thread = static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(blockIdx.x);
  const uint64_t* best = state.best + static_cast<size_t>(row) * state.k;
  uint64_t items[kItems];
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    const int i = kScoreThreads * n + thread;
    items[n] = i < state.k ? best[i] : 0;
  }
  Sort(shared).SortDescendingBlockedToStriped(items);
  const size_t first = block.OutputRow(row) * state.k;
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    const int i = kScoreThreads * n + thread;
    if (i >= state.k) continue;
    positions[first + i] = items[n] == 0 ? -1 : CandidatePosition(items[n]);
    if (scores != nullptr) scores[first + i] = items[n] == 0 ? 0.0F : CandidateScore(items[n]);
  }
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_NEAREST_KEYS_CUH_
