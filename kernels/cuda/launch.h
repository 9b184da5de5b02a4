// What the launchers of this folder share.
#ifndef KVSEEK_KERNELS_CUDA_LAUNCH_H_
#define KVSEEK_KERNELS_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

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

template <typename Kernel, typename... Arguments>
cudaError_t Launch(Kernel kernel, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_LAUNCH_H_
