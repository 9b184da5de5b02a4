#include "index/cholesky.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "index/key_index.h"
#include "kernels/cpu/attention.h"

namespace kvseek::index {
namespace {

constexpr double kLeastDiagonal = 1e-12;

}  // namespace

CholeskyFactor::CholeskyFactor(std::vector<double> matrix, int dim, double ridge)
    : dim_(dim), columns_(matrix.size()) {
  const auto n = static_cast<size_t>(dim);
  double trace = 0.0;
  for (size_t i = 0; i < n; ++i) trace += matrix[i * n + i];
  const double added = std::max(ridge * trace / dim, kLeastDiagonal);
  for (size_t i = 0; i < n; ++i) {
    matrix[i * n + i] += added;
    for (size_t j = 0; j <= i; ++j) {
      double sum = matrix[i * n + j];
      for (size_t k = 0; k < j; ++k) sum -= matrix[i * n + k] * matrix[j * n + k];
      // Rounding may take what the ridge has left.
      matrix[i * n + j] =
          i == j ? std::sqrt(std::max(sum, kLeastDiagonal)) : sum / matrix[j * n + j];
      columns_[j * n + i] = static_cast<float>(matrix[i * n + j]);
    }
  }
}

CholeskyFactor::CholeskyFactor(std::vector<float> columns, int dim)
    : dim_(dim), columns_(std::move(columns)) {}

void CholeskyFactor::TransposedProduct(const float* vectors, int count, float* out) const {
  for (int i = 0; i < count; i += kMaxGroup) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(i) * dim_;
    kernels::ScoreFloatRows(vectors + at, std::min(kMaxGroup, count - i), columns_.data(), dim_,
                            dim_, out + at, dim_);
  }
}

void CholeskyFactor::Solve(float* vector) const {
  for (int j = 0; j < dim_; ++j) {
    const float* const column = columns_.data() + static_cast<ptrdiff_t>(j) * dim_;
    const float solved = vector[j] / column[j];
    vector[j] = solved;
    for (int i = j + 1; i < dim_; ++i) vector[i] -= solved * column[i];
  }
}

}  // namespace kvseek::index
