// What an inference engine has of its own, in the least form that the examples need: memory, random
// data, a reference.
#ifndef KVSEEK_EXAMPLES_DECODE_SUPPORT_H_
#define KVSEEK_EXAMPLES_DECODE_SUPPORT_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/dtype.h"

namespace kvseek::examples {

[[noreturn]] inline void Fail(const char* what, const std::string& why) {
  std::fprintf(stderr, "failed: %s: %s\n", what, why.c_str());
  std::exit(1);
}

template <typename T>
T Must(const char* what, absl::StatusOr<T> result) {
  if (!result.ok()) Fail(what, result.status().ToString());
  return *std::move(result);
}

inline void Must(const char* what, cudaError_t error) {
  if (error != cudaSuccess) Fail(what, cudaGetErrorString(error));
}

/// An array in device memory with its twin in pinned host memory; zeros at first, on the host.
template <typename T>
struct Mirror {
  explicit Mirror(size_t elements) : count(elements) {
    Must("cudaMallocHost", cudaMallocHost(reinterpret_cast<void**>(&host), count * sizeof(T)));
    Must("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&device), count * sizeof(T)));
    std::memset(host, 0, count * sizeof(T));
  }
  ~Mirror() {
    cudaFreeHost(host);
    cudaFree(device);
  }
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;

  /// Elements from `from` on.
  void Upload(cudaStream_t stream, size_t from = 0) {
    const size_t bytes = (count - from) * sizeof(T);
    Must("upload",
         cudaMemcpyAsync(device + from, host + from, bytes, cudaMemcpyHostToDevice, stream));
  }
  void Download(cudaStream_t stream) {
    Must("download",
         cudaMemcpyAsync(host, device, count * sizeof(T), cudaMemcpyDeviceToHost, stream));
  }

  size_t count;
  T* host = nullptr;
  T* device = nullptr;
};

/// One layer of random numbers: bf16 keys and values (tokens, kv_heads, dim), and one token's
/// queries (heads, dim), bf16 numbers too, whose scores spread about as wide as a real model's.
struct Layer {
  Layer(int tokens_, int kv_heads_, int group, int dim_)
      : tokens(tokens_), kv_heads(kv_heads_), heads(kv_heads_ * group), dim(dim_) {
    std::mt19937 random(std::random_device{}());
    std::normal_distribution<float> normal;
    keys.resize(static_cast<size_t>(tokens) * kv_heads * dim);
    values.resize(keys.size());
    queries.resize(static_cast<size_t>(heads) * dim);
    for (uint16_t& key : keys) key = kernels::FloatToBf16(normal(random));
    for (uint16_t& value : values) value = kernels::FloatToBf16(0.5F + normal(random));
    for (float& query : queries) {
      query = kernels::Bf16ToFloat(kernels::FloatToBf16(3.0F * normal(random)));
    }
  }

  /// Where the row of a token and KV head starts, in keys and in values.
  size_t Row(int token, int kv_head) const {
    return (static_cast<size_t>(token) * kv_heads + kv_head) * dim;
  }

  int tokens, kv_heads, heads, dim;
  std::vector<uint16_t> keys, values;
  std::vector<float> queries;
};

/// Full attention (heads, dim) over all tokens, in double precision.
inline std::vector<double> FullAttention(const Layer& layer, double softmax_scale) {
  std::vector<double> out(static_cast<size_t>(layer.heads) * layer.dim, 0.0);
  std::vector<double> scores(layer.tokens);
  for (int head = 0; head < layer.heads; ++head) {
    const int kv_head = head * layer.kv_heads / layer.heads;
    const float* query = layer.queries.data() + static_cast<size_t>(head) * layer.dim;
    for (int token = 0; token < layer.tokens; ++token) {
      const uint16_t* key = layer.keys.data() + layer.Row(token, kv_head);
      double dot = 0.0;
      for (int d = 0; d < layer.dim; ++d)
        dot += static_cast<double>(query[d]) * kernels::Bf16ToFloat(key[d]);
      scores[token] = softmax_scale * dot;
    }
    const double max = *std::max_element(scores.begin(), scores.end());
    double sum = 0.0;
    for (double& score : scores) sum += score = std::exp(score - max);
    for (int token = 0; token < layer.tokens; ++token) {
      const uint16_t* value = layer.values.data() + layer.Row(token, kv_head);
      for (int d = 0; d < layer.dim; ++d) {
        out[static_cast<size_t>(head) * layer.dim + d] +=
            scores[token] / sum * kernels::Bf16ToFloat(value[d]);
      }
    }
  }
  return out;
}

/// |out - expected| / |expected| of the worst head; NaN if there is one in `out`.
inline double WorstError(const float* out, const std::vector<double>& expected, int dim) {
  double worst = 0.0;
  for (size_t head = 0; head < expected.size(); head += dim) {
    double difference = 0.0;
    double norm = 0.0;
    for (size_t i = head; i < head + dim; ++i) {
      difference += (out[i] - expected[i]) * (out[i] - expected[i]);
      norm += expected[i] * expected[i];
    }
    const double error = std::sqrt(difference / norm);
    if (std::isnan(error)) return error;
    worst = std::max(worst, error);
  }
  return worst;
}

}  // namespace kvseek::examples

#endif  // KVSEEK_EXAMPLES_DECODE_SUPPORT_H_
