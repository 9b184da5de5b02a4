// The kernel that encodes values (ladder_encode.h): the values' half of the fine records and their
// factors, and the mean of each block. To be compiled without contraction.
#ifndef KVSEEK_KERNELS_CUDA_ENCODE_VALUES_CUH_
#define KVSEEK_KERNELS_CUDA_ENCODE_VALUES_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/ladder_codes.h"
#include "kernels/cuda/encode_rows.cuh"
#include "kernels/cuda/ladder_encode.h"

namespace kvseek::kernels::cuda {

inline constexpr int kHalfWarp = 16;  // lanes that share a value row
inline constexpr int kMaxWords = 2;   // of four bytes of nibbles: what a lane has of a value row

__device__ inline uint16_t Bf16Downward(float value) {
  return static_cast<uint16_t>((__float_as_uint(value) + (value < 0.0F ? 0xffffU : 0U)) >> 16);
}

// value >= 0
__device__ inline uint16_t Bf16Upward(float value) {
  return static_cast<uint16_t>((__float_as_uint(value) + 0xffffU) >> 16);
}

// The lo and step of a row of which each lane of the half-warp has its smallest and largest
// element.
__device__ inline void ValueGrid(float min, float max, uint16_t& lo, uint16_t& step) {
#pragma unroll
  for (int distance = kHalfWarp / 2; distance > 0; distance /= 2) {
    min = fminf(min, __shfl_xor_sync(kAllLanes, min, distance));
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, distance));
  }
  // Of -0 and 0 either may come out of a minimum; adding 0 makes both 0.
  lo = Bf16Downward(min + 0.0F);
  step = Bf16Upward((max + 0.0F - Bf16Element::Load(lo)) * (1.0F / 15.0F));
}

// Encodes one value row: `words` words of nibbles and zeros, of which lane j writes words j, j
// + 16...
template <typename Element>
__device__ void EncodeValue(const uint16_t* row, int value_dim, int words, int lane,
                            uint32_t* nibbles, FineFactors* factors) {
  const int half_dim = value_dim / 2;
  float elements[kMaxWords][2][4];
  float min = INFINITY;
  float max = -INFINITY;
#pragma unroll
  for (int n = 0; n < kMaxWords; ++n) {
    const int first = 4 * (kHalfWarp * n + lane);
    if (first >= half_dim) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      LoadRun<Element>(row + h * half_dim + first, elements[n][h]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        min = fminf(min, elements[n][h][i]);
        max = fmaxf(max, elements[n][h][i]);
      }
    }
  }
  uint16_t lo_bits;
  uint16_t step_bits;
  ValueGrid(min, max, lo_bits, step_bits);
  const float lo = Bf16Element::Load(lo_bits);
  const float step = Bf16Element::Load(step_bits);
  const float steps_per_unit = step < 1e-37F ? 0.0F : 1.0F / step;
#pragma unroll
  for (int n = 0; n < kMaxWords; ++n) {
    const int w = kHalfWarp * n + lane;
    if (4 * w >= half_dim) continue;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float steps = (elements[n][i / 4][i % 4] - lo) * steps_per_unit + 0.5F;
      word |= static_cast<uint32_t>(fminf(steps, 15.0F)) << (8 * (i % 4) + 4 * (i / 4));
    }
    nibbles[w] = word;
  }
  for (int w = half_dim / 4 + lane; w < words; w += kHalfWarp) nibbles[w] = 0;
  if (lane == 0) {
    factors->lo = lo_bits;
    factors->step = step_bits;
  }
}

// Grid: (segments * 16, heads). A block of threads encodes a block of values.
template <typename Element>
__global__ void __launch_bounds__(kEncodeThreads)
    EncodeValuesKernel(const LadderRows rows, const LadderCodes codes, int record_bytes,
                       int value_offset) {
  const int thread = static_cast<int>(threadIdx.x);
  const size_t block = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const uint16_t* values = SegmentRows(rows.values, rows.value_head_stride, rows.value_token_stride,
                                       blockIdx.y, blockIdx.x / kSegmentBlocks) +
                           blockIdx.x % kSegmentBlocks * kScanBlock * rows.value_token_stride;
  const int words = (record_bytes - value_offset) / 4;
#pragma unroll
  for (int n = 0; n < kScanBlock * kHalfWarp / kEncodeThreads; ++n) {
    const int t = kEncodeThreads / kHalfWarp * n + thread / kHalfWarp;
    const size_t key = block * kScanBlock + t;
    EncodeValue<Element>(
        values + t * rows.value_token_stride, rows.value_dim, words, thread % kHalfWarp,
        reinterpret_cast<uint32_t*>(codes.fine_records + key * record_bytes + value_offset),
        codes.fine_factors + key);
  }
  const MeanLane lane;
  const float2 mean =
      MeanOfRows<Element, kScanBlock>(values, rows.value_token_stride, lane, rows.value_dim);
  if (lane.column < rows.value_dim && !lane.is_odd) {
    *reinterpret_cast<__nv_bfloat162*>(codes.block_means + block * rows.value_dim + lane.column) =
        __float22bfloat162_rn(mean);
  }
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_ENCODE_VALUES_CUH_
