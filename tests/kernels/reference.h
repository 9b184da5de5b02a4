// Naive double-precision versions of the kernels, and inputs for them. They serve tests and
// benches. Shapes and units are those of the kernels' own headers.
#ifndef KVSEEK_TESTS_KERNELS_REFERENCE_H_
#define KVSEEK_TESTS_KERNELS_REFERENCE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/attention_state.h"
#include "kernels/dtype.h"

namespace kvseek::reference {

/// Normally distributed floats with the given standard deviation; the same for the same seed.
std::vector<float> RandomFloats(uint32_t seed, size_t count, float deviation);

/// The same, rounded to bf16 or fp16.
std::vector<uint16_t> RandomElements(uint32_t seed, size_t count, float deviation,
                                     kernels::DType dtype);

/// A float rounded to bf16 or fp16.
uint16_t Round(float value, kernels::DType dtype);

/// (group, count) inner products of queries with rows.
std::vector<double> Scores(const float* queries, int group, const void* rows, kernels::DType dtype,
                           int count, int dim);

/// A finished part in double precision: out is (group, value_dim), lse is (group).
struct Attention {
  std::vector<double> out;
  std::vector<double> lse;
};

/// Attention with scores (group, count) over value rows (count, value_dim). A score of -infinity
/// leaves a row out; a head without rows is empty.
Attention Attend(const std::vector<double>& scores, int group, const uint16_t* values,
                 kernels::DType dtype, int count, int value_dim);

/// (group, dim) sums of weights (group, count) times rows (count, dim).
std::vector<double> WeightedRows(const float* weights, int group, const uint16_t* rows,
                                 kernels::DType dtype, int count, int dim);

/// The rotation of one vector, from its definition: signs and Hadamard matrix, twice.
std::vector<double> Rotate(const float* in, int dim);

/// The largest |out - expected.out|, relative to the largest |expected.out| of its head, and the
/// largest |lse - expected.lse|. Infinite where one is empty or NaN and the other is not.
struct AttentionError {
  double out = 0;
  double lse = 0;
};
AttentionError Compare(const Attention& expected, const float* out, const float* lse);

/// The same for a running state.
AttentionError Compare(const Attention& expected, const kernels::GroupState& state);

}  // namespace kvseek::reference

#endif  // KVSEEK_TESTS_KERNELS_REFERENCE_H_
