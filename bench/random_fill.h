// Random tensors on the GPU, for benchmarks.
#ifndef KVSEEK_BENCH_RANDOM_FILL_H_
#define KVSEEK_BENCH_RANDOM_FILL_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace kvseek::bench {

/// Writes `count` normally distributed bf16 numbers of standard deviation `scale`; the same seed
/// gives the same ones. Only enqueues.
cudaError_t RandomFill(void* out, size_t count, float scale, uint64_t seed, cudaStream_t stream);

}  // namespace kvseek::bench

#endif  // KVSEEK_BENCH_RANDOM_FILL_H_
