// The kernel behind AttendGatheredRows (attention.h).
//
// A block works for up to kQueries query heads of one group on one split of its rows. kLanes
// neighbouring threads, a team, share a row: 16 bytes of key and of value a thread. Each team keeps
// a running softmax over its own rows; teams of a warp are merged by shuffles, warps through shared
// memory.
#ifndef KVSEEK_KERNELS_CUDA_GATHERED_ATTENTION_CUH_
#define KVSEEK_KERNELS_CUDA_GATHERED_ATTENTION_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention.h"

namespace kvseek::kernels::cuda {

inline constexpr int kWarpThreads = 32;
inline constexpr int kBlockThreads = 256;
inline constexpr int kBlockWarps = kBlockThreads / kWarpThreads;
inline constexpr int kBlocksPerProcessor = 2;  // caps registers at 128 a thread
inline constexpr int kLaneElements = 8;        // one 16-byte load
inline constexpr int kRowsAtOnce = 4;          // rows that a team has in flight

struct Bf16Rows {
  static __device__ float Low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ float High(uint32_t pair) { return __uint_as_float(pair & 0xffff0000U); }
};

struct Fp16Rows {
  static __device__ float Low(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffffU)));
  }
  static __device__ float High(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
  }
};

template <typename Rows>
__device__ void Unpack(const uint4& packed, float (&elements)[kLaneElements]) {
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    elements[2 * i] = Rows::Low(pairs[i]);
    elements[2 * i + 1] = Rows::High(pairs[i]);
  }
}

__device__ inline float LoadQuery(const void* queries, DType dtype, size_t index) {
  if (dtype == DType::kFp32) return static_cast<const float*>(queries)[index];
  const uint16_t bits = static_cast<const uint16_t*>(queries)[index];
  return dtype == DType::kBf16 ? Bf16Rows::Low(bits) : Fp16Rows::Low(bits);
}

// exp(score - max), where the max of nothing (-infinity) gives 0 and not a NaN.
__device__ inline float Weight(float score, float max) {
  return __expf(score - (max == -INFINITY ? 0.0F : max));
}

// One thread's part of the running states of its team: all of max and sum, 8 elements of acc.
template <int kQueries>
struct TeamState {
  float max[kQueries];
  float sum[kQueries];
  float acc[kQueries][kLaneElements];

  __device__ void Reset() {
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      max[q] = -INFINITY;
      sum[q] = 0.0F;
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) acc[q][e] = 0.0F;
    }
  }

  // Adds rows of which query `q` has the scores; a row that is not there has -infinity, and any
  // finite value.
  __device__ void Add(int q, const float (&scores)[kRowsAtOnce],
                      const float (&values)[kRowsAtOnce][kLaneElements]) {
    float new_max = max[q];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) new_max = fmaxf(new_max, scores[r]);
    Scale(q, new_max);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const float weight = Weight(scores[r], new_max);
      sum[q] += weight;
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) acc[q][e] = fmaf(weight, values[r][e], acc[q][e]);
    }
  }

  // Merges the states of the threads `distance` lanes apart; both end up with the result.
  __device__ void MergeAcross(int distance) {
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      Scale(q, fmaxf(max[q], __shfl_xor_sync(0xffffffffU, max[q], distance)));
      sum[q] += __shfl_xor_sync(0xffffffffU, sum[q], distance);
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e)
        acc[q][e] += __shfl_xor_sync(0xffffffffU, acc[q][e], distance);
    }
  }

 private:
  __device__ void Scale(int q, float new_max) {
    const float factor = Weight(max[q], new_max);
    max[q] = new_max;
    sum[q] *= factor;
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) acc[q][e] *= factor;
  }
};

// What the warps of a block hand over.
template <int kLanes, int kQueries>
struct WarpStates {
  float max[kBlockWarps][kQueries];
  float sum[kBlockWarps][kQueries];
  float acc[kBlockWarps][kQueries][kLanes * kLaneElements];
};

// Writes the finished states of the block's `queries` heads: out (queries, value_dim), lse
// (queries).
template <int kLanes, int kQueries>
__device__ void FinishBlock(const WarpStates<kLanes, kQueries>& warps, int queries, int value_dim,
                            float* out, float* lse) {
  for (int i = threadIdx.x; i < queries * value_dim; i += kBlockThreads) {
    const int q = i / value_dim;
    const int element = i % value_dim;
    float max = -INFINITY;
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) max = fmaxf(max, warps.max[w][q]);
    float sum = 0.0F;
    float acc = 0.0F;
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) {
      const float weight = Weight(warps.max[w][q], max);
      sum = fmaf(weight, warps.sum[w][q], sum);
      acc = fmaf(weight, warps.acc[w][q][element], acc);
    }
    out[i] = sum > 0.0F ? acc / sum : 0.0F;
    if (element == 0) lse[q] = sum > 0.0F ? max + logf(sum) : -INFINITY;
  }
}

// Grid: (groups, query chunks, splits).
template <typename Rows, int kLanes, int kQueries>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerProcessor)
    GatheredAttentionKernel(const GatheredRows rows, float* out, float* lse) {
  constexpr int kTeams = kBlockThreads / kLanes;
  const int team = static_cast<int>(threadIdx.x) / kLanes;
  const int element = static_cast<int>(threadIdx.x) % kLanes * kLaneElements;
  const bool has_key = element < rows.key_dim;
  const bool has_value = element < rows.value_dim;
  const size_t group = blockIdx.x;
  const int first_query = static_cast<int>(blockIdx.y) * kQueries;
  const int queries = min(kQueries, rows.group - first_query);
  const size_t first_head = group * rows.group + first_query;

  float query[kQueries][kLaneElements];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const size_t offset = (first_head + q) * rows.key_dim + element;
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) {
      const bool is_there = q < queries && has_key;
      query[q][e] = is_there
                        ? rows.softmax_scale * LoadQuery(rows.queries, rows.query_dtype, offset + e)
                        : 0.0F;
    }
  }

  const int count = max(0, min(rows.row_counts[group], rows.rows_max));
  const int split_rows = (count + rows.splits - 1) / rows.splits;
  const int begin = min(count, static_cast<int>(blockIdx.z) * split_rows);
  const int end = min(count, begin + split_rows);
  const auto* keys =
      static_cast<const uint16_t*>(rows.keys) + group * rows.rows_max * rows.key_dim + element;
  const auto* values =
      static_cast<const uint16_t*>(rows.values) + group * rows.rows_max * rows.value_dim + element;

  TeamState<kQueries> state;
  state.Reset();
  for (int base = begin; base < end; base += kTeams * kRowsAtOnce) {
    uint4 packed_keys[kRowsAtOnce];
    uint4 packed_values[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const size_t row = base + r * kTeams + team;
      const bool is_there = row < end;
      const uint4 zero = make_uint4(0, 0, 0, 0);
      packed_keys[r] =
          is_there && has_key ? *reinterpret_cast<const uint4*>(keys + row * rows.key_dim) : zero;
      packed_values[r] = is_there && has_value
                             ? *reinterpret_cast<const uint4*>(values + row * rows.value_dim)
                             : zero;
    }

    float scores[kQueries][kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      float key[kLaneElements];
      Unpack<Rows>(packed_keys[r], key);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        float score = 0.0F;
#pragma unroll
        for (int e = 0; e < kLaneElements; ++e) score = fmaf(query[q][e], key[e], score);
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2) {
          score += __shfl_xor_sync(0xffffffffU, score, distance);
        }
        scores[q][r] = base + r * kTeams + team < end ? score : -INFINITY;
      }
    }

    float value[kRowsAtOnce][kLaneElements];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) Unpack<Rows>(packed_values[r], value[r]);
#pragma unroll
    for (int q = 0; q < kQueries; ++q) state.Add(q, scores[q], value);
  }
#pragma unroll
  for (int distance = kLanes; distance < kWarpThreads; distance *= 2) state.MergeAcross(distance);

  __shared__ WarpStates<kLanes, kQueries> warps;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  if (threadIdx.x % kWarpThreads < kLanes) {
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      warps.max[warp][q] = state.max[q];
      warps.sum[warp][q] = state.sum[q];
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) warps.acc[warp][q][element + e] = state.acc[q][e];
    }
  }
  __syncthreads();
  const size_t head = static_cast<size_t>(blockIdx.z) * rows.groups * rows.group + first_head;
  FinishBlock(warps, queries, rows.value_dim, out + head * rows.value_dim, lse + head);
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_GATHERED_ATTENTION_CUH_
