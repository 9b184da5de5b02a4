// The Cholesky factor C = L L^T of a symmetric positive semi-definite matrix: what turns a second
// moment into a change of coordinates. With S the second moment of queries, |L^T (a - b)|^2 is the
// mean squared difference of two keys' scores; with C the covariance of keys, L^-1 makes their
// coordinates uncorrelated.
#ifndef KVSEEK_INDEX_CHOLESKY_H_
#define KVSEEK_INDEX_CHOLESKY_H_

#include <cstddef>
#include <vector>

namespace kvseek::index {

/// Immutable, so thread-safe.
class CholeskyFactor {
 public:
  /// Of `matrix` (dim, dim), whose lower half is read, with `ridge` times its mean diagonal added
  /// to the diagonal. The factor of a matrix that is zero is tiny, not zero.
  CholeskyFactor(std::vector<double> matrix, int dim, double ridge);
  /// That of which columns() were these.
  CholeskyFactor(std::vector<float> columns, int dim);

  int dim() const { return dim_; }
  const std::vector<float>& columns() const { return columns_; }  ///< (dim, dim), one a row
  /// out (count, dim) = L^T x for each of `count` vectors x.
  void TransposedProduct(const float* vectors, int count, float* out) const;
  /// x := L^-1 x, one vector.
  void Solve(float* vector) const;
  size_t Bytes() const { return columns_.size() * sizeof(float); }

 private:
  int dim_;
  std::vector<float> columns_;  ///< (dim, dim): row j is column j of L
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_CHOLESKY_H_
