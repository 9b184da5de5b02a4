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
inline constexpr float kWindow = 11.0F;      // nats that the window of weights has to span

/// The correction of a weight's exponent, upwards.
inline float Correction(float sigma) { return std::min(sigma * sigma, kVarianceMax) / 4.0F; }

/// What a weight is looked up by.
inline void FillWindow(ProductTables& table) {
  table.shift = 0;
  while (table.shift < 2 && table.unit * static_cast<float>(kCentroids << table.shift) < kWindow) {
    ++table.shift;
  }
  for (int c = 0; c < kCentroids; ++c) {
    const float units = table.unit == 0.0F ? 0.0F : std::nearbyint(table.excess[c] / table.unit);
    table.excess_units[c] = static_cast<uint8_t>(std::clamp(units, 0.0F, 255.0F));
  }
  // A step's weight is that of the middle of its units.
  const double units = 1 << table.shift;
  const double factor = std::exp(-table.unit * units);
  double weight = std::exp((1.5 - 0.5 * units) * table.unit);
  for (int c = kCentroids - 1; c >= 0; --c, weight *= factor) {
    const auto fine = static_cast<int>(std::min(weight, 1.0) * 65280.0 + 0.5);
    table.high[c] = static_cast<uint8_t>((fine + 128) / 256);
    table.low[c] = static_cast<uint8_t>(fine + 128 - 256 * table.high[c]);
  }
  // The lowest step has everything below it too, unless that is nothing.
  if (table.shift < 2) {
    table.high[0] = 0;
    table.low[0] = 128;
  }
}

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

/// Entries := round((scores - low) / unit).
HWY_INLINE void QuantiseTable(const float* scores, float low, float inverse, uint8_t* entries) {
  const DF d;
  const hn::Rebind<uint8_t, DF> d8;
  for (int v = 0; v < kCentroids; v += kLanes) {
    const auto scaled =
        hn::Mul(hn::Sub(hn::Load(d, scores + v), hn::Set(d, low)), hn::Set(d, inverse));
    hn::StoreU(hn::DemoteTo(d8, hn::NearestInt(scaled)), d8, entries + v);
  }
}

void BuildProductTablesImpl(const float* queries, int heads, int dim, const float* centroids,
                            const uint32_t* starts, const float* errors,
                            const ProductLayout& layout, uint8_t* entries, ProductTables* tables) {
  HWY_ALIGN float scores[(kSubspacesMax + 1) * kCentroids];
  float lows[kSubspacesMax + 1];
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
    float whole_range = 0.0F;
    table.base = 0.0F;
    for (int g = 0; g < symbols; ++g) {
      const Range range = RangeOf(scores + g * kCentroids);
      lows[g] = range.low;
      table.base += range.low;
      whole_range += range.high - range.low;
    }
    // Rounding may add half a unit for each symbol.
    table.unit = whole_range / (static_cast<float>(kProductSumMax) - 0.5F * symbols);
    // Below that the inverse is infinite.
    if (table.unit < 1e-37F) table.unit = 0.0F;
    const float inverse = table.unit == 0.0F ? 0.0F : 1.0F / table.unit;
    for (int g = 0; g < symbols; ++g) {
      QuantiseTable(scores + g * kCentroids, lows[g], inverse, entries + g * kTableSize);
    }
    FillWindow(table);
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
                        uint8_t* entries, ProductTables* tables) noexcept {
  assert(layout.subspaces >= 1 && layout.subspaces <= kSubspacesMax);
  HWY_DYNAMIC_DISPATCH(BuildProductTablesImpl)
  (queries, heads, dim, centroids, starts, errors, layout, entries, tables);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
