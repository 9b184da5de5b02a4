#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/product_tables.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/product_scan.h"

#ifndef KVSEEK_KERNELS_CPU_PRODUCT_TABLES_ONCE
#define KVSEEK_KERNELS_CPU_PRODUCT_TABLES_ONCE
namespace kvseek::kernels {
namespace {

inline constexpr float kVarianceMax = 2.0F;  // what the weight's correction counts at most

/// The correction of a weight's exponent, upwards.
inline float Correction(float sigma) { return std::min(sigma * sigma, kVarianceMax) / 4.0F; }

}  // namespace
}  // namespace kvseek::kernels
#endif  // KVSEEK_KERNELS_CPU_PRODUCT_TABLES_ONCE

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

/// Scores of the 64 centroids of a sub-space.
HWY_INLINE void ScoreCentroids(const float* query, const float* centroids, int dim, float* scores) {
  const DF d;
  constexpr int kSums = std::min(kCentroids / kLanes, 4);  // that do not wait for each other
  for (int v = 0; v < kCentroids; v += kSums * kLanes) {
    hn::Vec<DF> sums[kSums];
    for (auto& sum : sums) sum = hn::Zero(d);
    for (int i = 0; i < dim; ++i) {
      const auto element = hn::Set(d, query[i]);
      const float* const row = centroids + i * kCentroids + v;
      for (int s = 0; s < kSums; ++s) {
        sums[s] = hn::MulAdd(element, hn::LoadU(d, row + s * kLanes), sums[s]);
      }
    }
    for (int s = 0; s < kSums; ++s) hn::Store(sums[s], d, scores + v + s * kLanes);
  }
}

struct Range {
  float low;
  float high;
};

HWY_INLINE Range RangeOf(const float* scores) {
  const DF d;
  auto low = hn::Load(d, scores);
  auto high = low;
  for (int v = kLanes; v < kCentroids; v += kLanes) {
    low = hn::Min(low, hn::Load(d, scores + v));
    high = hn::Max(high, hn::Load(d, scores + v));
  }
  return {hn::GetLane(hn::MinOfLanes(d, low)), hn::GetLane(hn::MaxOfLanes(d, high))};
}

/// Entries := round((scores - middle) / unit).
HWY_INLINE void QuantiseTable(const float* scores, float middle, float inverse, int8_t* entries) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<int8_t, DF> d8;
  const auto limit = hn::Set(di, kTableMax);
  for (int v = 0; v < kCentroids; v += kLanes) {
    const auto scaled =
        hn::Mul(hn::Sub(hn::Load(d, scores + v), hn::Set(d, middle)), hn::Set(d, inverse));
    const auto entry = hn::Max(hn::Min(hn::NearestInt(scaled), limit), hn::Neg(limit));
    hn::StoreU(hn::DemoteTo(d8, entry), d8, entries + v);
  }
}

void BuildProductTablesImpl(const float* queries, int heads, int dim, const float* centroids,
                            const uint32_t* starts, const float* errors,
                            const ProductLayout& layout, int8_t* entries, ProductTables* tables) {
  HWY_ALIGN float scores[(kSubspacesMax + 1) * kCentroids];
  float middles[kSubspacesMax + 1];
  const int symbols = layout.Symbols();
  for (int h = 0; h < heads; ++h, queries += dim, entries += symbols * kTableSize) {
    ProductTables& table = tables[h];
    for (int g = 0; g < layout.subspaces; ++g) {
      ScoreCentroids(queries + starts[g], centroids + starts[g] * kCentroids,
                     static_cast<int>(starts[g + 1] - starts[g]), scores + g * kCentroids);
    }
    float square = 0.0F;
    for (int i = 0; i < dim; ++i) square += queries[i] * queries[i];
    const float deviation = std::sqrt(square / static_cast<float>(dim));
    for (int c = 0; c < kCentroids; ++c) {
      const float sigma = deviation * errors[c];
      table.sigma[c] = scores[layout.subspaces * kCentroids + c] = sigma;
      table.excess[c] = sigma - Correction(sigma);
    }
    float half_range = 0.0F;
    table.base = 0.0F;
    for (int g = 0; g < symbols; ++g) {
      const Range range = RangeOf(scores + g * kCentroids);
      middles[g] = 0.5F * (range.low + range.high);
      table.base += middles[g];
      half_range = std::max(half_range, 0.5F * (range.high - range.low));
    }
    table.unit = half_range / static_cast<float>(kTableMax);
    // Below that the inverse is infinite.
    if (table.unit < 1e-37F) table.unit = 0.0F;
    const float inverse = table.unit == 0.0F ? 0.0F : 1.0F / table.unit;
    for (int g = 0; g < symbols; ++g) {
      QuantiseTable(scores + g * kCentroids, middles[g], inverse, entries + g * kTableSize);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(BuildProductTablesImpl);

void BuildProductTables(const float* queries, int heads, int dim, const float* centroids,
                        const uint32_t* starts, const float* errors, const ProductLayout& layout,
                        int8_t* entries, ProductTables* tables) noexcept {
  assert(layout.subspaces >= 1 && layout.subspaces <= kSubspacesMax);
  HWY_DYNAMIC_DISPATCH(BuildProductTablesImpl)
  (queries, heads, dim, centroids, starts, errors, layout, entries, tables);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
