// The kernels that encode keys (ladder_encode.h): a segment's centre, the scan and fine codes, the
// mean noise. To be compiled without contraction.
#ifndef KVSEEK_KERNELS_CUDA_ENCODE_KEYS_CUH_
#define KVSEEK_KERNELS_CUDA_ENCODE_KEYS_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/ladder_codes.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/encode_rows.cuh"
#include "kernels/cuda/ladder_encode.h"

namespace kvseek::kernels::cuda {

inline constexpr float kNorm2Min = 1e-30F;  // of a residual; a shorter one is taken for zero

// Numbers of a scan block (ladder_codes.h), computed by the compiler.
template <int kDim, int kPlanes>
struct ScanLayout {
  static constexpr int kSymbols = Symbols(kDim);
  static constexpr int kPlaneBytes = PlaneRows(kSymbols) * kScanBlock;
  static constexpr int kGainOffset = ScanGainOffset(kSymbols, kPlanes);
  static constexpr int kBytes = ScanBlockBytes(kSymbols, kPlanes);
};

// Grid: (segments, heads).
template <typename Element>
__global__ void __launch_bounds__(kEncodeThreads)
    CentreKernel(const LadderRows rows, float* centres) {
  const MeanLane lane;
  const uint16_t* first =
      SegmentRows(rows.keys, rows.key_head_stride, rows.key_token_stride, blockIdx.y, blockIdx.x);
  const float2 mean =
      MeanOfRows<Element, kSegmentKeys>(first, rows.key_token_stride, lane, rows.key_dim);
  const size_t segment = static_cast<size_t>(blockIdx.y) * rows.segments + blockIdx.x;
  if (lane.column < rows.key_dim && !lane.is_odd) {
    *reinterpret_cast<float2*>(centres + segment * rows.key_dim + lane.column) = mean;
  }
}

// How kLanes neighbouring threads, one key's lanes, share its dimensions: each has 64 of them,
// kRows runs of kRun. Dimension 16 * row + lane * kRun + column is element row * kRun + column of
// its lane. So a lane has whole running sums of ladder_codes.h, and loads and stores are of whole
// runs.
template <int kDim>
struct KeyShare {
  static constexpr int kElements = 64;
  static constexpr int kLanes = kDim / kElements;
  static constexpr int kRun = 16 / kLanes;
  static constexpr int kRows = kDim / 16;
  static constexpr int kThreads = kScanBlock * kLanes;
  static constexpr int kBlocksPerProcessor = 640 / kThreads;  // caps registers at 96 or 128
};

// Bit e of flips[round][lane]: RotationFlips of element e of the lane.
struct RotationSigns {
  uint64_t flips[2][kMaxRowDim / 64];
};

// residual := key - centre, 0 past key_dim.
template <typename Element, int kDim>
__device__ void LoadResidual(const uint16_t* row, const float* centre, int key_dim, int lane,
                             float (&x)[KeyShare<kDim>::kElements]) {
  using Share = KeyShare<kDim>;
  constexpr int kLoad = Share::kRun < 8 ? Share::kRun : 8;
#pragma unroll
  for (int e = 0; e < Share::kElements; e += kLoad) {
    const int i = e / Share::kRun * 16 + lane * Share::kRun + e % Share::kRun;
    float key[kLoad] = {};
    if (i < key_dim) LoadRun<Element>(row + i, key);
#pragma unroll
    for (int n = 0; n < kLoad; n += 4) {
      const auto mean = i < key_dim ? *reinterpret_cast<const float4*>(centre + i + n)
                                    : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      x[e + n] = key[n] - mean.x;
      x[e + n + 1] = key[n + 1] - mean.y;
      x[e + n + 2] = key[n + 2] - mean.z;
      x[e + n + 3] = key[n + 3] - mean.w;
    }
  }
}

template <int kCount>
__device__ void Butterflies(int stride, float (&x)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if ((e & stride) != 0) continue;
    const float a = x[e];
    const float b = x[e + stride];
    x[e] = a + b;
    x[e + stride] = a - b;
  }
}

// The unscaled Walsh-Hadamard transform of a key's dimensions, stages in ascending stride.
template <int kDim>
__device__ void Transform(int lane, float (&x)[KeyShare<kDim>::kElements]) {
  using Share = KeyShare<kDim>;
#pragma unroll
  for (int stride = 1; stride < Share::kRun; stride *= 2) Butterflies(stride, x);
#pragma unroll
  for (int stride = 1; stride < Share::kLanes; stride *= 2) {
    const float sign = (lane & stride) != 0 ? -1.0F : 1.0F;
#pragma unroll
    for (float& a : x) a = fmaf(a, sign, __shfl_xor_sync(kAllLanes, a, stride));  // exact product
  }
#pragma unroll
  for (int stride = Share::kRun; stride < Share::kElements; stride *= 2) Butterflies(stride, x);
}

template <int kDim>
__device__ void Rotate(const RotationSigns& signs, int lane,
                       float (&x)[KeyShare<kDim>::kElements]) {
#pragma unroll
  for (int round = 0; round < 2; ++round) {
    const uint64_t flips = signs.flips[round][lane];
    const float scale = round == 0 ? 1.0F : 1.0F / kDim;
#pragma unroll
    for (int e = 0; e < KeyShare<kDim>::kElements; ++e) {
      const uint32_t sign = static_cast<uint32_t>(flips >> e) << 31;
      x[e] = scale * __uint_as_float(__float_as_uint(x[e]) ^ sign);
    }
    Transform<kDim>(lane, x);
  }
}

// The running sums of one lane, and their total over the key's lanes, by halves.
template <int kDim>
struct RunningSums {
  float sums[KeyShare<kDim>::kRun] = {};

  // Adds what belongs to element e of the lane; in ascending e.
  __device__ void Add(int e, float x) { sums[e % KeyShare<kDim>::kRun] += x; }
  __device__ float Total() {
#pragma unroll
    for (int stride = KeyShare<kDim>::kLanes / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (float& sum : sums) sum += __shfl_xor_sync(kAllLanes, sum, stride);
    }
#pragma unroll
    for (int n = KeyShare<kDim>::kRun / 2; n > 0; n /= 2) {
#pragma unroll
      for (int j = 0; j < KeyShare<kDim>::kRun / 2; ++j) {
        if (j < n) sums[j] += sums[j + n];
      }
    }
    return sums[0];
  }
};

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

// One plane of one key: bit i of the plane is bit i % 32 of words[i / 32].
template <int kDim>
struct PlaneBits {
  uint32_t words[kDim / 32 + 1] = {};  // the last one stays 0

  // Sets the bit of element e of a lane as if the lane were the first.
  __device__ void Set(int e, bool bit) {
    constexpr int kRun = KeyShare<kDim>::kRun;
    const int i = e / kRun * 16 + e % kRun;
    words[i / 32] |= bit ? 1U << (i % 32) : 0U;
  }
  // Puts the bits of all lanes together.
  __device__ void Gather(int lane) {
#pragma unroll
    for (int w = 0; w < kDim / 32; ++w) {
      words[w] <<= lane * KeyShare<kDim>::kRun;
#pragma unroll
      for (int stride = 1; stride < KeyShare<kDim>::kLanes; stride *= 2) {
        words[w] |= __shfl_xor_sync(kAllLanes, words[w], stride);
      }
    }
  }
  // Writes this lane's part of the symbols to the key's column of its block.
  __device__ void PutSymbols(int lane, uint8_t* column) const {
    constexpr int kSymbols = ScanLayout<kDim, 1>::kSymbols;
    constexpr int kQuads = kSymbols / 4;
#pragma unroll
    for (int m = 0; m <= kQuads; ++m) {
      if (m % KeyShare<kDim>::kLanes != lane) continue;
      const int first = 4 * kSymbolBits * m;
      const uint32_t bits = __funnelshift_r(words[first / 32], words[first / 32 + 1], first % 32);
      uint8_t* rows = column + 3 * kScanBlock * m;
      if (m < kQuads) {
        rows[0] = static_cast<uint8_t>((bits & 63U) | (bits >> 18 & 3U) << 6);
        rows[kScanBlock] = static_cast<uint8_t>((bits >> 6 & 63U) | (bits >> 20 & 3U) << 6);
        rows[2 * kScanBlock] = static_cast<uint8_t>((bits >> 12 & 63U) | (bits >> 22 & 3U) << 6);
      } else {
#pragma unroll
        for (int g = 0; g < kSymbols % 4; ++g) {
          rows[g * kScanBlock] = static_cast<uint8_t>(bits >> (kSymbolBits * g) & 63U);
        }
      }
    }
  }
};

// The scan code of one residual. `column` is the key's byte of the block's first row.
template <int kDim, int kPlanes>
__device__ CodeSums ScanCode(const float (&r)[KeyShare<kDim>::kElements], float norm2, int lane,
                             uint8_t* column) {
  constexpr float kInner = 0.5F * kTwoBitStep;
  constexpr float kOuter = 1.5F * kTwoBitStep;
  const float bound = norm2 < kNorm2Min ? 3e38F : kTwoBitStep * sqrtf(norm2 / kDim);
  PlaneBits<kDim> planes[kPlanes];
  RunningSums<kDim> dot;
  RunningSums<kDim> code_norm2;
#pragma unroll
  for (int e = 0; e < KeyShare<kDim>::kElements; ++e) {
    const bool positive = r[e] >= 0.0F;
    planes[0].Set(e, positive);
    if constexpr (kPlanes == 1) {
      dot.Add(e, fabsf(r[e]));
    } else {
      const bool top = r[e] >= bound;
      const bool bottom = r[e] < -bound;
      planes[1].Set(e, top || !(positive || bottom));
      const bool is_outer = top || bottom;
      dot.Add(e, (is_outer ? kOuter : kInner) * fabsf(r[e]));
      code_norm2.Add(e, is_outer ? kOuter * kOuter : kInner * kInner);
    }
  }
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    planes[plane].Gather(lane);
    planes[plane].PutSymbols(lane, column + plane * ScanLayout<kDim, kPlanes>::kPlaneBytes);
  }
  return {dot.Total(), kPlanes == 1 ? static_cast<float>(kDim) : code_norm2.Total(), norm2};
}

// The 4-bit code of one residual: kDim / 2 bytes of nibbles. Returns its gain.
template <int kDim>
__device__ float FineCode(const float (&r)[KeyShare<kDim>::kElements], float norm2, int lane,
                          uint8_t* record) {
  using Share = KeyShare<kDim>;
  constexpr float kToWhole = 12582912.0F;  // 1.5 * 2^23: added, rounding down, it leaves the floor
  const float scale =
      norm2 < kNorm2Min ? 0.0F : sqrtf(static_cast<float>(kDim)) / (sqrtf(norm2) * kFourBitStep);
  struct alignas(Share::kRun) Run {
    uint32_t words[Share::kRun / 4];
  };
  constexpr int kRuns = Share::kRows / 2;
  Run runs[kRuns] = {};  // the low nibbles are the first half of the elements
  RunningSums<kDim> dot;
#pragma unroll
  for (int e = 0; e < Share::kElements; ++e) {
    const float steps = fminf(fmaxf(r[e] * scale, -8.0F), 7.5F);
    const float whole = __fadd_rd(steps, kToWhole);
    dot.Add(e, (whole - kToWhole + 0.5F) * r[e]);
    const uint32_t nibble = __float_as_uint(whole) - __float_as_uint(kToWhole) + 8;
    const int row = e / Share::kRun;
    const int byte = e % Share::kRun;
    runs[row % kRuns].words[byte / 4] += nibble << (8 * (byte % 4) + row / kRuns * 4);
  }
#pragma unroll
  for (int row = 0; row < kRuns; ++row) {
    *reinterpret_cast<Run*>(record + 16 * row + lane * Share::kRun) = runs[row];
  }
  return Gain({dot.Total() * kFourBitStep, 0.0F, norm2});
}

// Grid: (segments * 16, heads). A block of threads encodes a block of keys; scan codes gather in
// shared memory and leave it sixteen bytes at a time. noise (heads, segments, 1024) gets each key's
// own, or -1.
template <typename Element, int kDim, int kPlanes>
__global__ void __launch_bounds__(KeyShare<kDim>::kThreads, KeyShare<kDim>::kBlocksPerProcessor)
    EncodeKeysKernel(const LadderRows rows, const __grid_constant__ RotationSigns signs,
                     const LadderCodes codes, int record_bytes, float* noise) {
  using Share = KeyShare<kDim>;
  using Layout = ScanLayout<kDim, kPlanes>;
  __shared__ __align__(16) uint8_t scan[Layout::kBytes];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % Share::kLanes;
  const int key = thread / Share::kLanes;
  const size_t block = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const size_t row = block * kScanBlock + key;
  const uint16_t* first = SegmentRows(rows.keys, rows.key_head_stride, rows.key_token_stride,
                                      blockIdx.y, blockIdx.x / kSegmentBlocks);
  const int token = static_cast<int>(blockIdx.x % kSegmentBlocks) * kScanBlock + key;

  float r[Share::kElements];
  LoadResidual<Element, kDim>(first + token * rows.key_token_stride,
                              codes.centres + block / kSegmentBlocks * rows.key_dim, rows.key_dim,
                              lane, r);
  Rotate<kDim>(signs, lane, r);
  RunningSums<kDim> squares;
#pragma unroll
  for (int e = 0; e < Share::kElements; ++e) squares.Add(e, r[e] * r[e]);
  const float norm2 = squares.Total();
  const CodeSums sums = ScanCode<kDim, kPlanes>(r, norm2, lane, scan + key);
  const float fine_gain = FineCode<kDim>(r, norm2, lane, codes.fine_records + row * record_bytes);
  if (lane == 0) {
    reinterpret_cast<__nv_bfloat16*>(scan + Layout::kGainOffset)[key] =
        __float2bfloat16_rn(Gain(sums));
    codes.fine_factors[row].gain = fine_gain;
    noise[row] = norm2 < kNorm2Min ? -1.0F : Noise(sums, kDim);
  }
  __syncthreads();
  auto* scan_out = reinterpret_cast<uint4*>(codes.scan_blocks + block * Layout::kBytes);
  for (int i = thread; i < Layout::kBytes / 16; i += Share::kThreads) {
    scan_out[i] = reinterpret_cast<const uint4*>(scan)[i];
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
