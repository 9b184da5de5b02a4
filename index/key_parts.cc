#include "index/key_parts.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "index/selection.h"
#include "kernels/cpu/attention.h"
#include "kernels/dtype.h"

namespace kvseek::index {
namespace {

// Of the mean covariance within parts: keeps dimensions that hardly vary from dividing by nothing.
constexpr double kBasisRidge = 1e-4;

/// The nearest bf16 that is not below (`up`) or not above the value.
uint16_t RoundOutward(float value, bool up) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto toward_zero = static_cast<uint16_t>(bits >> 16);
  const bool negative = (bits >> 31) != 0;
  const bool exact = (bits & 0xffffU) == 0;
  return static_cast<uint16_t>(toward_zero + (exact || up == negative ? 0 : 1));
}

/// Calls visit(part, key row, value row) for each key.
template <typename Visitor>
void VisitKeys(const KvView& view, int64_t begin, absl::Span<const uint16_t> part_of,
               const Visitor& visit) {
  VisitRows(view, begin, begin + static_cast<int64_t>(part_of.size()),
            [&](const uint16_t* keys, const uint16_t* values, int64_t first, int tokens) {
              for (int t = 0; t < tokens; ++t) {
                visit(size_t{part_of[static_cast<size_t>(first - begin + t)]},
                      keys + static_cast<ptrdiff_t>(t) * view.shape.key_dim,
                      values + static_cast<ptrdiff_t>(t) * view.shape.value_dim);
              }
            });
}

void AddRow(const uint16_t* row, kernels::DType dtype, size_t dim, double* sums) {
  for (size_t d = 0; d < dim; ++d) sums[d] += kernels::LoadElement(row, dtype, d);
}

void Subtract(const uint16_t* row, kernels::DType dtype, size_t dim, const float* mean,
              float* residual) {
  for (size_t d = 0; d < dim; ++d) residual[d] = kernels::LoadElement(row, dtype, d) - mean[d];
}

}  // namespace

PartQueries::PartQueries(const SearchQuery& query, const KvShape& shape,
                         const CholeskyFactor& basis)
    : group_(query.group), scaled_(ScaleQueries(query, shape)) {
  const size_t count = static_cast<size_t>(group_) * shape.key_dim;
  squared_ = MakeAligned<float>(count);
  positive_ = MakeAligned<float>(count);
  negative_ = MakeAligned<float>(count);
  basis.TransposedProduct(scaled_.get(), group_, squared_.get());
  for (size_t i = 0; i < count; ++i) {
    squared_[i] *= squared_[i];
    positive_[i] = std::max(scaled_[i], 0.0F);
    negative_[i] = std::min(scaled_[i], 0.0F);
  }
}

std::shared_ptr<const KeyParts> KeyParts::Make(const KvView& view, int64_t begin,
                                               absl::Span<const uint16_t> part_of, int count,
                                               bool bounds,
                                               std::shared_ptr<const CholeskyFactor> basis) {
  std::shared_ptr<KeyParts> parts(new KeyParts);
  parts->key_dim_ = view.shape.key_dim;
  parts->begin_ = begin;
  parts->basis_ = std::move(basis);
  parts->SetMembers(part_of, count);
  parts->SetMeans(view, part_of);
  parts->SetVariances(view, part_of);
  if (bounds) parts->SetBounds(view, part_of);
  return parts;
}

void KeyParts::SetMembers(absl::Span<const uint16_t> part_of, int count) {
  starts_.resize(static_cast<size_t>(count) + 1);
  for (const uint16_t part : part_of) ++starts_[size_t{part} + 1];
  for (size_t p = 1; p < starts_.size(); ++p) starts_[p] += starts_[p - 1];
  std::vector<uint32_t> next(starts_.begin(), starts_.end() - 1);
  members_.resize(part_of.size());
  for (size_t i = 0; i < part_of.size(); ++i) {
    members_[next[part_of[i]]++] = static_cast<uint16_t>(i);
  }
}

void KeyParts::SetMeans(const KvView& view, absl::Span<const uint16_t> part_of) {
  const auto key_dim = static_cast<size_t>(view.shape.key_dim);
  const auto value_dim = static_cast<size_t>(view.shape.value_dim);
  const auto parts = static_cast<size_t>(count());
  std::vector<double> keys(parts * key_dim);
  std::vector<double> values(parts * value_dim);
  VisitKeys(view, begin_, part_of, [&](size_t part, const uint16_t* key, const uint16_t* value) {
    AddRow(key, view.shape.dtype, key_dim, keys.data() + part * key_dim);
    AddRow(value, view.shape.dtype, value_dim, values.data() + part * value_dim);
  });
  for (size_t p = 0; p < parts; ++p) {
    const auto size = static_cast<double>(Members(static_cast<int>(p)).size());
    for (size_t d = 0; d < key_dim; ++d) {
      mean_keys_.push_back(static_cast<float>(keys[p * key_dim + d] / size));
    }
    for (size_t d = 0; d < value_dim; ++d) {
      const double mean = values[p * value_dim + d] / size;
      mean_values_.push_back(kernels::FloatToBf16(static_cast<float>(mean)));
    }
  }
}

void KeyParts::SetVariances(const KvView& view, absl::Span<const uint16_t> part_of) {
  const auto dim = static_cast<size_t>(key_dim_);
  std::vector<float> residual(dim);
  if (basis_ == nullptr) {
    std::vector<double> covariance(dim * dim);
    VisitKeys(view, begin_, part_of, [&](size_t part, const uint16_t* key, const uint16_t*) {
      Subtract(key, view.shape.dtype, dim, mean_keys_.data() + part * dim, residual.data());
      for (size_t i = 0; i < dim; ++i) {
        for (size_t j = 0; j <= i; ++j) covariance[i * dim + j] += residual[i] * residual[j];
      }
    });
    for (double& element : covariance) element /= static_cast<double>(part_of.size());
    basis_ = std::make_shared<const CholeskyFactor>(std::move(covariance), key_dim_, kBasisRidge);
  }
  std::vector<float> squares(mean_keys_.size());
  VisitKeys(view, begin_, part_of, [&](size_t part, const uint16_t* key, const uint16_t*) {
    Subtract(key, view.shape.dtype, dim, mean_keys_.data() + part * dim, residual.data());
    basis_->Solve(residual.data());
    float* const sums = squares.data() + part * dim;
    for (size_t d = 0; d < dim; ++d) sums[d] += residual[d] * residual[d];
  });
  for (size_t i = 0; i < squares.size(); ++i) {
    const auto size = static_cast<float>(Members(static_cast<int>(i / dim)).size());
    key_variances_.push_back(kernels::FloatToBf16(squares[i] / size));
  }
}

void KeyParts::SetBounds(const KvView& view, absl::Span<const uint16_t> part_of) {
  const auto dim = static_cast<size_t>(key_dim_);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<float> low(mean_keys_.size(), kInfinity);
  std::vector<float> high(mean_keys_.size(), -kInfinity);
  VisitKeys(view, begin_, part_of, [&](size_t part, const uint16_t* key, const uint16_t*) {
    for (size_t d = 0; d < dim; ++d) {
      const float element = kernels::LoadElement(key, view.shape.dtype, d);
      low[part * dim + d] = std::min(low[part * dim + d], element);
      high[part * dim + d] = std::max(high[part * dim + d], element);
    }
  });
  for (size_t i = 0; i < low.size(); ++i) {
    lower_.push_back(RoundOutward(low[i], false));
    upper_.push_back(RoundOutward(high[i], true));
  }
  SetLargest();
}

void KeyParts::SetLargest() {
  const auto dim = static_cast<size_t>(key_dim_);
  largest_.resize(dim);
  for (size_t i = 0; i < lower_.size(); ++i) {
    const float magnitude = std::max(std::abs(kernels::Bf16ToFloat(lower_[i])),
                                     std::abs(kernels::Bf16ToFloat(upper_[i])));
    largest_[i % dim] = std::max(largest_[i % dim], magnitude);
  }
}

void KeyParts::ScoreMoments(const PartQueries& queries, int first, int count, float* means,
                            float* variances, int stride) const {
  const ptrdiff_t at = static_cast<ptrdiff_t>(first) * key_dim_;
  kernels::ScoreFloatRows(queries.scaled(), queries.group(), mean_keys_.data() + at, count,
                          key_dim_, means, stride);
  kernels::ScoreRows(queries.squared(), queries.group(), key_variances_.data() + at,
                     kernels::DType::kBf16, count, key_dim_, variances, stride);
}

void KeyParts::UpperBounds(const PartQueries& queries, int first, int count, float* bounds,
                           float* work, int stride) const {
  const ptrdiff_t at = static_cast<ptrdiff_t>(first) * key_dim_;
  kernels::ScoreRows(queries.positive(), queries.group(), upper_.data() + at, kernels::DType::kBf16,
                     count, key_dim_, bounds, stride);
  kernels::ScoreRows(queries.negative(), queries.group(), lower_.data() + at, kernels::DType::kBf16,
                     count, key_dim_, work, stride);
  for (int h = 0; h < queries.group(); ++h) {
    for (int i = 0; i < count; ++i) {
      const ptrdiff_t slot = static_cast<ptrdiff_t>(h) * stride + i;
      bounds[slot] += work[slot];
    }
  }
}

// A sum of n products in fp32, in any order, is off by at most n units of rounding of the sum of
// their magnitudes, to first order; some units more for the scaling of the query, for the sum of
// two halves, and for this sum itself.
float KeyParts::RoundingMargin(const PartQueries& queries, int head) const {
  const float* const query = queries.scaled() + static_cast<ptrdiff_t>(head) * key_dim_;
  double magnitude = 0.0;
  for (int d = 0; d < key_dim_; ++d) {
    magnitude += std::abs(double{query[d]}) * largest_[static_cast<size_t>(d)];
  }
  return static_cast<float>(magnitude * (key_dim_ + 16) * 0x1p-24);
}

size_t KeyParts::SummaryBytes() const {
  const auto dim = static_cast<size_t>(key_dim_);
  return dim * sizeof(float) + dim * sizeof(uint16_t) * (has_bounds() ? 3 : 1);
}

size_t KeyParts::Bytes() const {
  return starts_.size() * sizeof(uint32_t) + (mean_keys_.size() + largest_.size()) * sizeof(float) +
         (members_.size() + key_variances_.size() + lower_.size() + upper_.size() +
          mean_values_.size()) *
             sizeof(uint16_t);
}

}  // namespace kvseek::index
