// Eigenvectors of a symmetric positive semi-definite matrix, such as a covariance: its principal
// components.
#ifndef KVSEEK_INDEX_EIGEN_H_
#define KVSEEK_INDEX_EIGEN_H_

#include <vector>

namespace kvseek::index {

struct Eigen {
  std::vector<double> values;   ///< (dim), descending, >= 0
  std::vector<double> vectors;  ///< (dim, dim): row i belongs to value i; orthonormal
};

/// Of `matrix` (dim, dim), to about ten digits of the largest value. By one-sided Jacobi rotations
/// (Hestenes 1958): rows of the matrix are turned in pairs until all are orthogonal. 128 dimensions
/// take about 20 ms.
Eigen EigenOf(std::vector<double> matrix, int dim);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_EIGEN_H_
