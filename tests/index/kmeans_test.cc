#include "index/kmeans.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace kvseek::index {
namespace {

std::vector<float> RandomPoints(size_t count, int dim, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> points;
  for (size_t i = 0; i < count * static_cast<size_t>(dim); ++i) points.push_back(normal(random));
  return points;
}

/// Sum of squared distances to the mean of each point's cluster.
double Spread(const std::vector<float>& points, int dim, const std::vector<uint16_t>& cluster_of) {
  const auto columns = static_cast<size_t>(dim);
  const size_t clusters = *std::max_element(cluster_of.begin(), cluster_of.end()) + size_t{1};
  std::vector<double> means(clusters * columns);
  std::vector<double> sizes(clusters);
  double squares = 0.0;
  for (size_t i = 0; i < points.size(); ++i) {
    const size_t cluster = cluster_of[i / columns];
    means[cluster * columns + i % columns] += points[i];
    squares += double{points[i]} * points[i];
    if (i % columns == 0) sizes[cluster] += 1.0;
  }
  for (size_t i = 0; i < means.size(); ++i) squares -= means[i] * means[i] / sizes[i / columns];
  return squares;
}

TEST(KmeansTest, NumbersAreDenseAndTheSameEachTime) {
  for (const int dim : {8, 72, 1024}) {
    for (const int clusters : {1, 5, 100}) {
      const std::vector<float> points = RandomPoints(300, dim, 7);
      const std::vector<uint16_t> cluster_of = AssignToClusters(points, dim, clusters);
      ASSERT_EQ(cluster_of.size(), 300U);
      std::vector<uint16_t> used = cluster_of;
      std::sort(used.begin(), used.end());
      used.erase(std::unique(used.begin(), used.end()), used.end());
      EXPECT_LE(static_cast<int>(used.size()), clusters);
      EXPECT_GE(static_cast<int>(used.size()), clusters * 9 / 10);
      EXPECT_EQ(used.back(), used.size() - 1);
      EXPECT_EQ(AssignToClusters(points, dim, clusters), cluster_of);
    }
  }
}

TEST(KmeansTest, FindsWhatIsApart) {
  // Ten heaps, far from each other.
  const int dim = 16;
  std::vector<float> points = RandomPoints(1000, dim, 8);
  for (size_t i = 0; i < points.size(); ++i) {
    const size_t heap = i / dim % 10;
    if (i % dim == heap) points[i] += 100.0F;
  }
  // Where random first centroids meet in one heap, k-means cannot part two others; twice as many
  // clusters leave some for each.
  const std::vector<uint16_t> cluster_of = AssignToClusters(points, dim, 60);
  for (size_t i = 0; i < cluster_of.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      ASSERT_TRUE(cluster_of[i] != cluster_of[j] || i % 10 == j % 10);
    }
  }
}

TEST(KmeansTest, IsBetterThanAnyFixedCut) {
  const int dim = 24;
  const std::vector<float> points = RandomPoints(2000, dim, 9);
  std::vector<uint16_t> blocks;
  for (int i = 0; i < 2000; ++i) blocks.push_back(static_cast<uint16_t>(i / 20));
  const std::vector<uint16_t> clusters = AssignToClusters(points, dim, 100);
  EXPECT_LT(Spread(points, dim, clusters), 0.8 * Spread(points, dim, blocks));
}

TEST(KmeansTest, EqualPointsAreFine) {
  const std::vector<float> points(64 * 8, 2.5F);
  const std::vector<uint16_t> cluster_of = AssignToClusters(points, 8, 64);
  EXPECT_EQ(cluster_of.size(), 64U);
}

TEST(KmeansTest, CompactsNumbers) {
  std::vector<uint16_t> numbers = {9, 2, 2, 40000, 9};
  EXPECT_EQ(CompactNumbers(numbers), 3);
  EXPECT_THAT(numbers, testing::ElementsAre(1, 0, 0, 2, 1));
}

}  // namespace
}  // namespace kvseek::index
