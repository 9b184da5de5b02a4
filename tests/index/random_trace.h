// Made-up heads for the index tests: keys that drift with position, a sink, queries that prefer
// some of them.
#ifndef KVSEEK_TESTS_INDEX_RANDOM_TRACE_H_
#define KVSEEK_TESTS_INDEX_RANDOM_TRACE_H_

#include <cmath>
#include <random>

#include "cli/trace.h"
#include "index/key_index.h"
#include "kernels/dtype.h"

namespace kvseek::index {

struct TraceShape {
  int64_t tokens = 3000;
  int key_dim = 64;
  int value_dim = 64;
  int group = 3;
  int steps = 4;
  kernels::DType dtype = kernels::DType::kBf16;
  uint64_t seed = 1;
  /// How far values drift with the keys. Without it they are noise, most of which cancels where
  /// attention is flat, so that answers are small beside any error.
  float value_drift = 0.0F;
};

inline cli::HeadTrace RandomTrace(const TraceShape& shape) {
  std::mt19937_64 random(shape.seed);
  std::normal_distribution<float> normal;
  cli::HeadTrace trace;
  trace.name = "random";
  trace.dtype = shape.dtype;
  trace.tokens = shape.tokens;
  trace.key_dim = shape.key_dim;
  trace.value_dim = shape.value_dim;
  trace.group = shape.group;
  trace.steps = shape.steps;
  trace.softmax_scale = 1.0F / std::sqrt(static_cast<float>(shape.key_dim));
  const auto store = [&](float value) {
    return shape.dtype == kernels::DType::kBf16 ? kernels::FloatToBf16(value)
                                                : kernels::FloatToFp16(value);
  };
  for (int64_t t = 0; t < shape.tokens; ++t) {
    const float drift = std::sin(static_cast<float>(t) * 0.002F);
    for (int d = 0; d < shape.key_dim; ++d) {
      const float sink = t == 0 ? 4.0F : 0.0F;
      trace.keys.push_back(store(normal(random) + drift * static_cast<float>(d % 3) + sink));
    }
    for (int d = 0; d < shape.value_dim; ++d) {
      trace.values.push_back(store(normal(random) + shape.value_drift * drift));
    }
  }
  const size_t queries = static_cast<size_t>(shape.steps) * static_cast<size_t>(shape.group) *
                         static_cast<size_t>(shape.key_dim);
  for (size_t i = 0; i < queries; ++i) trace.queries.push_back(1.5F * normal(random));
  return trace;
}

/// A step's queries, over all of the trace.
inline SearchQuery WholeRange(const cli::HeadTrace& trace, int step) {
  return {trace.StepQueries(step), trace.group, 0, trace.tokens};
}

}  // namespace kvseek::index

#endif  // KVSEEK_TESTS_INDEX_RANDOM_TRACE_H_
