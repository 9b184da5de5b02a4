// A tensor from the device to a host thread that waits for it, without a copy engine or an event: a
// kernel writes to pinned host memory and raises flags there, at which the thread looks. For some
// kilobytes that takes half of the time of cudaMemcpyAsync and cudaEventQuery.
#ifndef KVSEEK_KERNELS_CUDA_PUBLISH_H_
#define KVSEEK_KERNELS_CUDA_PUBLISH_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace kvseek::kernels::cuda {

inline constexpr size_t kPublishBlockBytes = 16384;
inline constexpr size_t kPublishFlags = 32;

/// Blocks, and so flags, that publish `bytes` bytes.
constexpr size_t PublishBlocks(size_t bytes) {
  return std::clamp((bytes + kPublishBlockBytes - 1) / kPublishBlockBytes, size_t{1},
                    kPublishFlags);
}

/// Writes `bytes` (a multiple of 16) from device memory to `out`, then sets the first PublishBlocks
/// of `flags` (kPublishFlags, zero at first) to `number`, which differs from the last call's. `out`
/// and `flags` are pinned host memory; `data` and `out` are 16-byte aligned. Only enqueues. Errors:
/// cudaErrorInvalidValue, or what the launch returned; where a kernel before this one failed, the
/// flags never come and the stream's status says why.
cudaError_t Publish(const void* data, size_t bytes, void* out, uint32_t* flags, uint32_t number,
                    cudaStream_t stream) noexcept;

/// Whether all that was published with `number` is there to be read. Any thread of the host.
inline bool IsPublished(uint32_t* flags, size_t bytes, uint32_t number) {
  for (size_t i = 0; i < PublishBlocks(bytes); ++i) {
    if (std::atomic_ref<uint32_t>(flags[i]).load(std::memory_order_acquire) != number) return false;
  }
  return true;
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_PUBLISH_H_
