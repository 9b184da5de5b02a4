#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "bench/random_fill.h"

namespace kvseek::bench {
namespace {

constexpr int kThreads = 256;
constexpr size_t kBlocksMax = 4096;

__device__ uint64_t Hash(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// Box-Muller: two numbers of each hash.
__global__ void RandomFillKernel(__nv_bfloat16* out, size_t count, float scale, uint64_t seed) {
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < (count + 1) / 2;
       i += step) {
    const uint64_t bits = Hash(seed * 0x2545f4914f6cdd1dULL + i);
    const float u = (static_cast<float>(bits >> 40) + 1.0F) * 0x1p-24F;
    const float v = static_cast<float>(bits & 0xffffffU) * 0x1p-24F;
    const float radius = scale * sqrtf(-2.0F * __logf(u));
    out[2 * i] = __float2bfloat16(radius * __cosf(6.2831853F * v));
    if (2 * i + 1 < count) out[2 * i + 1] = __float2bfloat16(radius * __sinf(6.2831853F * v));
  }
}

}  // namespace

cudaError_t RandomFill(void* out, size_t count, float scale, uint64_t seed, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const size_t blocks = std::min(kBlocksMax, (count / 2 + kThreads) / kThreads);
  RandomFillKernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<__nv_bfloat16*>(out), count, scale, seed);
  return cudaGetLastError();
}

}  // namespace kvseek::bench
