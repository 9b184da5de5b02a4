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

inline constexpr float kCorrection = 0.25F;  // of a weight's exponent, upwards, times the variance

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

// Heads that share a centroid's load, and what of 64 centroids is worked on at once.
constexpr int kTileHeads = HWY_TARGET <= HWY_AVX3 ? 4 : 2;
constexpr int kTileVectors = std::min(kCentroids / kLanes, 4);

/// Scores of the 64 centroids of a sub-space: scores[h * stride + centroid] of kHeads queries.
template <int kHeads>
HWY_INLINE void ScoreCentroids(const float* queries, int query_stride, const uint16_t* centroids,
                               int dim, float* scores, int stride) {
  const DF d;
  const hn::RebindToUnsigned<DF> du;
  const hn::Rebind<uint16_t, DF> d16;
  for (int v = 0; v < kCentroids; v += kTileVectors * kLanes) {
    hn::Vec<DF> sums[kHeads][kTileVectors];
    for (auto& of_head : sums) {
      for (auto& sum : of_head) sum = hn::Zero(d);
    }
    for (int i = 0; i < dim; ++i) {
      hn::Vec<DF> row[kTileVectors];
      for (int s = 0; s < kTileVectors; ++s) {
        const auto bits = hn::LoadU(d16, centroids + i * kCentroids + v + s * kLanes);
        row[s] = hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, bits)));
      }
      for (int h = 0; h < kHeads; ++h) {
        const auto element = hn::Set(d, queries[h * query_stride + i]);
        for (int s = 0; s < kTileVectors; ++s) {
          sums[h][s] = hn::MulAdd(element, row[s], sums[h][s]);
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int s = 0; s < kTileVectors; ++s) {
        hn::Store(sums[h][s], d, scores + h * stride + v + s * kLanes);
      }
    }
  }
}

HWY_INLINE float SumOfSquares(const float* values, int count) {
  const DF d;
  auto sum = hn::Zero(d);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const auto value = hn::LoadU(d, values + i);
    sum = hn::MulAdd(value, value, sum);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < count; ++i) total += values[i] * values[i];
  return total;
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

/// One head's table, from the centroids' scores; those of the levels are added.
HWY_INLINE void BuildTable(const float* query, int dim, const float* errors, int subspaces,
                           float* scores, uint8_t* entries, ProductTables& table) {
  float lows[kSubspacesMax + 1];
  const int symbols = subspaces + 1;
  const float deviation = std::sqrt(SumOfSquares(query, dim) / static_cast<float>(dim));
  const DF d;
  for (int c = 0; c < kCentroids; c += kLanes) {
    const auto sigma = hn::Mul(hn::Set(d, deviation), hn::LoadU(d, errors + c));
    const auto variance = hn::Min(hn::Mul(sigma, sigma), hn::Set(d, kVarianceMax));
    hn::StoreU(sigma, d, table.sigma + c);
    hn::Store(sigma, d, scores + subspaces * kCentroids + c);
    hn::StoreU(hn::NegMulAdd(variance, hn::Set(d, kCorrection), sigma), d, table.excess + c);
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
  table.unit =
      whole_range / (static_cast<float>(kProductSumMax) - 0.5F * static_cast<float>(symbols));
  // Below that the inverse is infinite.
  if (table.unit < 1e-37F) table.unit = 0.0F;
  const float inverse = table.unit == 0.0F ? 0.0F : 1.0F / table.unit;
  for (int g = 0; g < symbols; ++g) {
    QuantiseTable(scores + g * kCentroids, lows[g], inverse, entries + g * kTableSize);
  }
  FillWindow(table);
}

template <int kHeads>
void BuildSomeTables(const float* queries, int dim, const uint16_t* centroids,
                     const uint32_t* starts, const float* errors, const ProductLayout& layout,
                     uint8_t* entries, ProductTables* tables) {
  HWY_ALIGN float scores[kHeads * (kSubspacesMax + 1) * kCentroids];
  const int symbols = layout.Symbols();
  for (int g = 0; g < layout.subspaces; ++g) {
    ScoreCentroids<kHeads>(queries + starts[g], dim, centroids + starts[g] * kCentroids,
                           static_cast<int>(starts[g + 1] - starts[g]), scores + g * kCentroids,
                           symbols * kCentroids);
  }
  for (int h = 0; h < kHeads; ++h) {
    BuildTable(queries + static_cast<ptrdiff_t>(h) * dim, dim, errors, layout.subspaces,
               scores + h * symbols * kCentroids, entries + h * symbols * kTableSize, tables[h]);
  }
}

void BuildProductTablesImpl(const float* queries, int heads, int dim, const uint16_t* centroids,
                            const uint32_t* starts, const float* errors,
                            const ProductLayout& layout, uint8_t* entries, ProductTables* tables) {
  const ptrdiff_t head_bytes = static_cast<ptrdiff_t>(layout.Symbols()) * kTableSize;
  int h = 0;
  for (; h + kTileHeads <= heads; h += kTileHeads) {
    BuildSomeTables<kTileHeads>(queries + static_cast<ptrdiff_t>(h) * dim, dim, centroids, starts,
                                errors, layout, entries + h * head_bytes, tables + h);
  }
  for (; h < heads; ++h) {
    BuildSomeTables<1>(queries + static_cast<ptrdiff_t>(h) * dim, dim, centroids, starts, errors,
                       layout, entries + h * head_bytes, tables + h);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {

HWY_EXPORT(BuildProductTablesImpl);

void BuildProductTables(const float* queries, int heads, int dim, const uint16_t* centroids,
                        const uint32_t* starts, const float* errors, const ProductLayout& layout,
                        uint8_t* entries, ProductTables* tables) noexcept {
  assert(layout.subspaces >= 1 && layout.subspaces <= kSubspacesMax);
  HWY_DYNAMIC_DISPATCH(BuildProductTablesImpl)
  (queries, heads, dim, centroids, starts, errors, layout, entries, tables);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
