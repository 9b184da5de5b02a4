#include "index/query_space.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "index/kmeans.h"
#include "index/selection.h"
#include "kernels/dtype.h"

namespace kvseek::index {
namespace {

constexpr double kQueryRidge = 1e-3;
// Of keys around their run's mean, in squared scores, where there are no training queries: between
// what real heads have.
constexpr double kGuessedScoreVariance = 8.0;

CholeskyFactor FactorOfQueries(const BuildInput& input) {
  const auto dim = static_cast<size_t>(input.view.shape.key_dim);
  std::vector<double> moment(dim * dim);
  const size_t count = input.queries.size() / dim;
  for (size_t q = 0; q < count; ++q) {
    const float* const query = input.queries.data() + q * dim;
    for (size_t i = 0; i < dim; ++i) {
      for (size_t j = 0; j <= i; ++j) moment[i * dim + j] += double{query[i]} * query[j];
    }
  }
  const double scale = input.view.shape.softmax_scale;
  for (double& element : moment) {
    element *= scale * scale / static_cast<double>(std::max<size_t>(count, 1));
  }
  for (size_t i = 0; i < dim && count == 0; ++i) moment[i * dim + i] = 1.0;
  return CholeskyFactor(std::move(moment), input.view.shape.key_dim, kQueryRidge);
}

/// Squared distance of each row from the mean of its part.
std::vector<float> Distances(const FloatRows& rows, absl::Span<const uint16_t> part_of,
                             size_t parts) {
  std::vector<float> centres(parts * rows.dim);
  std::vector<float> sizes(parts);
  for (size_t i = 0; i < part_of.size(); ++i) {
    sizes[part_of[i]] += 1.0F;
    for (size_t d = 0; d < rows.dim; ++d) centres[part_of[i] * rows.dim + d] += rows.row(i)[d];
  }
  std::vector<float> distances(part_of.size());
  for (size_t i = 0; i < part_of.size(); ++i) {
    for (size_t d = 0; d < rows.dim; ++d) {
      const float centre = centres[part_of[i] * rows.dim + d] / sizes[part_of[i]];
      distances[i] += (rows.row(i)[d] - centre) * (rows.row(i)[d] - centre);
    }
  }
  return distances;
}

}  // namespace

void FloatRows::Centre() {
  std::vector<double> mean(dim);
  for (size_t i = 0; i < elements.size(); ++i) mean[i % dim] += elements[i];
  const auto rows = static_cast<double>(count());
  for (size_t i = 0; i < elements.size(); ++i) {
    elements[i] -= static_cast<float>(mean[i % dim] / rows);
  }
}

void FloatRows::ScaleTo(double squares) {
  double sum = 0.0;
  for (const float x : elements) sum += double{x} * x;
  if (!(sum > 0.0)) return;
  const auto factor = static_cast<float>(std::sqrt(squares * static_cast<double>(count()) / sum));
  for (float& x : elements) x *= factor;
}

QuerySpace::QuerySpace(const BuildInput& input) : input_(input), factor_(FactorOfQueries(input)) {}

FloatRows QuerySpace::Keys(int64_t begin, int64_t end) const {
  const KvShape& shape = input_.view.shape;
  const auto dim = static_cast<size_t>(shape.key_dim);
  FloatRows keys{dim, std::vector<float>(static_cast<size_t>(end - begin) * dim)};
  VisitRows(input_.view, begin, end,
            [&](const uint16_t* rows, const uint16_t*, int64_t first, int count) {
              float* const to = keys.elements.data() + static_cast<size_t>(first - begin) * dim;
              for (size_t i = 0; i < static_cast<size_t>(count) * dim; ++i) {
                to[i] = kernels::LoadElement(rows, shape.dtype, i);
              }
            });
  keys.Centre();
  FloatRows seen{dim, std::vector<float>(keys.elements.size())};
  factor_.TransposedProduct(keys.row(0), static_cast<int>(keys.count()), seen.elements.data());
  if (input_.queries.empty()) seen.ScaleTo(kGuessedScoreVariance);
  return seen;
}

FloatRows CentredValues(const KvView& view, int64_t begin, int64_t end) {
  const auto dim = static_cast<size_t>(view.shape.value_dim);
  FloatRows values{dim, std::vector<float>(static_cast<size_t>(end - begin) * dim)};
  VisitRows(view, begin, end, [&](const uint16_t*, const uint16_t* rows, int64_t first, int count) {
    float* const to = values.elements.data() + static_cast<size_t>(first - begin) * dim;
    for (size_t i = 0; i < static_cast<size_t>(count) * dim; ++i) {
      to[i] = kernels::LoadElement(rows, view.shape.dtype, i);
    }
  });
  values.Centre();
  return values;
}

int SplitOutliers(const FloatRows& keys, std::vector<uint16_t>& part_of) {
  const size_t parts = *std::max_element(part_of.begin(), part_of.end()) + size_t{1};
  const std::vector<float> distances = Distances(keys, part_of, parts);
  const size_t outliers = part_of.size() / kKeysPerOutlier;
  std::vector<uint32_t> order(part_of.size());
  std::iota(order.begin(), order.end(), 0U);
  std::partial_sort(order.begin(), order.begin() + static_cast<ptrdiff_t>(outliers), order.end(),
                    [&](uint32_t a, uint32_t b) {
                      return std::pair(-distances[a], a) < std::pair(-distances[b], b);
                    });
  for (size_t i = 0; i < outliers; ++i) part_of[order[i]] = static_cast<uint16_t>(parts + i);
  return CompactNumbers(part_of);
}

}  // namespace kvseek::index
