// What the launchers of this folder share.
//
// A kernel of Launch begins when all work before it in the stream has ended. One of LaunchEarly
// (programmatic dependent launch; compute capability 9.0) may have its blocks started as soon as
// every block of the kernel before it has ended, and waits in WaitForEarlierWork until that kernel
// as a whole has ended and all that it wrote can be seen. It keeps three rules:
//
// - Every thread calls WaitForEarlierWork, on every path.
// - Before the call it works on its arguments and on the block's shared memory only. It reads
//   nothing that work before it may have written, and writes nothing that such work may still use:
//   outputs, workspaces.
// - It reads such memory by plain loads, also after the call. Those of the read-only path (__ldg,
//   __restrict__) promise that nobody writes as long as the kernel runs, and may be moved up.
//
// The order of the stream then is what it was. A kernel that started early ends after its wait,
// thus after the kernel before it, and that one, by the same rule or because it started late, after
// all before it: to wait for the last kernel is to wait for all. Only kernels of others that start
// early and do not wait would break this. No kernel here lets the next one start before its own
// blocks end (cudaTriggerProgrammaticLaunchCompletion), so nothing holds a place on the device that
// waits for more than the end of one kernel; behind AwaitPermit nothing starts before the permit.
// Copies and events are waited for as ever. A captured graph keeps the early start as an edge of
// its own kind.
#ifndef KVSEEK_KERNELS_CUDA_LAUNCH_H_
#define KVSEEK_KERNELS_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "kernels/cuda/kv_pages.h"

namespace kvseek::kernels::cuda {

inline bool IsAligned(const void* pointer) {
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

inline bool IsRowDim(int dim) { return dim >= 8 && dim <= kMaxRowDim && dim % 8 == 0; }

/// Shapes, element type and pointers of a pool.
inline bool IsValid(const PagePool& pool) {
  return pool.kv_heads >= 1 && pool.page_tokens >= 1 && IsRowDim(pool.key_dim) &&
         IsRowDim(pool.value_dim) && DTypeBytes(pool.dtype) == 2 && IsAligned(pool.keys) &&
         IsAligned(pool.values);
}

inline cudaLaunchConfig_t LaunchConfig(dim3 grid, int threads, size_t shared_bytes,
                                       cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return config;
}

template <typename Kernel, typename... Arguments>
cudaError_t Launch(Kernel kernel, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  const cudaLaunchConfig_t config = LaunchConfig(grid, threads, shared_bytes, stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

/// The kernel's part of LaunchEarly; nothing where the kernel was launched otherwise.
__device__ inline void WaitForEarlierWork() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

/// Whether the code that the current device runs of kKernel has the wait in it. A new device is not
/// enough: it may run what was compiled for an older one.
template <auto kKernel>
bool HasWait() {
  constexpr int kDevices = 64;
  static std::atomic<int> versions[kDevices]{};  // of the code; 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int version = versions[device].load(std::memory_order_relaxed);
  if (version == 0) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, kKernel) != cudaSuccess) return false;
    version = attributes.ptxVersion;
    versions[device].store(version, std::memory_order_relaxed);
  }
  return version >= 90;
}

/// Launches a kernel that keeps the rules above, early where the device can do that.
template <auto kKernel, typename... Arguments>
cudaError_t LaunchEarly(dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                        const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = LaunchConfig(grid, threads, shared_bytes, stream);
  config.attrs = &early;
  config.numAttrs = HasWait<kKernel>() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_LAUNCH_H_
