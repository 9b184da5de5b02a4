#include "kernels/cpu/threshold.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/simd_level.h"

namespace kvseek::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float Rank(const std::vector<float>& values, int64_t rank) {
  std::vector<int32_t> work(values.size());
  return RankThreshold(values.data(), static_cast<int64_t>(values.size()), rank, work.data());
}

/// Whether `threshold` divides the best `rank` values from the others.
void ExpectDivides(const std::vector<float>& values, int64_t rank) {
  const float threshold = Rank(values, rank);
  EXPECT_LE(std::count_if(values.begin(), values.end(), [&](float v) { return v > threshold; }),
            rank);
  EXPECT_GE(std::count_if(values.begin(), values.end(), [&](float v) { return v >= threshold; }),
            rank);
}

TEST(RankThresholdTest, DividesTheBestFromTheOthers) {
  std::mt19937 random(7);
  for (const std::string& level : SupportedSimdLevels()) {
    ASSERT_TRUE(ForceSimdLevel(level));
    for (const int count : {1, 2, 3, 31, 33, 100, 1023, 5000}) {
      for (const float deviation : {1e-38F, 1.0F, 1e10F}) {
        std::normal_distribution<float> normal(0.0F, deviation);
        std::vector<float> values(static_cast<size_t>(count));
        for (float& value : values) value = normal(random);
        if (count > 3) {
          values[0] = -kInfinity;
          values[1] = values[2];
        }
        for (const int rank : {1, 2, count / 3 + 1, count - 1, count}) {
          if (rank >= 1 && rank <= count) ExpectDivides(values, rank);
        }
      }
    }
  }
  ASSERT_TRUE(ForceSimdLevel(""));
}

TEST(RankThresholdTest, NoPartHasTwoOfTheBest) {
  std::vector<float> values;
  for (int i = 0; i < 16; ++i) values.push_back(1000.0F + static_cast<float>(i));
  for (int i = 0; i < 240; ++i) values.push_back(1.0F + static_cast<float>(i));
  for (const std::string& level : SupportedSimdLevels()) {
    ASSERT_TRUE(ForceSimdLevel(level));
    for (const int rank : {1, 15, 16, 17, 30}) ExpectDivides(values, rank);
  }
  ASSERT_TRUE(ForceSimdLevel(""));
}

TEST(RankThresholdTest, TheSameAtEveryLevel) {
  std::mt19937 random(8);
  std::normal_distribution<float> normal;
  std::vector<float> values(4099);
  for (float& value : values) value = normal(random);
  for (const int rank : {1, 16, 64, 129, 500, 513, 2000}) {
    ASSERT_TRUE(ForceSimdLevel(""));
    const float expected = Rank(values, rank);
    for (const std::string& level : SupportedSimdLevels()) {
      ASSERT_TRUE(ForceSimdLevel(level));
      EXPECT_EQ(Rank(values, rank), expected) << level << ' ' << rank;
    }
  }
  ASSERT_TRUE(ForceSimdLevel(""));
}

TEST(RankThresholdTest, TiesAndBothSigns) {
  for (const int rank : {1, 2, 3, 4}) ExpectDivides({-1.0F, -2.0F, -1.0F, -3.0F}, rank);
  for (const int rank : {1, 2, 3}) {
    ExpectDivides({-0.5F, 0.0F, 0.5F}, rank);
    ExpectDivides({-0.0F, 0.0F, -0.0F}, rank);
  }
  EXPECT_EQ(Rank({5.0F, 5.0F, 5.0F}, 3), 5.0F);
  EXPECT_EQ(Rank({5.0F, 5.0F, 5.0F}, 1), 5.0F);
}

TEST(RankThresholdTest, RanksOutsideTheValues) {
  EXPECT_EQ(Rank({1.0F}, 0), kInfinity);
  EXPECT_EQ(Rank({1.0F}, -3), kInfinity);
  EXPECT_EQ(Rank({1.0F}, 2), -kInfinity);
  EXPECT_EQ(Rank({}, 1), -kInfinity);
}

TEST(IndicesFromTest, EveryLevelEqualsAPlainLoop) {
  std::mt19937 random(9);
  std::uniform_int_distribution<int> small(0, 9);
  for (const std::string& level : SupportedSimdLevels()) {
    ASSERT_TRUE(ForceSimdLevel(level));
    for (const size_t count : {0, 1, 3, 16, 17, 64, 1000}) {
      std::vector<float> values(count);
      for (float& value : values) value = static_cast<float>(small(random));
      if (count > 1) values[1] = -kInfinity;
      for (const float threshold : {-kInfinity, -1.0F, 0.0F, 7.0F, 9.0F, 10.0F, kInfinity}) {
        std::vector<uint32_t> expected;
        for (uint32_t i = 0; i < count; ++i) {
          if (values[i] >= threshold) expected.push_back(i);
        }
        std::vector<uint32_t> indices(count + 1, 42);
        const int64_t found =
            IndicesFrom(values.data(), static_cast<int64_t>(count), threshold, indices.data());
        EXPECT_EQ(indices.back(), 42U) << "written past the end";
        indices.resize(static_cast<size_t>(found));
        EXPECT_EQ(indices, expected) << level << ' ' << count << ' ' << threshold;
      }
    }
  }
  ASSERT_TRUE(ForceSimdLevel(""));
}

}  // namespace
}  // namespace kvseek::kernels
