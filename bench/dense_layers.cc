#include "bench/dense_layers.h"

#include <algorithm>

#include "bench/random_fill.h"

namespace kvseek::bench {

using client::DeviceArray;

const std::vector<Model>& Models() {
  static const std::vector<Model> models{
      {"llama3-8b", 32, 4096, 14336, 32, 8, 128, 128256},
      {"llama3-70b-tp8", 80, 8192, 28672 / 8, 8, 1, 128, 128256 / 8}};
  return models;
}

DeviceArray<uint16_t> RandomArray(size_t count, float scale, uint64_t seed, cudaStream_t stream) {
  DeviceArray<uint16_t> array;
  size_t total = 0;
  Must("memory", array.Allocate(count, total));
  Must("random numbers", RandomFill(array.get(), count, scale, seed, stream));
  return array;
}

DenseLayers::DenseLayers(const Model& model, uint32_t layers, uint32_t batch, cudaStream_t stream)
    : model_(model), batch_(batch) {
  if (cublasCreate(&blas_) != CUBLAS_STATUS_SUCCESS) Fail("cublasCreate");
  cublasSetStream(blas_, stream);
  for (uint32_t layer = 0; layer < layers; ++layer) {
    weights_.push_back(RandomArray(model.LayerWeights(), 0.02F, layer, stream));
  }
  head_ = RandomArray(size_t{model.vocabulary} * model.hidden, 0.02F, 99, stream);
  const size_t widest =
      std::max<size_t>({2 * size_t{model.ffn}, model.vocabulary, model.hidden, model.QkvColumns()});
  hidden_ = RandomArray(size_t{batch} * model.hidden, 1.0F, 100, stream);
  wide_ = RandomArray(size_t{batch} * widest, 1.0F, 101, stream);
  attended_ = RandomArray(size_t{batch} * model.query_heads * model.head_dim, 1.0F, 102, stream);
}

void DenseLayers::BeforeAttention(uint32_t layer) {
  if (weights_.empty()) return;
  Multiply(weights_[layer].get(), model_.QkvColumns(), model_.hidden, hidden_.get(), wide_.get());
}

void DenseLayers::AfterAttention(uint32_t layer) {
  if (weights_.empty()) return;
  const size_t heads = size_t{model_.query_heads} * model_.head_dim;
  const uint16_t* weights = weights_[layer].get() + model_.QkvColumns() * model_.hidden;
  Multiply(weights, model_.hidden, heads, attended_.get(), hidden_.get());
  weights += heads * model_.hidden;
  Multiply(weights, 2 * size_t{model_.ffn}, model_.hidden, hidden_.get(), wide_.get());
  weights += 2 * size_t{model_.ffn} * model_.hidden;
  Multiply(weights, model_.hidden, model_.ffn, wide_.get(), hidden_.get());
}

void DenseLayers::Head() {
  Multiply(head_.get(), model_.vocabulary, model_.hidden, hidden_.get(), wide_.get());
}

void DenseLayers::Multiply(const uint16_t* weights, size_t columns, size_t rows, const uint16_t* in,
                           uint16_t* out) {
  const float one = 1.0F, zero = 0.0F;
  const int m = static_cast<int>(columns), n = static_cast<int>(batch_);
  const int k = static_cast<int>(rows);
  if (cublasGemmEx(blas_, CUBLAS_OP_T, CUBLAS_OP_N, m, n, k, &one, weights, CUDA_R_16BF, k, in,
                   CUDA_R_16BF, k, &zero, out, CUDA_R_16BF, m, CUBLAS_COMPUTE_32F,
                   CUBLAS_GEMM_DEFAULT) != CUBLAS_STATUS_SUCCESS) {
    Fail("cublasGemmEx");
  }
}

}  // namespace kvseek::bench
