#include "kernels/cpu/threshold.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <random>
#include <vector>

namespace kvseek::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float Rank(const std::vector<float>& values, int64_t rank) {
  std::vector<uint32_t> work(values.size());
  return RankThreshold(values.data(), static_cast<int64_t>(values.size()), rank, work.data());
}

TEST(RankThresholdTest, EqualsSorting) {
  std::mt19937 random(7);
  for (const int count : {1, 2, 3, 100, 1023, 5000}) {
    for (const float deviation : {1e-30F, 1.0F, 1e10F}) {
      std::normal_distribution<float> normal(0.0F, deviation);
      std::vector<float> values(static_cast<size_t>(count));
      for (float& value : values) value = normal(random);
      if (count > 2) {
        values[0] = -kInfinity;
        values[1] = values[2];
      }
      std::vector<float> sorted = values;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      for (const int rank : {1, 2, count / 3 + 1, count - 1, count}) {
        if (rank < 1 || rank > count) continue;
        EXPECT_EQ(Rank(values, rank), sorted[static_cast<size_t>(rank) - 1])
            << count << " " << rank;
      }
    }
  }
}

TEST(RankThresholdTest, TiesAndBothSigns) {
  EXPECT_EQ(Rank({-1.0F, -2.0F, -1.0F, -3.0F}, 2), -1.0F);
  EXPECT_EQ(Rank({-1.0F, -2.0F, -1.0F, -3.0F}, 3), -2.0F);
  EXPECT_EQ(Rank({5.0F, 5.0F, 5.0F}, 3), 5.0F);
  EXPECT_EQ(Rank({-0.5F, 0.0F, 0.5F}, 1), 0.5F);
  EXPECT_EQ(Rank({-0.5F, 0.0F, 0.5F}, 3), -0.5F);
}

TEST(RankThresholdTest, RanksOutsideTheValues) {
  EXPECT_EQ(Rank({1.0F}, 0), kInfinity);
  EXPECT_EQ(Rank({1.0F}, -3), kInfinity);
  EXPECT_EQ(Rank({1.0F}, 2), -kInfinity);
  EXPECT_EQ(Rank({}, 1), -kInfinity);
}

}  // namespace
}  // namespace kvseek::kernels
