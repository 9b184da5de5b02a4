// What a decode step does besides attention: the matrix products of a model's layers and of its
// output head (cuBLAS, bf16; norms, rotary embedding and activations are left out). And what a
// bench on the GPU needs for it: models, random arrays, an end to the program when a call fails.
#ifndef KVSEEK_BENCH_DENSE_LAYERS_H_
#define KVSEEK_BENCH_DENSE_LAYERS_H_

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/decoder/gpu_memory.h"

namespace kvseek::bench {

struct Model {
  std::string name;
  uint32_t layers, hidden, ffn, query_heads, kv_heads, head_dim, vocabulary;

  size_t QkvColumns() const { return size_t{query_heads + 2 * kv_heads} * head_dim; }
  size_t LayerWeights() const {
    return size_t{hidden} * (QkvColumns() + size_t{query_heads} * head_dim + 3 * size_t{ffn});
  }
  size_t WeightBytes() const {
    return 2 * (layers * LayerWeights() + 2 * size_t{vocabulary} * hidden);
  }
  size_t KvBytesPerToken() const { return size_t{2} * layers * kv_heads * head_dim * 2; }
};

/// Of 70B, one of eight tensor-parallel ranks.
const std::vector<Model>& Models();

/// Ends the program; Must does unless the call went well.
[[noreturn]] inline void Fail(const std::string& what) {
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::exit(1);
}
inline void Must(const char* what, const absl::Status& status) {
  if (!status.ok()) Fail(std::string(what) + ": " + status.ToString());
}
inline void Must(const char* what, cudaError_t error) {
  Must(what, client::CudaStatus(error, what));
}
template <typename T>
T Must(const char* what, absl::StatusOr<T> result) {
  Must(what, result.status());
  return *std::move(result);
}

/// Normal numbers times `scale`, as bf16.
client::DeviceArray<uint16_t> RandomArray(size_t count, float scale, uint64_t seed,
                                          cudaStream_t stream);

/// The matrix products of a step of a model's first layers, and its output head, on weights of
/// random numbers.
class DenseLayers {
 public:
  /// All work goes to `stream`, which must outlive it. With 0 layers only the output head is there.
  DenseLayers(const Model& model, uint32_t layers, uint32_t batch, cudaStream_t stream);
  ~DenseLayers() { cublasDestroy(blas_); }
  DenseLayers(const DenseLayers&) = delete;
  DenseLayers& operator=(const DenseLayers&) = delete;

  void BeforeAttention(uint32_t layer);
  void AfterAttention(uint32_t layer);
  void Head();
  /// (batch, query_heads, head_dim): where the attention's output goes.
  void* attended() const { return attended_.get(); }

 private:
  /// out (batch, columns) = in (batch, rows) times weights.
  void Multiply(const uint16_t* weights, size_t columns, size_t rows, const uint16_t* in,
                uint16_t* out);

  const Model model_;
  uint32_t batch_;
  cublasHandle_t blas_ = nullptr;
  std::vector<client::DeviceArray<uint16_t>> weights_;
  client::DeviceArray<uint16_t> head_, hidden_, wide_, attended_;
};

}  // namespace kvseek::bench

#endif  // KVSEEK_BENCH_DENSE_LAYERS_H_
