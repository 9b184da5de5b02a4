// Seeded synthetic keys, values and queries whose statistics resemble real heads, for benchmarks.
//
// What is imitated (docs/architecture.md, tests/data): a large mean key that all tokens share; a
// slow drift with the position, one offset for each 1024 tokens; residuals whose variance falls off
// over a rotated basis, so that an eighth of the dimensions holds most of it; an attention sink at
// token 0; and queries whose scores spread by three natural-log units, which puts nine tenths of
// the softmax mass on about a thirtieth of the keys. What is not: the exact shapes of tails,
// repetition, and similar queries in consecutive steps. Quality is measured on real traces.
#ifndef KVSEEK_CLI_SYNTHETIC_H_
#define KVSEEK_CLI_SYNTHETIC_H_

#include <cstdint>
#include <vector>

#include "client/kv_client.h"

namespace kvseek::cli {

/// Thread-safe after construction. The same seed and shape give the same numbers.
class SyntheticModel {
 public:
  SyntheticModel(const ModelShape& shape, uint64_t seed);

  /// Keys (tokens, kv_heads, key_dim) and values (tokens, kv_heads, value_dim), bf16, of tokens
  /// [start, start + tokens) of a layer of a session.
  void Fill(uint64_t session, uint32_t layer, uint64_t start, uint32_t tokens,
            std::vector<uint16_t>& keys, std::vector<uint16_t>& values) const;

  /// Queries (query_heads, key_dim) of one step of a layer, unscaled; any of a session fits.
  std::vector<float> Queries(uint32_t layer, uint64_t step) const;

 private:
  const float* Normals(uint64_t hash) const;
  void Residual(uint64_t hash, float* row) const;
  void MeanKey(uint32_t layer, uint32_t head, float* row) const;

  ModelShape shape_;
  uint64_t seed_;
  int padded_;
  std::vector<float> spectrum_;  // (key_dim), standard deviations before the rotation
  std::vector<float> normals_;   // a table that rows are cut from at random places
};

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_SYNTHETIC_H_
