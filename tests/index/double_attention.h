// Attention over a trace's rows in double precision, for tests.
#ifndef KVSEEK_TESTS_INDEX_DOUBLE_ATTENTION_H_
#define KVSEEK_TESTS_INDEX_DOUBLE_ATTENTION_H_

#include <cmath>
#include <vector>

#include "cli/trace.h"
#include "kernels/dtype.h"

namespace kvseek::index {

/// softmax_scale * <q, k> of one query head of a step and the key at a position.
inline double ScoreOf(const cli::HeadTrace& trace, int step, int head, int64_t position) {
  const float* const query = trace.StepQueries(step) + static_cast<ptrdiff_t>(head) * trace.key_dim;
  double score = 0.0;
  for (int d = 0; d < trace.key_dim; ++d) {
    score += static_cast<double>(query[d]) *
             kernels::LoadElement(trace.keys.data(), trace.dtype,
                                  static_cast<size_t>(position * trace.key_dim + d));
  }
  return score * trace.softmax_scale;
}

inline std::vector<double> ValueOf(const cli::HeadTrace& trace, int64_t position) {
  std::vector<double> value;
  for (int d = 0; d < trace.value_dim; ++d) {
    value.push_back(kernels::LoadElement(trace.values.data(), trace.dtype,
                                         static_cast<size_t>(position * trace.value_dim + d)));
  }
  return value;
}

/// The attention state of one query head, put together row by row.
class DoubleState {
 public:
  explicit DoubleState(int value_dim) : sums_(static_cast<size_t>(value_dim)) {}

  void Add(double score, const std::vector<double>& value) {
    const double weight = std::exp(score);
    mass_ += weight;
    for (size_t d = 0; d < sums_.size(); ++d) sums_[d] += weight * value[d];
  }
  double Mass() const { return mass_; }
  double Lse() const { return std::log(mass_); }
  /// Zero of an empty state.
  std::vector<double> Out() const {
    std::vector<double> out = sums_;
    for (double& element : out) element = mass_ > 0.0 ? element / mass_ : 0.0;
    return out;
  }

 private:
  std::vector<double> sums_;
  double mass_ = 0.0;
};

}  // namespace kvseek::index

#endif  // KVSEEK_TESTS_INDEX_DOUBLE_ATTENTION_H_
