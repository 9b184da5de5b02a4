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
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "client/kv_client.h"
#include "kernels/dtype.h"

namespace kvseek::examples {

[[noreturn]] inline void Fail(const char* what, const std::string& why) {
  std::fprintf(stderr, "failed: %s: %s\n", what, why.c_str());
  std::exit(1);
}

inline void Must(const char* what, const absl::Status& status) {
  if (!status.ok()) Fail(what, status.ToString());
}
template <typename T>
T Must(const char* what, absl::StatusOr<T> result) {
  Must(what, result.status());
  return *std::move(result);
}
inline void Must(const char* what, cudaError_t error) {
  if (error != cudaSuccess) Fail(what, cudaGetErrorString(error));
}

/// A bf16 tensor in device memory.
struct DeviceCopy {
  explicit DeviceCopy(const std::vector<uint16_t>& host) : count(host.size()) {
    Must("cudaMalloc", cudaMalloc(&data, count * sizeof(uint16_t)));
    Must("upload", cudaMemcpy(data, host.data(), count * sizeof(uint16_t), cudaMemcpyHostToDevice));
  }
  ~DeviceCopy() { cudaFree(data); }
  DeviceCopy(const DeviceCopy&) = delete;
  DeviceCopy& operator=(const DeviceCopy&) = delete;
  std::vector<uint16_t> Download() const {
    std::vector<uint16_t> host(count);
    Must("download",
         cudaMemcpy(host.data(), data, count * sizeof(uint16_t), cudaMemcpyDeviceToHost));
    return host;
  }

  size_t count;
  void* data = nullptr;
};

/// One token's rows, bf16.
struct NewToken {
  std::vector<uint16_t> queries;       ///< (query_heads, key_dim)
  std::vector<uint16_t> keys, values;  ///< (kv_heads, dim)
};

/// One layer of random numbers whose scores spread about as wide as a real model's: all tokens so
/// far, (tokens, kv_heads, dim).
class Layer {
 public:
  Layer(const ModelShape& shape, uint32_t tokens) : shape_(shape) {
    keys = Random(size_t{tokens} * shape.kv_heads * shape.key_dim, 0.0F, 1.0F);
    values = Random(size_t{tokens} * shape.kv_heads * shape.value_dim, 0.5F, 1.0F);
  }

  /// Draws the next token and adds its rows.
  NewToken Next() {
    NewToken token{Random(size_t{shape_.query_heads} * shape_.key_dim, 0.0F, 3.0F),
                   Random(size_t{shape_.kv_heads} * shape_.key_dim, 0.0F, 1.0F),
                   Random(size_t{shape_.kv_heads} * shape_.value_dim, 0.5F, 1.0F)};
    keys.insert(keys.end(), token.keys.begin(), token.keys.end());
    values.insert(values.end(), token.values.begin(), token.values.end());
    return token;
  }

  /// |out - full attention| / |full attention| of the worst head; NaN if there is one in `out`.
  double WorstError(const std::vector<uint16_t>& queries, const std::vector<uint16_t>& out) const {
    double worst = 0.0;
    for (uint32_t head = 0; head < shape_.query_heads; ++head) {
      const std::vector<double> expected = Attention(queries, head);
      double difference = 0.0;
      double norm = 0.0;
      for (uint32_t d = 0; d < shape_.value_dim; ++d) {
        const double value = kernels::Bf16ToFloat(out[size_t{head} * shape_.value_dim + d]);
        difference += (value - expected[d]) * (value - expected[d]);
        norm += expected[d] * expected[d];
      }
      const double error = std::sqrt(difference / norm);
      if (std::isnan(error)) return error;
      worst = std::max(worst, error);
    }
    return worst;
  }

  std::vector<uint16_t> keys, values;

 private:
  std::vector<uint16_t> Random(size_t count, float mean, float deviation) {
    std::normal_distribution<float> normal(mean, deviation);
    std::vector<uint16_t> numbers(count);
    for (uint16_t& number : numbers) number = kernels::FloatToBf16(normal(random_));
    return numbers;
  }

  /// Of one query head over all tokens, in double precision.
  std::vector<double> Attention(const std::vector<uint16_t>& queries, uint32_t head) const {
    const uint16_t* const query = queries.data() + size_t{head} * shape_.key_dim;
    const size_t tokens = keys.size() / (size_t{shape_.kv_heads} * shape_.key_dim);
    std::vector<double> scores(tokens);
    for (size_t t = 0; t < tokens; ++t) {
      const size_t row = t * shape_.kv_heads + head / shape_.Group();
      double dot = 0.0;
      for (uint32_t d = 0; d < shape_.key_dim; ++d) {
        dot += static_cast<double>(kernels::Bf16ToFloat(query[d])) *
               static_cast<double>(kernels::Bf16ToFloat(keys[row * shape_.key_dim + d]));
      }
      scores[t] = dot / std::sqrt(static_cast<double>(shape_.key_dim));
    }
    const double max = *std::max_element(scores.begin(), scores.end());
    double sum = 0.0;
    for (double& score : scores) sum += score = std::exp(score - max);
    std::vector<double> out(shape_.value_dim, 0.0);
    for (size_t t = 0; t < tokens; ++t) {
      const size_t row = t * shape_.kv_heads + head / shape_.Group();
      for (uint32_t d = 0; d < shape_.value_dim; ++d) {
        out[d] += scores[t] / sum *
                  static_cast<double>(kernels::Bf16ToFloat(values[row * shape_.value_dim + d]));
      }
    }
    return out;
  }

  ModelShape shape_;
  std::mt19937 random_{std::random_device{}()};
};

}  // namespace kvseek::examples

#endif  // KVSEEK_EXAMPLES_DECODE_SUPPORT_H_
