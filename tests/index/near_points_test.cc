#include "index/near_points.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace kvseek::index {
namespace {

struct Points {
  int dim;
  std::vector<float> values, squares;
  int64_t Count() const { return static_cast<int64_t>(squares.size()); }
  double Distance(size_t a, size_t b) const {
    double sum = 0.0;
    for (size_t d = 0; d < static_cast<size_t>(dim); ++d) {
      const double difference = double{values[a * static_cast<size_t>(dim) + d]} -
                                values[b * static_cast<size_t>(dim) + d];
      sum += difference * difference;
    }
    return sum;
  }
};

/// Around random centres.
Points Clustered(int64_t count, int dim, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  Points points{dim, {}, {}};
  std::vector<float> centres(static_cast<size_t>(20 * dim));
  for (float& centre : centres) centre = normal(random);
  for (int64_t i = 0; i < count; ++i) {
    const size_t centre = random() % 20;
    float square = 0.0F;
    for (int d = 0; d < dim; ++d) {
      const float value = centres[centre * static_cast<size_t>(dim) + static_cast<size_t>(d)] +
                          0.4F * normal(random);
      points.values.push_back(value);
      square += value * value;
    }
    points.squares.push_back(square);
  }
  return points;
}

TEST(NearPointsTest, FewPointsAreComparedWithAll) {
  for (const int64_t count : {1, 2, 30, 200, 767}) {
    const Points points = Clustered(count, 24, 5);
    const NearPoints near = FindNearPoints(points.values.data(), points.squares.data(), count, 24,
                                           10, [] { return false; });
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
      std::vector<std::pair<double, uint32_t>> all;
      for (size_t j = 0; j < static_cast<size_t>(count); ++j) {
        if (j != i) all.emplace_back(points.Distance(i, j), static_cast<uint32_t>(j));
      }
      std::sort(all.begin(), all.end());
      for (size_t r = 0; r < 10; ++r) {
        const uint32_t id = near.ids[i * 10 + r];
        if (r >= all.size()) {
          EXPECT_EQ(id, NearPoints::kNoPoint);
        } else {
          ASSERT_LT(id, count);
          EXPECT_NEAR(points.Distance(i, id), all[r].first, 1e-3);
        }
      }
    }
  }
}

TEST(NearPointsTest, FindsMostOfThem) {
  const Points points = Clustered(4000, 32, 7);
  const NearPoints near = FindNearPoints(points.values.data(), points.squares.data(), 4000, 32, 16,
                                         [] { return false; });
  int found = 0;
  for (size_t i = 0; i < 4000; i += 40) {
    std::vector<std::pair<double, uint32_t>> all;
    for (size_t j = 0; j < 4000; ++j) {
      if (j != i) all.emplace_back(points.Distance(i, j), static_cast<uint32_t>(j));
    }
    std::partial_sort(all.begin(), all.begin() + 16, all.end());
    for (size_t r = 0; r < 16; ++r) {
      const auto row = near.ids.begin() + static_cast<ptrdiff_t>(i * 16);
      found += std::find(row, row + 16, all[r].second) != row + 16 ? 1 : 0;
    }
  }
  EXPECT_GE(found, 1600 * 8 / 10);
}

TEST(NearPointsTest, EndsWhenTold) {
  const Points points = Clustered(500, 16, 9);
  EXPECT_TRUE(FindNearPoints(points.values.data(), points.squares.data(), 500, 16, 4, [] {
                return true;
              }).ids.empty());
}

}  // namespace
}  // namespace kvseek::index
