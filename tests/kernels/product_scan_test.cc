#include "kernels/cpu/product_scan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/dtype.h"
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
  Aligned<int16_t> sums;
  std::vector<uint32_t> starts;
  std::vector<float> centroids;
  std::vector<float> queries;
  std::vector<float> errors;
  std::vector<int8_t> entries;
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

TEST_P(ProductScanTest, SelectsAndWeighsAsEstimated) {
  for (const int heads : {1, 3, 4, 6, 7}) {
    for (const float spread : {0.01F, 1.0F, 8.0F}) {
      for (const float threshold : {-kInfinity, 0.3F, kInfinity}) {
        SCOPED_TRACE(testing::Message() << heads << " heads " << spread << ' ' << threshold);
        // A fine exponent is lost where a unit of a table is more than a nat.
        const float tolerance = spread > 1.0F ? 0.3F : 0.09F;
        const Subject subject(11, true, 3, heads, spread);
        const auto given = subject.Heads(threshold, 0.7F);
        const auto count = static_cast<size_t>(heads) * 192;
        std::vector<float> estimates(count), expected(count);
        EstimateProducts(subject.sums.data(), 192, subject.codes.data(), 3, subject.layout,
                         given.data(), heads, estimates.data(), expected.data(), nullptr, 192);
        std::vector<uint32_t> chosen(3 * 64 + 1, 77777);
        Aligned<uint16_t> weights(count);
        std::vector<float> block_weights(static_cast<size_t>(heads) * 4, -1.0F);
        const int found = SelectProducts(subject.sums.data(), 192, subject.codes.data(), 3,
                                         subject.layout, given.data(), heads, 1000, chosen.data(),
                                         weights.data(), 192, block_weights.data(), 4);
        int next = 0;
        for (int key = 0; key < 192; ++key) {
          bool any = false;
          for (int h = 0; h < heads; ++h) {
            any = any || estimates[static_cast<size_t>(h * 192 + key)] > threshold;
          }
          if (any) {
            ASSERT_LT(next, found);
            EXPECT_EQ(chosen[static_cast<size_t>(next++)], 1000U + static_cast<uint32_t>(key));
          }
          for (int h = 0; h < heads; ++h) {
            const float weight = Bf16ToFloat(weights.data()[h * 192 + key]);
            const float right = any ? 0.0F : expected[static_cast<size_t>(h * 192 + key)];
            ASSERT_NEAR(weight, right, tolerance * right) << key;
          }
        }
        EXPECT_EQ(next, found);
        EXPECT_EQ(chosen[static_cast<size_t>(found)], 77777U);
        for (int h = 0; h < heads; ++h) {
          for (int b = 0; b < 3; ++b) {
            double sum = 0.0;
            for (int i = 0; i < 64; ++i) {
              sum += Bf16ToFloat(weights.data()[h * 192 + b * 64 + i]);
            }
            EXPECT_NEAR(block_weights[static_cast<size_t>(h * 4 + b)], sum, 1e-5 * sum);
          }
          EXPECT_EQ(block_weights[static_cast<size_t>(h * 4 + 3)], -1.0F);
        }
      }
    }
  }
}

// The fast exponential is right on average.
TEST_P(ProductScanTest, WeightsAreUnbiased) {
  const Subject subject(11, false, 64, 2);
  const auto heads = subject.Heads(kInfinity, 0.0F);
  const size_t count = 2 * 64 * 64;
  std::vector<float> estimates(count), expected(count);
  EstimateProducts(subject.sums.data(), 64 * 64, subject.codes.data(), 64, subject.layout,
                   heads.data(), 2, estimates.data(), expected.data(), nullptr, 64 * 64);
  Aligned<uint16_t> weights(count);
  std::vector<float> block_weights(2 * 64);
  std::vector<uint32_t> chosen(64 * 64);
  EXPECT_EQ(SelectProducts(subject.sums.data(), 64 * 64, subject.codes.data(), 64, subject.layout,
                           heads.data(), 2, 0, chosen.data(), weights.data(), 64 * 64,
                           block_weights.data(), 64),
            0);
  double ratios = 0.0;
  for (size_t i = 0; i < count; ++i) ratios += Bf16ToFloat(weights.data()[i]) / expected[i];
  EXPECT_NEAR(ratios / count, 1.0, 0.01);
}

// References far above and far below all scores: nothing, or the bound.
TEST_P(ProductScanTest, ExtremeReferences) {
  const Subject subject(11, false, 1, 1);
  Aligned<uint16_t> weights(64);
  float block_weight = 0.0F;
  std::vector<uint32_t> chosen(64);
  const auto weigh = [&](float reference) {
    const auto heads = subject.Heads(kInfinity, reference);
    SelectProducts(subject.sums.data(), 64, subject.codes.data(), 1, subject.layout, heads.data(),
                   1, 0, chosen.data(), weights.data(), 64, &block_weight, 1);
    return block_weight;
  };
  EXPECT_EQ(weigh(1e6F), 0.0F);
  EXPECT_NEAR(std::log(weigh(-200.0F) / 64.0F), 80.0, 0.1);
}

// Subnormal weights, and products with them, take hundreds of cycles.
TEST_P(ProductScanTest, WeightsAreZeroOrFarFromSubnormal) {
  const float bound = std::exp2(-101.0F);
  for (const float spread : {0.1F, 1.0F, 30.0F}) {
    const Subject subject(11, true, 2, 2, spread);
    Aligned<uint16_t> weights(2 * 128);
    std::vector<float> block_weights(4);
    std::vector<uint32_t> chosen(128);
    int zeros = 0;
    int small = 0;  // above the bound, but near it
    for (int reference = 50; reference < 100; ++reference) {
      const auto heads = subject.Heads(kInfinity, static_cast<float>(reference));
      SelectProducts(subject.sums.data(), 128, subject.codes.data(), 2, subject.layout,
                     heads.data(), 2, 0, chosen.data(), weights.data(), 128, block_weights.data(),
                     2);
      for (size_t i = 0; i < 2 * 128; ++i) {
        const float weight = Bf16ToFloat(weights[i]);
        ASSERT_TRUE(weight == 0.0F || weight >= bound) << weight << ' ' << reference;
        if (weight == 0.0F) ++zeros;
        if (weight > 0.0F && weight < 1024.0F * bound) ++small;
      }
      EXPECT_THAT(block_weights, testing::Each(testing::AnyOf(0.0F, testing::Ge(bound))));
    }
    EXPECT_GT(zeros, 0) << spread;
    EXPECT_GT(small, 0) << spread;
  }
}

TEST_P(ProductScanTest, NoQueryScoresNothing) {
  Subject subject(11, true, 1, 1, 0.0F);
  EXPECT_EQ(subject.tables[0].unit, 0.0F);
  Aligned<uint16_t> weights(64);
  float block_weight = 0.0F;
  std::vector<uint32_t> chosen(64);
  for (const float threshold : {-1.0F, 1.0F}) {
    const auto heads = subject.Heads(threshold, 0.0F);
    EXPECT_EQ(
        SelectProducts(subject.sums.data(), 64, subject.codes.data(), 1, subject.layout,
                       heads.data(), 1, 0, chosen.data(), weights.data(), 64, &block_weight, 1),
        threshold < 0.0F ? 64 : 0);
    EXPECT_NEAR(block_weight, threshold < 0.0F ? 0.0F : 64.0F, 4.0F);
  }
}

}  // namespace
}  // namespace kvseek::kernels
