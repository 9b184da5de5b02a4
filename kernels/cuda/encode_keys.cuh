// The kernels that encode keys (ladder_encode.h): a segment's centre, the scan and fine codes, the
// mean noise.
//
// Sixteen lanes, half a warp, share a key, and lane j has the dimensions j, j + 16, ...: then the
// sixteen running sums of ladder_codes.h are the lanes' own, adding them by halves is four
// shuffles, and a ballot is sixteen bits of a plane in order. To be compiled without contraction.
#ifndef KVSEEK_KERNELS_CUDA_ENCODE_KEYS_CUH_
#define KVSEEK_KERNELS_CUDA_ENCODE_KEYS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/ladder_codes.h"
#include "kernels/cuda/ladder_encode.h"

namespace kvseek::kernels::cuda {

inline constexpr int kHalfWarp = 16;
inline constexpr int kEncodeThreads = 256;
inline constexpr int kSegmentBlocks = kSegmentKeys / kScanBlock;
inline constexpr unsigned kAllLanes = 0xffffffffU;
inline constexpr float kNorm2Min = 1e-30F;  // of a residual; a shorter one is taken for zero

// Numbers of a scan block (ladder_codes.h), computed by the compiler.
template <int kDim, int kPlanes>
struct ScanLayout {
  static constexpr int kSymbols = Symbols(kDim);
  static constexpr int kPlaneBytes = PlaneRows(kSymbols) * kScanBlock;
  static constexpr int kGainOffset = ScanGainOffset(kSymbols, kPlanes);
  static constexpr int kBytes = ScanBlockBytes(kSymbols, kPlanes);
};

struct Bf16Element {
  static __device__ float Load(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
};

struct Fp16Element {
  static __device__ float Load(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
};

// First row of segment `segment` of head `head`.
__device__ inline const uint16_t* SegmentRows(const void* rows, int64_t head_stride,
                                              int64_t token_stride, unsigned head,
                                              unsigned segment) {
  return static_cast<const uint16_t*>(rows) + head * head_stride +
         static_cast<int64_t>(segment) * kSegmentKeys * token_stride;
}

// Mean of the elements row[0], row[stride], ...: even and odd ones apart, as MeanRow has it.
template <typename Element, int kCount>
__device__ float MeanOfRows(const uint16_t* row, int64_t stride) {
  constexpr int kPairsAtOnce = 16;  // loads in flight, halved
  float even = 0.0F;
  float odd = 0.0F;
#pragma unroll kPairsAtOnce
  for (int t = 0; t < kCount; t += 2) {
    even += Element::Load(row[t * stride]);
    odd += Element::Load(row[(t + 1) * stride]);
  }
  return (even + odd) * (1.0F / kCount);
}

// Grid: (segments, heads). A thread a dimension.
template <typename Element>
__global__ void __launch_bounds__(kEncodeThreads)
    CentreKernel(const LadderRows rows, float* centres) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= rows.key_dim) return;
  const uint16_t* first =
      SegmentRows(rows.keys, rows.key_head_stride, rows.key_token_stride, blockIdx.y, blockIdx.x);
  const size_t segment = static_cast<size_t>(blockIdx.y) * rows.segments + blockIdx.x;
  centres[segment * rows.key_dim + i] =
      MeanOfRows<Element, kSegmentKeys>(first + i, rows.key_token_stride);
}

// Bit e of flips[round][lane]: RotationFlips of dimension 16 e + lane.
struct RotationSigns {
  uint16_t flips[2][kHalfWarp];
};

// Sum over the lanes of a half-warp, by halves.
__device__ inline float SumLanes(float sum) {
#pragma unroll
  for (int distance = kHalfWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return sum;
}

// The unscaled Walsh-Hadamard transform of a half-warp's dimensions, stages in ascending stride.
template <int kElements>
__device__ void Transform(int lane, float (&x)[kElements]) {
#pragma unroll
  for (int stride = 1; stride < kHalfWarp; stride *= 2) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float other = __shfl_xor_sync(kAllLanes, x[e], stride);
      x[e] = (lane & stride) != 0 ? other - x[e] : x[e] + other;
    }
  }
#pragma unroll
  for (int stride = 1; stride < kElements; stride *= 2) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if ((e & stride) != 0) continue;
      const float a = x[e];
      const float b = x[e + stride];
      x[e] = a + b;
      x[e + stride] = a - b;
    }
  }
}

template <int kElements>
__device__ void Rotate(const uint16_t (&flips)[2], int lane, float (&x)[kElements]) {
  constexpr float kScale = 1.0F / (kElements * kHalfWarp);
#pragma unroll
  for (int e = 0; e < kElements; ++e) x[e] *= (flips[0] >> e & 1) != 0 ? -1.0F : 1.0F;
  Transform(lane, x);
#pragma unroll
  for (int e = 0; e < kElements; ++e) x[e] *= (flips[1] >> e & 1) != 0 ? -kScale : kScale;
  Transform(lane, x);
}

// What one key's code knows of its residual: <x, r>, |x|^2 and |r|^2.
struct CodeSums {
  float dot;
  float code_norm2;
  float norm2;
};

__device__ inline float Gain(const CodeSums& sums) {
  return sums.norm2 < kNorm2Min ? 0.0F : sums.norm2 / sums.dot;
}

__device__ inline float Noise(const CodeSums& sums, int padded_dim) {
  const float along = sums.dot * (sums.dot / sums.norm2);
  return sqrtf(fmaxf(0.0F, sums.code_norm2 - along) / static_cast<float>(padded_dim - 1));
}

// Puts one plane of one key, sixteen bits a lane, into the rows of its block.
template <int kDim>
__device__ void PutSymbols(uint32_t word, int lane, uint8_t* rows) {
  constexpr int kSymbols = ScanLayout<kDim, 1>::kSymbols;
  constexpr int kQuads = kSymbols / 4;
  constexpr int kRest = kSymbols % 4;
  constexpr int kQuadBits = 4 * kSymbolBits;
  const int quad = lane < kQuads ? lane : kQuads;  // the rest begins where one more quad would
  const int first = kQuadBits * quad / 16;
  const uint32_t low = __shfl_sync(kAllLanes, word, first, kHalfWarp);
  uint32_t high = __shfl_sync(kAllLanes, word, first + 1, kHalfWarp);
  if (first + 1 >= kDim / 16) high = 0;
  const uint32_t bits = (low | high << 16) >> (kQuadBits * quad % 16);
  if (lane < kQuads) {
    rows += 3 * kScanBlock * quad;
    rows[0] = static_cast<uint8_t>((bits & 63U) | (bits >> 18 & 3U) << 6);
    rows[kScanBlock] = static_cast<uint8_t>((bits >> 6 & 63U) | (bits >> 20 & 3U) << 6);
    rows[2 * kScanBlock] = static_cast<uint8_t>((bits >> 12 & 63U) | (bits >> 22 & 3U) << 6);
  } else if (lane < kQuads + kRest) {
    const int g = lane - kQuads;
    rows[(3 * kQuads + g) * kScanBlock] = static_cast<uint8_t>(bits >> (kSymbolBits * g) & 63U);
  }
}

// This half-warp's sixteen bits of a ballot, kept by the lane whose word they are.
__device__ inline void KeepBits(bool bit, int e, int lane, uint32_t& word) {
  const uint32_t ballot = __ballot_sync(kAllLanes, bit);
  if (lane == e) word = threadIdx.x % 32 < kHalfWarp ? ballot & 0xffffU : ballot >> 16;
}

// The scan code of one residual. `column` is the key's byte of the block's first row.
template <int kDim, int kPlanes>
__device__ CodeSums ScanCode(const float (&r)[kDim / kHalfWarp], float norm2, int lane,
                             uint8_t* column) {
  constexpr float kInner = 0.5F * kTwoBitStep;
  constexpr float kOuter = 1.5F * kTwoBitStep;
  const float bound = norm2 < kNorm2Min ? 3e38F : kTwoBitStep * sqrtf(norm2 / kDim);
  uint32_t words[2] = {0, 0};
  float dot = 0.0F;
  float code_norm2 = 0.0F;
#pragma unroll
  for (int e = 0; e < kDim / kHalfWarp; ++e) {
    const bool positive = r[e] >= 0.0F;
    KeepBits(positive, e, lane, words[0]);
    if constexpr (kPlanes == 1) {
      dot += fabsf(r[e]);
    } else {
      const bool top = r[e] >= bound;
      const bool bottom = r[e] < -bound;
      KeepBits(top || !(positive || bottom), e, lane, words[1]);
      const float x = top || bottom ? kOuter : kInner;
      dot += x * fabsf(r[e]);
      code_norm2 += x * x;
    }
  }
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    PutSymbols<kDim>(words[plane], lane, column + plane * ScanLayout<kDim, kPlanes>::kPlaneBytes);
  }
  return {SumLanes(dot), kPlanes == 1 ? static_cast<float>(kDim) : SumLanes(code_norm2), norm2};
}

// The 4-bit code of one residual: kDim / 2 bytes of nibbles. Returns its gain.
template <int kDim>
__device__ float FineCode(const float (&r)[kDim / kHalfWarp], float norm2, int lane,
                          uint8_t* nibbles) {
  constexpr int kElements = kDim / kHalfWarp;
  const float scale =
      norm2 < kNorm2Min ? 0.0F : sqrtf(static_cast<float>(kDim)) / (sqrtf(norm2) * kFourBitStep);
  uint32_t levels[kElements];
  float dot = 0.0F;
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const float level = fmaxf(fminf(floorf(r[e] * scale), 7.0F), -8.0F);
    dot += (level + 0.5F) * r[e];
    levels[e] = static_cast<uint32_t>(static_cast<int>(level) + 8);
  }
#pragma unroll
  for (int e = 0; e < kElements / 2; ++e) {
    nibbles[kHalfWarp * e + lane] =
        static_cast<uint8_t>(levels[e] | levels[e + kElements / 2] << 4);
  }
  return Gain({SumLanes(dot) * kFourBitStep, 0.0F, norm2});
}

// Grid: (segments * 16, heads). A block of threads encodes a block of keys: bytes gather in shared
// memory and leave it sixteen at a time. noise (heads, segments, 1024) gets each key's own, or -1.
template <typename Element, int kDim, int kPlanes>
__global__ void __launch_bounds__(kEncodeThreads)
    EncodeKeysKernel(const LadderRows rows, const RotationSigns signs, const LadderCodes codes,
                     int record_bytes, float* noise) {
  constexpr int kElements = kDim / kHalfWarp;
  constexpr int kHalfWarps = kEncodeThreads / kHalfWarp;
  using Layout = ScanLayout<kDim, kPlanes>;
  __shared__ __align__(16) uint8_t scan[Layout::kBytes];
  __shared__ __align__(16) uint8_t fine[kScanBlock][kDim / 2];

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kHalfWarp;
  const size_t block = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const uint16_t* keys = SegmentRows(rows.keys, rows.key_head_stride, rows.key_token_stride,
                                     blockIdx.y, blockIdx.x / kSegmentBlocks) +
                         blockIdx.x % kSegmentBlocks * kScanBlock * rows.key_token_stride;
  const uint16_t flips[2] = {signs.flips[0][lane], signs.flips[1][lane]};
  float centre[kElements];
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const int i = kHalfWarp * e + lane;
    centre[e] = i < rows.key_dim ? codes.centres[block / kSegmentBlocks * rows.key_dim + i] : 0.0F;
  }

  for (int key = thread / kHalfWarp; key < kScanBlock; key += kHalfWarps) {
    const uint16_t* row = keys + key * rows.key_token_stride;
    float r[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int i = kHalfWarp * e + lane;
      r[e] = i < rows.key_dim ? Element::Load(row[i]) - centre[e] : 0.0F;
    }
    Rotate(flips, lane, r);
    float norm2 = 0.0F;
#pragma unroll
    for (int e = 0; e < kElements; ++e) norm2 += r[e] * r[e];
    norm2 = SumLanes(norm2);
    const CodeSums sums = ScanCode<kDim, kPlanes>(r, norm2, lane, scan + key);
    const float fine_gain = FineCode<kDim>(r, norm2, lane, fine[key]);
    if (lane == 0) {
      auto* gains = reinterpret_cast<__nv_bfloat16*>(scan + Layout::kGainOffset);
      gains[key] = __float2bfloat16_rn(Gain(sums));
      codes.fine_factors[block * kScanBlock + key].gain = fine_gain;
      noise[block * kScanBlock + key] = norm2 < kNorm2Min ? -1.0F : Noise(sums, kDim);
    }
  }
  __syncthreads();

  auto* scan_out = reinterpret_cast<uint4*>(codes.scan_blocks + block * Layout::kBytes);
  for (int i = thread; i < Layout::kBytes / 16; i += kEncodeThreads) {
    scan_out[i] = reinterpret_cast<const uint4*>(scan)[i];
  }
  constexpr int kRowVectors = kDim / 2 / 16;
  uint8_t* records = codes.fine_records + block * kScanBlock * record_bytes;
  for (int i = thread; i < kScanBlock * kRowVectors; i += kEncodeThreads) {
    auto* record = reinterpret_cast<uint4*>(records + i / kRowVectors * record_bytes);
    record[i % kRowVectors] =
        reinterpret_cast<const uint4*>(fine[i / kRowVectors])[i % kRowVectors];
  }
}

// Grid: segments of all heads / 16, rounded up. A thread sums the noise of a block of keys, in key
// order, and the sixteen threads of a segment hand their sums on in order.
__global__ void __launch_bounds__(kEncodeThreads)
    MeanNoiseKernel(const float* noise, size_t segments, float* means) {
  const size_t block = static_cast<size_t>(blockIdx.x) * kEncodeThreads + threadIdx.x;
  const size_t segment = block / kSegmentBlocks;
  double sum = 0.0;
  int count = 0;
  if (segment < segments) {
    const auto* four = reinterpret_cast<const float4*>(noise + block * kScanBlock);
#pragma unroll
    for (int i = 0; i < kScanBlock / 4; ++i) {
      const float keys[4] = {four[i].x, four[i].y, four[i].z, four[i].w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (keys[k] < 0.0F) continue;
        sum += static_cast<double>(keys[k]);
        ++count;
      }
    }
  }
  double total = 0.0;
  int keys = 0;
#pragma unroll
  for (int b = 0; b < kSegmentBlocks; ++b) {
    total += __shfl_sync(kAllLanes, sum, b, kSegmentBlocks);
    keys += __shfl_sync(kAllLanes, count, b, kSegmentBlocks);
  }
  if (segment < segments && threadIdx.x % kSegmentBlocks == 0) {
    means[segment] = keys == 0 ? 0.0F : static_cast<float>(total / keys);
  }
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_ENCODE_KEYS_CUH_
