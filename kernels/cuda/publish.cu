#include "kernels/cuda/launch.h"
#include "kernels/cuda/publish.h"

namespace kvseek::kernels::cuda {
namespace {

constexpr int kPublishThreads = 512;

// Grid: PublishBlocks, each of which copies a run of pieces of its own.
__global__ void __launch_bounds__(kPublishThreads)
    PublishKernel(const uint4* data, size_t pieces, uint4* out, volatile uint32_t* flags,
                  uint32_t number) {
  const size_t share = (pieces + gridDim.x - 1) / gridDim.x;
  const size_t begin = min(pieces, blockIdx.x * share);
  const size_t end = min(pieces, begin + share);
  for (size_t i = begin + threadIdx.x; i < end; i += kPublishThreads) out[i] = data[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    flags[blockIdx.x] = number;
  }
}

__global__ void AwaitPermitKernel(const volatile uint32_t* flag, uint32_t number) {
  while (*flag != number) {
  }
  __threadfence_system();
}

}  // namespace

cudaError_t Publish(const void* data, size_t bytes, void* out, uint32_t* flags, uint32_t number,
                    cudaStream_t stream) noexcept {
  if (bytes % 16 != 0 || flags == nullptr) return cudaErrorInvalidValue;
  if (bytes > 0 && (!IsAligned(data) || !IsAligned(out))) return cudaErrorInvalidValue;
  return Launch(PublishKernel, dim3(static_cast<unsigned>(PublishBlocks(bytes))), kPublishThreads,
                0, stream, static_cast<const uint4*>(data), bytes / 16, static_cast<uint4*>(out),
                static_cast<volatile uint32_t*>(flags), number);
}

cudaError_t AwaitPermit(const uint32_t* flag, uint32_t number, cudaStream_t stream) noexcept {
  if (flag == nullptr) return cudaErrorInvalidValue;
  return Launch(AwaitPermitKernel, dim3(1), 1, 0, stream,
                static_cast<const volatile uint32_t*>(flag), number);
}

}  // namespace kvseek::kernels::cuda
