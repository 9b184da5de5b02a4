#include "index/product_codebook.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "index/eigen.h"
#include "index/kmeans.h"
#include "index/query_space.h"
#include "index/scratch.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/convert.h"
#include "kernels/dtype.h"

namespace kvseek::index {
namespace {

using kernels::kCentroids;
using kernels::kScanBlock;
using kernels::kSketchDim;

constexpr int kBlocks = kSegmentTokens / kScanBlock;
constexpr size_t kSampleMax = 16384;  // keys that a codebook learns from; half as many cost 1 %
// Beyond the sample's own distances, since it misses most outliers.
constexpr float kErrorHeadroom = 2.0F;
constexpr float kErrorRange = 1000.0F;   // of the largest level over the least, at most
constexpr float kErrorMin = 1e-12F;      // in nats: nothing
constexpr float kSketchLevel = 0.3352F;  // a step of 4 bits, in standard deviations
constexpr double kVarianceMin = 1e-12;   // a share of the largest
constexpr int kBatch = 64;               // keys that are mapped at a time

using Segments = absl::Span<const std::shared_ptr<const Segment>>;

/// The segment's mean value as a sketch takes it off: rounded to bf16.
std::vector<float> ValueMean(const KvShape& shape, const Segment& segment) {
  std::vector<float> mean(static_cast<size_t>(shape.value_dim));
  kernels::MeanRow(segment.values(), shape.dtype, kSegmentTokens, shape.value_dim, mean.data());
  for (float& x : mean) x = kernels::Bf16ToFloat(kernels::FloatToBf16(x));
  return mean;
}

/// out (count, dim) := rows (count, dim) less `mean` (dim).
void TakeOff(const uint16_t* rows, kernels::DType dtype, const float* mean, size_t dim,
             size_t count, float* out) {
  kernels::ConvertToFloat(rows, dtype, count * dim, out);
  for (size_t i = 0; i < count; ++i, out += dim) {
    for (size_t d = 0; d < dim; ++d) out[d] -= mean[d];
  }
}

/// About kSampleMax keys, as many of each segment, evenly spread, less the segment's centre.
FloatRows SampleKeys(const KvShape& shape, Segments segments) {
  const auto dim = static_cast<size_t>(shape.key_dim);
  const size_t each = std::min<size_t>(kSampleMax / segments.size(), kSegmentTokens);
  FloatRows rows{dim, std::vector<float>(segments.size() * each * dim)};
  float* out = rows.elements.data();
  for (const auto& segment : segments) {
    for (size_t i = 0; i < each; ++i, out += dim) {
      const size_t at = i * kSegmentTokens / each;
      TakeOff(segment->keys() + at * dim, shape.dtype, segment->centre(), dim, 1, out);
    }
  }
  return rows;
}

/// The same of values.
FloatRows SampleValues(const KvShape& shape, Segments segments) {
  const auto dim = static_cast<size_t>(shape.value_dim);
  const size_t each = std::min<size_t>(kSampleMax / segments.size(), kSegmentTokens);
  FloatRows rows{dim, std::vector<float>(segments.size() * each * dim)};
  float* out = rows.elements.data();
  for (const auto& segment : segments) {
    const std::vector<float> mean = ValueMean(shape, *segment);
    for (size_t i = 0; i < each; ++i, out += dim) {
      const size_t at = i * kSegmentTokens / each;
      TakeOff(segment->values() + at * dim, shape.dtype, mean.data(), dim, 1, out);
    }
  }
  return rows;
}

/// Mean of x x^T over the rows.
std::vector<double> SecondMoment(const FloatRows& rows) {
  const size_t dim = rows.dim;
  std::vector<double> moment(dim * dim);
  for (size_t r = 0; r < rows.count(); ++r) {
    const float* const x = rows.row(r);
    for (size_t i = 0; i < dim; ++i) {
      for (size_t j = 0; j <= i; ++j) moment[i * dim + j] += double{x[i]} * x[j];
    }
  }
  for (size_t i = 0; i < dim; ++i) {
    for (size_t j = 0; j <= i; ++j) {
      moment[i * dim + j] /= static_cast<double>(rows.count());
      moment[j * dim + i] = moment[i * dim + j];
    }
  }
  return moment;
}

/// out (count, dim) := map * row for each of `count` rows.
void Map(const std::vector<float>& map, const float* rows, int count, int dim, float* out) {
  for (int i = 0; i < count; i += kBatch) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(i) * dim;
    kernels::ScoreFloatRows(rows + at, std::min(kBatch, count - i), map.data(), dim, dim, out + at,
                            dim);
  }
}

/// Which components, in descending order of variance, each sub-space gets: always that with the
/// least product of variances so far.
std::vector<std::vector<size_t>> SpreadComponents(const std::vector<double>& variances,
                                                  int subspaces) {
  std::vector<std::vector<size_t>> groups(static_cast<size_t>(subspaces));
  std::vector<double> logs(groups.size(), 0.0);
  const double least = std::max(variances.back(), kVarianceMin * variances.front());
  for (size_t i = 0; i < variances.size(); ++i) {
    const auto g = static_cast<size_t>(std::min_element(logs.begin(), logs.end()) - logs.begin());
    groups[g].push_back(i);
    // Never nothing, so that equal components are spread too.
    logs[g] += 1e-3 + (least > 0.0 ? std::log(std::max(variances[i], least) / least) : 0.0);
  }
  return groups;
}

void SetMaps(const Eigen& eigen, const CholeskyFactor& queries, ProductCodebook& book) {
  const auto dim = static_cast<size_t>(queries.dim());
  book.key_map.assign(dim * dim, 0.0F);
  book.query_map.assign(dim * dim, 0);
  std::vector<float> inverse(dim * dim);  // row j: L^-1 applied to unit vector j
  for (size_t j = 0; j < dim; ++j) {
    inverse[j * dim + j] = 1.0F;
    queries.Solve(inverse.data() + j * dim);
  }
  size_t row = 0;
  book.starts = {0};
  for (const auto& group : SpreadComponents(eigen.values, book.layout.subspaces)) {
    for (const size_t component : group) {
      const double* const e = eigen.vectors.data() + component * dim;
      for (size_t k = 0; k < dim; ++k) {
        double key = 0.0;
        double query = 0.0;
        for (size_t i = 0; i < dim; ++i) {
          key += e[i] * double{queries.columns()[i * dim + k]};
          query += e[i] * double{inverse[k * dim + i]};
        }
        book.key_map[row * dim + k] = static_cast<float>(key);
        book.query_map[row * dim + k] = kernels::FloatToBf16(static_cast<float>(query));
      }
      ++row;
    }
    book.starts.push_back(static_cast<uint32_t>(row));
  }
}

/// Centroids of the sampled points, (count, dim), and from their distances the levels.
void SetCentroids(const FloatRows& points, ProductCodebook& book) {
  const size_t dim = points.dim;
  book.centroids.assign(dim * kCentroids, 0.0F);
  std::vector<float> squares(points.count(), 0.0F);
  std::vector<uint8_t> symbols(points.count());
  for (int g = 0; g < book.layout.subspaces; ++g) {
    const size_t first = book.starts[static_cast<size_t>(g)];
    const size_t size = book.starts[static_cast<size_t>(g) + 1] - first;
    if (size == 0) continue;
    std::vector<float> part(points.count() * size);
    for (size_t i = 0; i < points.count(); ++i) {
      std::copy_n(points.row(i) + first, size, part.data() + i * size);
    }
    const std::vector<float> trained = TrainCentroids(part, static_cast<int>(size));
    float* const centroids = book.centroids.data() + first * kCentroids;
    std::copy(trained.begin(), trained.end(), centroids);
    kernels::NearestCentroids(points.row(0) + first, static_cast<int>(dim),
                              static_cast<int>(points.count()), centroids, static_cast<int>(size),
                              symbols.data(), 1, squares.data());
  }
  const auto [least, most] = std::minmax_element(squares.begin(), squares.end());
  const float high = std::max(kErrorHeadroom * std::sqrt(*most), kErrorMin);
  const float low = std::max(std::sqrt(*least), high / kErrorRange);
  for (int c = 0; c < kCentroids; ++c) {
    const float part = static_cast<float>(c) / (kCentroids - 1);
    book.errors.push_back(low * std::pow(high / low, part));
  }
}

void SetSketch(const FloatRows& values, ProductCodebook& book) {
  const size_t dim = values.dim;
  const Eigen eigen = EigenOf(SecondMoment(values), static_cast<int>(dim));
  for (size_t c = 0; c < kSketchDim; ++c) {
    book.steps.push_back(kSketchLevel * static_cast<float>(std::sqrt(eigen.values[c])));
    for (size_t i = 0; i < dim; ++i) {
      book.components.push_back(static_cast<float>(eigen.vectors[c * dim + i]));
    }
  }
}

/// Nibbles (1024, 8) of a segment's values.
std::vector<uint8_t> SketchNibbles(const KvShape& shape, const Segment& segment,
                                   const std::vector<float>& mean, const ProductCodebook& book) {
  std::vector<float> residuals(kSegmentTokens * static_cast<size_t>(shape.value_dim));
  TakeOff(segment.values(), shape.dtype, mean.data(), mean.size(), kSegmentTokens,
          residuals.data());
  std::vector<float> along(size_t{kSketchDim} * kSegmentTokens);
  kernels::ScoreFloatRows(book.components.data(), kSketchDim, residuals.data(), kSegmentTokens,
                          shape.value_dim, along.data(), kSegmentTokens);
  std::vector<uint8_t> nibbles(along.size());
  for (size_t c = 0; c < kSketchDim; ++c) {
    const float inverse = book.steps[c] > 0.0F ? 1.0F / book.steps[c] : 0.0F;
    for (size_t i = 0; i < kSegmentTokens; ++i) {
      const float step = std::floor(along[c * kSegmentTokens + i] * inverse) + 8.0F;
      nibbles[i * kSketchDim + c] = static_cast<uint8_t>(std::clamp(step, 0.0F, 15.0F));
    }
  }
  return nibbles;
}

}  // namespace

std::shared_ptr<const ProductCodebook> ProductCodebook::Train(
    const KvShape& shape, Segments segments, const CholeskyFactor& queries,
    const kernels::ProductLayout& layout) {
  auto book = std::make_shared<ProductCodebook>();
  book->layout = layout;
  book->trained_segments = static_cast<int>(segments.size());
  const FloatRows keys = SampleKeys(shape, segments);
  FloatRows seen{keys.dim, std::vector<float>(keys.elements.size())};
  queries.TransposedProduct(keys.row(0), static_cast<int>(keys.count()), seen.elements.data());
  SetMaps(EigenOf(SecondMoment(seen), shape.key_dim), queries, *book);
  Map(book->key_map, keys.row(0), static_cast<int>(keys.count()), shape.key_dim,
      seen.elements.data());
  SetCentroids(seen, *book);
  if (layout.sketch) SetSketch(SampleValues(shape, segments), *book);
  book->SetSearchRows();
  return book;
}

void ProductCodebook::Encode(const KvShape& shape, const Segment& segment, uint8_t* codes,
                             uint8_t* sketches, uint16_t* value_mean) const {
  const auto dim = static_cast<size_t>(shape.key_dim);
  const int symbols_each = layout.Symbols();
  std::vector<float> residuals(kSegmentTokens * dim);
  TakeOff(segment.keys(), shape.dtype, segment.centre(), dim, kSegmentTokens, residuals.data());
  std::vector<float> points(residuals.size());
  Map(key_map, residuals.data(), kSegmentTokens, shape.key_dim, points.data());
  std::vector<uint8_t> symbols(size_t{kSegmentTokens} * static_cast<size_t>(symbols_each));
  std::vector<float> squares(kSegmentTokens, 0.0F);
  for (int g = 0; g < layout.subspaces; ++g) {
    const uint32_t first = starts[static_cast<size_t>(g)];
    kernels::NearestCentroids(points.data() + first, shape.key_dim, kSegmentTokens,
                              centroids.data() + size_t{first} * kCentroids,
                              static_cast<int>(starts[static_cast<size_t>(g) + 1] - first),
                              symbols.data() + g, symbols_each, squares.data());
  }
  const float low = errors.front();
  const float levels = (kCentroids - 1) / std::max(std::log(errors.back() / low), 1e-6F);
  for (size_t i = 0; i < kSegmentTokens; ++i) {
    const float error = std::max(std::sqrt(squares[i]), low);
    const float level = std::min(std::round(levels * std::log(error / low)), kCentroids - 1.0F);
    symbols[(i + 1) * static_cast<size_t>(symbols_each) - 1] = static_cast<uint8_t>(level);
  }
  kernels::PackProductBlocks(symbols.data(), kBlocks, layout, codes);
  if (!layout.sketch) return;
  const std::vector<float> mean = ValueMean(shape, segment);
  std::transform(mean.begin(), mean.end(), value_mean, kernels::FloatToBf16);
  const std::vector<uint8_t> nibbles = SketchNibbles(shape, segment, mean, *this);
  kernels::PackSketchBlocks(nibbles.data(), kBlocks, sketches);
}

void ProductCodebook::SetSearchRows() {
  search_rows = MakeSlot((query_map.size() + centroids.size()) * sizeof(uint16_t));
  auto* const rows = reinterpret_cast<uint16_t*>(search_rows.get());
  std::copy(query_map.begin(), query_map.end(), rows);
  std::transform(centroids.begin(), centroids.end(), rows + query_map.size(), kernels::FloatToBf16);
  const size_t dim = components.size() / kSketchDim;
  for (size_t i = 0; i < components.size(); ++i) {
    sketch_rows.push_back(kernels::FloatToBf16(steps[i / dim] * components[i]));
  }
}

size_t ProductCodebook::Bytes() const {
  return sizeof(ProductCodebook) + starts.size() * sizeof(uint32_t) +
         sizeof(float) * (key_map.size() + centroids.size() + errors.size() + components.size() +
                          steps.size()) +
         sizeof(uint16_t) * (2 * query_map.size() + centroids.size() + sketch_rows.size());
}

}  // namespace kvseek::index
