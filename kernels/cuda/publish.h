// A stream and a host thread that hand data to each other through flags in pinned host memory,
// without a copy engine or an event.
//
// Publish: a kernel writes a tensor to host memory and raises flags there, at which the thread
// looks. For some kilobytes that takes half of the time of cudaMemcpyAsync and cudaEventQuery.
// AwaitPermit: a kernel looks at a flag that the thread raises when its data is there, so that what
// works on the data is launched before, while the thread has to wait anyway.
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

/// All that is enqueued after it runs when `*flag` (pinned host memory) is `number`, and then sees
/// what the host wrote before Permit. Takes one warp of the device, and reads the flag about once a
/// microsecond.
///
/// Whoever waits for the stream waits for the permit. So it must be given on every path, errors
/// included, and before it the thread that gives it must make no call that may wait for the device:
/// the first launch of a kernel of this process is one (it may load code). Only enqueues. Errors:
/// cudaErrorInvalidValue, or what the launch returned.
cudaError_t AwaitPermit(const uint32_t* flag, uint32_t number, cudaStream_t stream) noexcept;

/// Lets the AwaitPermit of `number` end.
inline void Permit(uint32_t* flag, uint32_t number) {
  std::atomic_ref<uint32_t>(*flag).store(number, std::memory_order_release);
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_PUBLISH_H_
