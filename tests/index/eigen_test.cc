#include "index/eigen.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace kvseek::index {
namespace {

/// X^T X of `rows` random rows.
std::vector<double> RandomMoment(int dim, int rows, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  const auto n = static_cast<size_t>(dim);
  std::vector<double> moment(n * n);
  for (int r = 0; r < rows; ++r) {
    std::vector<double> x(n);
    for (size_t i = 0; i < n; ++i) x[i] = normal(random) * std::exp(-0.1 * static_cast<double>(i));
    for (size_t i = 0; i < n; ++i) {
      for (size_t j = 0; j < n; ++j) moment[i * n + j] += x[i] * x[j];
    }
  }
  return moment;
}

/// Vectors are orthonormal, values descend, and matrix * vector = value * vector.
void ExpectEigen(const std::vector<double>& matrix, int dim) {
  const Eigen eigen = EigenOf(matrix, dim);
  const auto n = static_cast<size_t>(dim);
  double trace = 0.0;
  for (size_t i = 0; i < n; ++i) trace += matrix[i * n + i];
  const double tolerance = 1e-9 * std::max(trace, 1e-9);
  for (size_t v = 0; v < n; ++v) {
    const double* const vector = eigen.vectors.data() + v * n;
    if (v > 0) {
      EXPECT_LE(eigen.values[v], eigen.values[v - 1]);
    }
    EXPECT_GE(eigen.values[v], 0.0);
    for (size_t w = 0; w <= v; ++w) {
      double dot = 0.0;
      for (size_t i = 0; i < n; ++i) dot += vector[i] * eigen.vectors[w * n + i];
      EXPECT_NEAR(dot, v == w ? 1.0 : 0.0, 1e-9) << v << ' ' << w;
    }
    for (size_t i = 0; i < n; ++i) {
      double product = 0.0;
      for (size_t j = 0; j < n; ++j) product += matrix[i * n + j] * vector[j];
      EXPECT_NEAR(product, eigen.values[v] * vector[i], tolerance);
    }
  }
}

TEST(EigenTest, OfRandomMoments) {
  for (const int dim : {1, 2, 3, 8, 24, 80}) ExpectEigen(RandomMoment(dim, 3 * dim, 5), dim);
}

TEST(EigenTest, OfOneKnown) {
  const Eigen eigen = EigenOf({2.0, 1.0, 1.0, 2.0}, 2);
  EXPECT_NEAR(eigen.values[0], 3.0, 1e-12);
  EXPECT_NEAR(eigen.values[1], 1.0, 1e-12);
  EXPECT_NEAR(eigen.vectors[0], eigen.vectors[1], 1e-12);
}

TEST(EigenTest, OfMatricesWithoutFullRank) {
  ExpectEigen(RandomMoment(16, 5, 6), 16);
  ExpectEigen(std::vector<double>(64), 8);
  std::vector<double> equal(64);
  for (size_t i = 0; i < 8; ++i) equal[i * 9] = 4.0;
  ExpectEigen(equal, 8);
}

}  // namespace
}  // namespace kvseek::index
