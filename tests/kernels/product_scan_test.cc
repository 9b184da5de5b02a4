#include "kernels/cpu/product_scan.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/kernels/aligned.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/simd_level_fixture.h"

namespace kvseek::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kDim = 32;

using ProductScanTest = SimdLevelTest;

INSTANTIATE_TEST_SUITE_P(Levels, ProductScanTest, testing::ValuesIn(SupportedSimdLevels()),
                         LevelName);

/// Random codes, centroids and queries, and what is computed from them.
struct Subject {
  Subject(int subspaces, bool sketch, int block_count, int head_count, float spread = 1.0F)
      : layout{subspaces, sketch},
        blocks(block_count),
        heads(head_count),
        codes(static_cast<size_t>(blocks * layout.BlockBytes())),
        sums(static_cast<size_t>(heads * blocks * 64)) {
    std::mt19937 random(9);
    for (int i = 0; i < blocks * layout.BlockBytes(); ++i) {
      codes[static_cast<size_t>(i)] = static_cast<uint8_t>(random());
    }
    for (int g = 0; g <= subspaces; ++g) {
      starts.push_back(static_cast<uint32_t>(g * kDim / subspaces));
    }
    centroids = reference::RandomFloats(3, kDim * 64, 1.0F);
    std::vector<uint16_t> narrow;
    for (float& element : centroids) {
      narrow.push_back(FloatToBf16(element));
      element = Bf16ToFloat(narrow.back());
    }
    queries = reference::RandomFloats(4, static_cast<size_t>(heads * kDim), 0.4F * spread);
    for (int c = 0; c < 64; ++c) errors.push_back(0.2F * std::exp(0.05F * static_cast<float>(c)));
    entries.resize(static_cast<size_t>(heads * layout.Symbols() * 64));
    tables.resize(static_cast<size_t>(heads));
    BuildProductTables(queries.data(), heads, kDim, narrow.data(), starts.data(), errors.data(),
                       layout, entries.data(), tables.data());
    ScanProducts(codes.data(), blocks, layout, entries.data(), heads, sums.data(), blocks * 64);
  }

  std::vector<ProductHead> Heads(float threshold, float reference) const {
    std::vector<ProductHead> all;
    for (int h = 0; h < heads; ++h) {
      all.push_back(
          {&tables[static_cast<size_t>(h)], 0.1F * static_cast<float>(h), threshold, reference});
    }
    return all;
  }
  int Symbol(int key, int g) const {
    return ProductSymbol(codes.data() + key / 64 * layout.BlockBytes(), layout, g, key % 64) & 63;
  }
  double Sigma(int h, int key) const {
    double square = 0.0;
    for (int i = 0; i < kDim; ++i) {
      square += std::pow(double{queries[static_cast<size_t>(h * kDim + i)]}, 2.0);
    }
    return std::sqrt(square / kDim) * errors[static_cast<size_t>(Symbol(key, layout.subspaces))];
  }
  /// s^, centre included.
  double Estimate(int h, int key) const {
    double score = 0.1F * static_cast<float>(h);
    for (int g = 0; g < layout.subspaces; ++g) {
      for (uint32_t d = starts[static_cast<size_t>(g)]; d < starts[static_cast<size_t>(g) + 1];
           ++d) {
        score += double{queries[static_cast<size_t>(h * kDim) + d]} *
                 centroids[d * 64 + static_cast<size_t>(Symbol(key, g))];
      }
    }
    return score;
  }

  ProductLayout layout;
  int blocks;
  int heads;
  Aligned<uint8_t> codes;
  Aligned<uint8_t> sums;
  std::vector<uint32_t> starts;
  std::vector<float> centroids;
  std::vector<float> queries;
  std::vector<float> errors;
  std::vector<uint8_t> entries;
  std::vector<ProductTables> tables;
};

TEST_P(ProductScanTest, SumsAreTheEntries) {
  for (const int subspaces : {1, 3, 11, 22}) {
    for (const int heads : {1, 2, 5, 6, 9}) {
      const Subject subject(subspaces, heads % 2 == 0, 3, heads);
      const int symbols = subject.layout.Symbols();
      for (int h = 0; h < heads; ++h) {
        for (int key = 0; key < 3 * 64; ++key) {
          int sum = 0;
          for (int g = 0; g < symbols; ++g) {
            sum +=
                subject
                    .entries[static_cast<size_t>((h * symbols + g) * 64 + subject.Symbol(key, g))];
          }
          ASSERT_EQ(subject.sums.data()[h * 3 * 64 + key], sum) << h << ' ' << key;
        }
      }
    }
  }
}

TEST_P(ProductScanTest, EstimatesAreNear) {
  for (const int subspaces : {2, 11, 22}) {
    const Subject subject(subspaces, true, 2, 3);
    const auto heads = subject.Heads(kInfinity, 0.5F);
    std::vector<float> estimates(3 * 128), weights(3 * 128), deviations(3 * 128);
    EstimateProducts(subject.sums.data(), 128, subject.codes.data(), 2, subject.layout,
                     heads.data(), 3, estimates.data(), weights.data(), deviations.data(), 128);
    for (int h = 0; h < 3; ++h) {
      const double unit = subject.tables[static_cast<size_t>(h)].unit;
      const double rounding = 0.5 * unit * subject.layout.Symbols();
      for (int key = 0; key < 128; ++key) {
        const auto at = static_cast<size_t>(h * 128 + key);
        const double sigma = subject.Sigma(h, key);
        const double estimate = subject.Estimate(h, key);
        EXPECT_NEAR(deviations[at], sigma, 1e-4);
        EXPECT_NEAR(estimates[at], estimate + sigma, rounding + 1e-4);
        const double exponent = estimate + std::min(sigma * sigma, 2.0) / 4.0 - 0.5;
        EXPECT_NEAR(std::log(weights[at]), exponent, rounding + 0.02);
      }
    }
  }
}

/// The blocks of a subject as a sample: the last first, so that they are not consecutive.
struct Sampled {
  explicit Sampled(const Subject& given)
      : subject(given),
        stride(given.blocks * 64 + 16),
        estimates(static_cast<size_t>(given.heads * stride), -77.0F),
        largest(static_cast<size_t>(given.heads), -kInfinity),
        mass(static_cast<size_t>(given.heads)) {
    for (int b = 0; b < given.blocks; ++b) {
      codes.push_back(given.codes.data() + BlockOf(b) * given.layout.BlockBytes());
      for (int h = 0; h < given.heads; ++h) centres.push_back(Centre(b, h));
      factors.push_back(1.0F + static_cast<float>(b % 3));
    }
    for (int b = 0; b < given.blocks; ++b) rows.push_back(centres.data() + b * given.heads);
  }
  int BlockOf(int b) const { return subject.blocks - 1 - b; }
  static float Centre(int b, int h) { return 0.3F * static_cast<float>((b * 5 + h) % 7); }
  /// Blocks [begin, end).
  void Add(int begin, int end) {
    Aligned<uint8_t> sums(static_cast<size_t>(subject.heads * (end - begin) * 64));
    SampleProducts({codes.data() + begin, rows.data() + begin, factors.data() + begin, end - begin},
                   subject.layout, subject.entries.data(), subject.tables.data(), subject.heads,
                   sums.data(),
                   {estimates.data() + begin * 64, stride, largest.data(), mass.data()});
  }

  const Subject& subject;
  int stride;
  std::vector<const uint8_t*> codes;
  std::vector<float> centres;
  std::vector<const float*> rows;
  std::vector<float> factors;
  std::vector<float> estimates;
  std::vector<float> largest;
  std::vector<float> mass;
};

TEST_P(ProductScanTest, SamplesAreEstimatedAndWeighed) {
  for (const int subspaces : {2, 11, 22}) {
    for (const int heads : {1, 4, 7}) {
      for (const float spread : {0.0F, 1.0F, 8.0F}) {
        SCOPED_TRACE(testing::Message() << subspaces << ' ' << heads << ' ' << spread);
        const Subject subject(subspaces, heads != 4, 13, heads, spread);
        Sampled whole(subject);
        whole.Add(0, 13);
        Sampled parts(subject);
        parts.Add(0, 1);
        parts.Add(1, 9);
        parts.Add(9, 13);
        EXPECT_EQ(whole.estimates, parts.estimates);
        EXPECT_EQ(whole.largest, parts.largest);
        for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
          const ProductTables& tables = subject.tables[h];
          const float* const found = whole.estimates.data() + h * static_cast<size_t>(whole.stride);
          EXPECT_EQ(whole.largest[h], *std::max_element(found, found + size_t{13} * 64));
          EXPECT_EQ(found[13 * 64], -77.0F);
          double mass = 0.0;
          for (int b = 0; b < 13; ++b) {
            const int from = whole.BlockOf(b);
            const ProductHead head = {&tables, Sampled::Centre(b, static_cast<int>(h)), 0.0F,
                                      whole.largest[h]};
            std::vector<float> estimates(64), weights(64);
            EstimateProducts(subject.sums.data() + (static_cast<int>(h) * 13 + from) * 64, 64,
                             whole.codes[static_cast<size_t>(b)], 1, subject.layout, &head, 1,
                             estimates.data(), weights.data(), nullptr, 64);
            for (int key = 0; key < 64; ++key) {
              ASSERT_EQ(found[b * 64 + key], estimates[static_cast<size_t>(key)]);
              mass += double{whole.factors[static_cast<size_t>(b)]} *
                      double{weights[static_cast<size_t>(key)]};
            }
          }
          // A level's excess is rounded to units.
          const double relative = std::exp(0.5 * double{tables.unit}) - 1.0 + 2e-4;
          EXPECT_NEAR(whole.mass[h] / mass, 1.0, relative);
          EXPECT_NEAR(parts.mass[h] / whole.mass[h], 1.0F, 2e-4F);
        }
      }
    }
  }
}

/// What SelectProducts finds in all blocks of a subject.
struct Selected {
  Selected(const Subject& subject, const std::vector<ProductHead>& heads, bool by_block = true,
           WeighedBlocks weighed = {})
      : stride(subject.blocks * 64),
        chosen(static_cast<size_t>(stride) + 1, 77777),
        weights(heads.size() * static_cast<size_t>(stride)),
        units(heads.size()),
        sums(heads.size()),
        block_weights(heads.size() * static_cast<size_t>(subject.blocks + 1), -1.0F) {
    count =
        SelectProducts(subject.sums.data(), stride, subject.codes.data(), subject.blocks, weighed,
                       subject.layout, heads.data(), static_cast<int>(heads.size()), 1000,
                       {chosen.data(), weights.data(), stride, units.data(), sums.data(),
                        by_block ? block_weights.data() : nullptr, subject.blocks + 1});
  }
  float Weight(size_t h, size_t key) const {
    return units[h] * static_cast<float>(weights.data()[h * static_cast<size_t>(stride) + key]);
  }

  int stride;
  int count;
  std::vector<uint32_t> chosen;
  Aligned<uint8_t> weights;
  std::vector<float> units;
  std::vector<float> sums;
  std::vector<float> block_weights;
};

TEST_P(ProductScanTest, SelectsAndWeighsAsEstimated) {
  for (const int heads : {1, 3, 4, 6, 7}) {
    for (const float spread : {0.01F, 1.0F, 8.0F}) {
      for (const float threshold : {-kInfinity, 0.3F, 1.2F, kInfinity}) {
        SCOPED_TRACE(testing::Message() << heads << " heads " << spread << ' ' << threshold);
        const Subject subject(11, true, 3, heads, spread);
        const auto given = subject.Heads(threshold, 0.7F);
        const auto count = static_cast<size_t>(heads) * 192;
        std::vector<float> estimates(count), expected(count);
        EstimateProducts(subject.sums.data(), 192, subject.codes.data(), 3, subject.layout,
                         given.data(), heads, estimates.data(), expected.data(), nullptr, 192);
        const Selected selected(subject, given);
        int next = 0;
        std::vector<bool> any(192);
        for (size_t key = 0; key < 192; ++key) {
          for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
            if (estimates[h * 192 + key] > threshold) any[key] = true;
          }
          if (!any[key]) continue;
          ASSERT_LT(next, selected.count);
          EXPECT_EQ(selected.chosen[static_cast<size_t>(next++)], 1000U + key);
        }
        EXPECT_EQ(next, selected.count);
        EXPECT_EQ(selected.chosen[static_cast<size_t>(next)], 77777U);
        for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
          const ProductTables& tables = subject.tables[h];
          // Half a step of the window, and what a level's excess is rounded by.
          const float half_step = 0.5F * tables.unit * static_cast<float>((1 << tables.shift) + 1);
          const float relative = std::exp(half_step) - 1.0F;
          const float largest = 255.0F * selected.units[h];
          for (size_t b = 0; b < 3; ++b) {
            float sum = 0.0F;
            for (size_t key = b * 64; key < b * 64 + 64; ++key) {
              const float right = any[key] ? 0.0F : expected[h * 192 + key];
              const float tolerance = relative * right + 0.501F / 255.0F * largest;
              ASSERT_NEAR(selected.Weight(h, key), right, any[key] ? 0.0F : tolerance) << key;
              sum += right;
            }
            // Sums are of finer weights, down to exp(-11) of the largest.
            ASSERT_NEAR(selected.block_weights[h * 4 + b], sum, relative * sum + 3e-3F * largest);
          }
          EXPECT_EQ(selected.block_weights[h * 4 + 3], -1.0F);
        }
      }
    }
  }
}

// Sums are of the blocks' whole numbers, over any number of blocks, and the same without them.
TEST_P(ProductScanTest, SumsAreOfAllBlocks) {
  for (const int heads : {1, 4, 5, 8, 11}) {
    for (const int blocks : {1, 16, 37}) {
      for (const float threshold : {-kInfinity, 0.8F, kInfinity}) {
        SCOPED_TRACE(testing::Message() << heads << ' ' << blocks << ' ' << threshold);
        const Subject subject(11, true, blocks, heads);
        const auto given = subject.Heads(threshold, 0.7F);
        const Selected by_block(subject, given);
        const Selected whole(subject, given, false);
        EXPECT_EQ(whole.count, by_block.count);
        EXPECT_EQ(whole.chosen, by_block.chosen);
        EXPECT_EQ(whole.units, by_block.units);
        EXPECT_EQ(whole.sums, by_block.sums);
        const size_t keys = static_cast<size_t>(heads) * static_cast<size_t>(blocks) * 64;
        EXPECT_TRUE(
            std::equal(whole.weights.data(), whole.weights.data() + keys, by_block.weights.data()));
        for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
          double sum = 0.0;
          for (size_t b = 0; b < static_cast<size_t>(blocks); ++b) {
            sum += by_block.block_weights[h * static_cast<size_t>(blocks + 1) + b];
          }
          EXPECT_NEAR(whole.sums[h], sum, 1e-6 * sum);
        }
      }
    }
  }
}

// The choice does not depend on which blocks are weighed, nor does a block's weight.
TEST_P(ProductScanTest, SomeBlocksAreWeighed) {
  for (const int heads : {1, 4, 9}) {
    for (const float threshold : {-kInfinity, 0.8F, kInfinity}) {
      const Subject subject(11, true, 37, heads);
      const auto given = subject.Heads(threshold, 0.7F);
      const Selected all(subject, given);
      for (const WeighedBlocks weighed : {WeighedBlocks{0, 2}, {3, 4}, {16, 20}, {36, 37}}) {
        SCOPED_TRACE(testing::Message() << heads << ' ' << weighed.first << ' ' << weighed.step);
        const Selected some(subject, given, true, weighed);
        const Selected whole(subject, given, false, weighed);
        EXPECT_EQ(some.count, all.count);
        EXPECT_EQ(some.chosen, all.chosen);
        EXPECT_EQ(some.units, all.units);
        EXPECT_EQ(whole.sums, some.sums);
        for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
          float sum = 0.0F;
          for (int w = 0; w < weighed.Count(37); ++w) {
            const auto block = static_cast<size_t>(weighed.first + w * weighed.step);
            const float weight = all.block_weights[h * 38 + block];
            EXPECT_NEAR(some.block_weights[h * 38 + static_cast<size_t>(w)], weight,
                        1e-6F * weight);
            sum += weight;
            const uint8_t* const from = all.weights.data() + h * 37 * 64 + block * 64;
            EXPECT_TRUE(
                std::equal(from, from + 64, some.weights.data() + h * 37 * 64 + w * size_t{64}));
          }
          EXPECT_NEAR(some.sums[h], sum, 1e-5F * sum);
        }
      }
    }
  }
}

// The threshold's place in the window: keys just below it weigh most.
TEST_P(ProductScanTest, WindowEndsAtTheThreshold) {
  const Subject subject(11, true, 4, 1);
  for (const float threshold : {-1.0F, 0.0F, 1.0F}) {
    const auto heads = subject.Heads(threshold, 0.0F);
    const Selected selected(subject, heads);
    EXPECT_GT(selected.count, 0);
    EXPECT_LT(selected.count, 4 * 64);
    EXPECT_NEAR(std::log(255.0F * selected.units[0]), threshold, subject.tables[0].unit);
  }
}

// Rounding hardly adds up to anything where a share of the keys is chosen.
TEST_P(ProductScanTest, WeightsAreUnbiased) {
  constexpr size_t kKeys = 64 * 64;
  for (const float spread : {0.1F, 1.0F, 2.0F}) {
    const Subject subject(11, false, 64, 1, spread);
    std::vector<float> estimates(kKeys), expected(kKeys);
    EstimateProducts(subject.sums.data(), kKeys, subject.codes.data(), 64, subject.layout,
                     subject.Heads(kInfinity, 0.0F).data(), 1, estimates.data(), expected.data(),
                     nullptr, kKeys);
    std::vector<float> ranked = estimates;
    std::nth_element(ranked.begin(), ranked.begin() + kKeys / 32, ranked.end(), std::greater<>());
    const Selected selected(subject, subject.Heads(ranked[kKeys / 32], 0.0F));
    EXPECT_GT(selected.count, 0);
    double sum = 0.0;
    double singles = 0.0;
    double right = 0.0;
    for (size_t b = 0; b < 64; ++b) sum += selected.block_weights[b];
    for (size_t key = 0; key < kKeys; ++key) {
      singles += selected.Weight(0, key);
      if (estimates[key] <= ranked[kKeys / 32]) right += expected[key];
    }
    EXPECT_NEAR(sum / right, 1.0, 0.01) << spread;
    EXPECT_NEAR(singles / right, 1.0, 0.02) << spread;
  }
}

// References far above and far below all scores: nothing, or the bound.
TEST_P(ProductScanTest, ExtremeReferences) {
  const Subject subject(11, false, 1, 1);
  const Selected nothing(subject, subject.Heads(kInfinity, 1e6F));
  EXPECT_EQ(nothing.block_weights[0], 0.0F);
  EXPECT_EQ(nothing.units[0], 0.0F);
  const Selected most(subject, subject.Heads(kInfinity, -200.0F));
  EXPECT_NEAR(std::log(255.0F * most.units[0]), 80.0, 1e-3);
  EXPECT_GT(most.block_weights[0], 255.0F * most.units[0]);
  EXPECT_LT(most.block_weights[0], 64.0F * 255.0F * most.units[0]);
}

// Subnormal weights, and products with them, take hundreds of cycles.
TEST_P(ProductScanTest, WeightsAreZeroOrFarFromSubnormal) {
  const float bound = std::exp2(-108.0F);
  for (const float spread : {0.1F, 1.0F, 30.0F}) {
    const Subject subject(11, true, 2, 2, spread);
    int zeros = 0;
    int small = 0;  // above the bound, but near it
    for (int reference = 0; reference < 400; ++reference) {
      const Selected selected(subject, subject.Heads(kInfinity, static_cast<float>(reference)));
      for (const float unit : selected.units) {
        ASSERT_TRUE(unit == 0.0F || unit >= bound) << unit << ' ' << reference;
        if (unit == 0.0F) ++zeros;
        if (unit > 0.0F && unit < 1024.0F * bound) ++small;
      }
      for (const size_t at : {0, 1, 3, 4}) {
        const float weight = selected.block_weights[at];
        ASSERT_TRUE(weight == 0.0F || weight >= bound / 512.0F) << weight << ' ' << reference;
      }
    }
    EXPECT_GT(zeros, 0) << spread;
    EXPECT_GT(small, 0) << spread;
  }
}

TEST_P(ProductScanTest, NoQueryScoresNothing) {
  const Subject subject(11, true, 1, 1, 0.0F);
  EXPECT_EQ(subject.tables[0].unit, 0.0F);
  for (const float threshold : {-1.0F, 1.0F}) {
    const Selected selected(subject, subject.Heads(threshold, 0.0F));
    EXPECT_EQ(selected.count, threshold < 0.0F ? 64 : 0);
    EXPECT_NEAR(selected.block_weights[0], threshold < 0.0F ? 0.0F : 64.0F, 1e-3F);
  }
}

// However far the entries are apart, no sum leaves its byte.
TEST_P(ProductScanTest, SumsFitTheirBytes) {
  for (const int subspaces : {1, 2, 11, 22, 32}) {
    const Subject subject(subspaces, false, 1, 3, 5.0F);
    const int symbols = subject.layout.Symbols();
    for (int h = 0; h < 3; ++h) {
      int most = 0;
      for (int g = 0; g < symbols; ++g) {
        const auto table = subject.entries.begin() + (h * symbols + g) * 64;
        EXPECT_EQ(*std::min_element(table, table + 64), 0);
        most += *std::max_element(table, table + 64);
      }
      EXPECT_LE(most, kProductSumMax);
      EXPECT_GT(most, kProductSumMax - 2 * symbols);
    }
  }
}

}  // namespace
}  // namespace kvseek::kernels
