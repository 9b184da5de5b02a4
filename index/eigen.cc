#include "index/eigen.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <utility>

namespace kvseek::index {
namespace {

constexpr int kSweepsMax = 30;  // about eight are needed
constexpr double kOrthogonal = 1e-12;
constexpr double kLeastRidge = 1e-30;
constexpr double kRidge = 1e-14;  // keeps rows from vanishing, whose directions would be lost
constexpr size_t kLanes = 4;      // sums that the compiler may keep side by side

double Dot(const double* a, const double* b, size_t n) {
  double sums[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) sums[0] += a[i] * b[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/// Makes two rows orthogonal, the first the longer one; false if they were.
bool Turn(double* a, double* b, double& aa, double& bb, size_t n) {
  const double ab = Dot(a, b, n);
  if (std::abs(ab) <= kOrthogonal * std::sqrt(aa * bb)) return false;
  const double zeta = (bb - aa) / (2.0 * ab);
  const double t = (zeta >= 0.0 ? 1.0 : -1.0) / (std::abs(zeta) + std::sqrt(1.0 + zeta * zeta));
  const double c = 1.0 / std::sqrt(1.0 + t * t);
  const double s = c * t;
  for (size_t i = 0; i < n; ++i) {
    const double x = a[i];
    a[i] = c * x - s * b[i];
    b[i] = s * x + c * b[i];
  }
  aa -= t * ab;
  bb += t * ab;
  return true;
}

}  // namespace

Eigen EigenOf(std::vector<double> matrix, int dim) {
  const auto n = static_cast<size_t>(dim);
  double trace = 0.0;
  for (size_t i = 0; i < n; ++i) trace += matrix[i * n + i];
  const double ridge = std::max(kRidge * trace, kLeastRidge);
  for (size_t i = 0; i < n; ++i) matrix[i * n + i] += ridge;
  std::vector<double> squares(n);
  bool turned = true;
  for (int sweep = 0; turned && sweep < kSweepsMax; ++sweep) {
    turned = false;
    for (size_t i = 0; i < n; ++i) squares[i] = Dot(&matrix[i * n], &matrix[i * n], n);
    for (size_t p = 0; p + 1 < n; ++p) {
      for (size_t q = p + 1; q < n; ++q) {
        turned = Turn(&matrix[p * n], &matrix[q * n], squares[p], squares[q], n) || turned;
      }
    }
  }
  // Row i of what is left is an eigenvector times its value.
  for (size_t i = 0; i < n; ++i) squares[i] = Dot(&matrix[i * n], &matrix[i * n], n);
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::pair(-squares[a], a) < std::pair(-squares[b], b);
  });
  Eigen eigen;
  eigen.vectors.reserve(n * n);
  for (const size_t row : order) {
    const double length = std::sqrt(squares[row]);
    eigen.values.push_back(std::max(length - ridge, 0.0));
    for (size_t j = 0; j < n; ++j) eigen.vectors.push_back(matrix[row * n + j] / length);
  }
  return eigen;
}

}  // namespace kvseek::index
