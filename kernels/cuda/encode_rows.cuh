// How the encoding kernels (ladder_encode.h) read rows, and the mean of rows, of which centres and
// block means are made. To be compiled without contraction.
#ifndef KVSEEK_KERNELS_CUDA_ENCODE_ROWS_CUH_
#define KVSEEK_KERNELS_CUDA_ENCODE_ROWS_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/ladder_codes.h"
#include "kernels/cuda/ladder_encode.h"

namespace kvseek::kernels::cuda {

inline constexpr int kEncodeThreads = 256;
inline constexpr int kSegmentBlocks = kSegmentKeys / kScanBlock;
inline constexpr unsigned kAllLanes = 0xffffffffU;

struct Bf16Element {
  static __device__ float Load(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};

struct Fp16Element {
  static __device__ float Load(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
};

// Four or eight elements of a row in one load.
template <typename Element, int kCount>
__device__ void LoadRun(const uint16_t* row, float (&elements)[kCount]) {
  uint32_t pairs[kCount / 2];
  if constexpr (kCount == 8) {
    const auto packed = *reinterpret_cast<const uint4*>(row);
    pairs[0] = packed.x;
    pairs[1] = packed.y;
    pairs[2] = packed.z;
    pairs[3] = packed.w;
  } else {
    const auto packed = *reinterpret_cast<const uint2*>(row);
    pairs[0] = packed.x;
    pairs[1] = packed.y;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    elements[i] = Element::Load(static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2))));
  }
}

// First row of segment `segment` of head `head`.
__device__ inline const uint16_t* SegmentRows(const void* rows, int64_t head_stride,
                                              int64_t token_stride, unsigned head,
                                              unsigned segment) {
  return static_cast<const uint16_t*>(rows) + head * head_stride +
         static_cast<int64_t>(segment) * kSegmentKeys * token_stride;
}

// Where a thread stands in the mean of rows: sixteen lanes sum the even rows of 32 columns, the
// other sixteen the odd ones, as MeanRow has it.
struct MeanLane {
  int column = static_cast<int>(threadIdx.x) / 32 * 32 + static_cast<int>(threadIdx.x) % 16 * 2;
  bool is_odd = threadIdx.x % 32 >= 16;
};

// Means of the lane's two columns over kCount rows; without columns of its own it only takes part.
template <typename Element, int kCount>
__device__ float2 MeanOfRows(const uint16_t* rows, int64_t stride, const MeanLane& lane, int dim) {
  constexpr int kRowsAtOnce = 32;  // loads in flight
  float2 mean = make_float2(0.0F, 0.0F);
  if (lane.column < dim) {
    const uint16_t* row = rows + (lane.is_odd ? stride : 0) + lane.column;
    for (int t = 0; t < kCount / 2; t += kRowsAtOnce) {
      uint32_t pairs[kRowsAtOnce];
#pragma unroll
      for (int n = 0; n < kRowsAtOnce; ++n) {
        pairs[n] = *reinterpret_cast<const uint32_t*>(row + 2 * (t + n) * stride);
      }
#pragma unroll
      for (int n = 0; n < kRowsAtOnce; ++n) {
        mean.x += Element::Load(static_cast<uint16_t>(pairs[n]));
        mean.y += Element::Load(static_cast<uint16_t>(pairs[n] >> 16));
      }
    }
  }
  mean.x = (mean.x + __shfl_xor_sync(kAllLanes, mean.x, 16)) * (1.0F / kCount);
  mean.y = (mean.y + __shfl_xor_sync(kAllLanes, mean.y, 16)) * (1.0F / kCount);
  return mean;
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_ENCODE_ROWS_CUH_
