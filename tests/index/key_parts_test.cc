#include "index/key_parts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "tests/index/random_trace.h"

namespace kvseek::index {
namespace {

/// A random part for each of `tokens` keys, none of them empty.
std::vector<uint16_t> RandomParts(int64_t tokens, int count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint16_t> part_of;
  for (int64_t i = 0; i < tokens; ++i) {
    part_of.push_back(
        static_cast<uint16_t>(i < count ? i : static_cast<int64_t>(random() % count)));
  }
  std::shuffle(part_of.begin(), part_of.end(), random);
  return part_of;
}

double Element(const std::vector<uint16_t>& rows, kernels::DType dtype, int64_t row, int dim,
               int d) {
  return kernels::LoadElement(rows.data(), dtype, static_cast<size_t>(row * dim + d));
}

void ExpectSummariesOfMembers(const TraceShape& shape, int64_t begin, int64_t tokens, int count) {
  const cli::HeadTrace trace = RandomTrace(shape);
  const cli::StoredHead head(trace, 2);
  const std::vector<uint16_t> part_of = RandomParts(tokens, count, shape.seed);
  const auto parts = KeyParts::Make(head.view(), begin, part_of, count, /*bounds=*/true);
  ASSERT_EQ(parts->begin(), begin);
  ASSERT_EQ(parts->end(), begin + tokens);
  ASSERT_EQ(parts->count(), count);
  int64_t members = 0;
  for (int p = 0; p < count; ++p) {
    const auto part = parts->Members(p);
    members += static_cast<int64_t>(part.size());
    ASSERT_FALSE(part.empty());
    EXPECT_TRUE(std::is_sorted(part.begin(), part.end()));
    for (const uint16_t member : part) ASSERT_EQ(part_of[member], p);
    const auto size = static_cast<double>(part.size());
    for (int d = 0; d < trace.key_dim; ++d) {
      double sum = 0.0;
      double squares = 0.0;
      double low = 1e30;
      double high = -1e30;
      for (const uint16_t member : part) {
        const double x = Element(trace.keys, trace.dtype, begin + member, trace.key_dim, d);
        sum += x;
        squares += x * x;
        low = std::min(low, x);
        high = std::max(high, x);
      }
      const auto at = static_cast<size_t>(p * trace.key_dim + d);
      const double mean = sum / size;
      ASSERT_NEAR(parts->mean_keys()[at], mean, 1e-5 * (1.0 + std::abs(mean)));
      const double variance = squares / size - mean * mean;
      ASSERT_NEAR(kernels::Bf16ToFloat(parts->key_variances()[at]), variance,
                  0.005 * variance + 1e-5);
      const double lower = kernels::Bf16ToFloat(parts->lower()[at]);
      const double upper = kernels::Bf16ToFloat(parts->upper()[at]);
      ASSERT_LE(lower, low);
      ASSERT_GE(upper, high);
      ASSERT_NEAR(lower, low, 0.01 * std::abs(low));
      ASSERT_NEAR(upper, high, 0.01 * std::abs(high));
    }
    for (int d = 0; d < trace.value_dim; ++d) {
      double mean = 0.0;
      for (const uint16_t member : part) {
        mean += Element(trace.values, trace.dtype, begin + member, trace.value_dim, d) / size;
      }
      ASSERT_NEAR(
          kernels::Bf16ToFloat(parts->mean_values()[static_cast<size_t>(p * trace.value_dim + d)]),
          mean, 0.005 * std::abs(mean) + 1e-5);
    }
  }
  EXPECT_EQ(members, tokens);
}

TEST(KeyPartsTest, SummariesAreThoseOfTheMembers) {
  ExpectSummariesOfMembers({.tokens = 1100, .seed = 3}, 0, 1024, 40);
  ExpectSummariesOfMembers({.tokens = 3500, .key_dim = 80, .value_dim = 24, .seed = 4}, 1024, 2048,
                           7);
  ExpectSummariesOfMembers({.tokens = 2048, .dtype = kernels::DType::kFp16, .seed = 5}, 1024, 1024,
                           1024);
  ExpectSummariesOfMembers({.tokens = 1024, .key_dim = 8, .value_dim = 8, .seed = 6}, 0, 1024, 1);
}

TEST(KeyPartsTest, BoundsAreLeftOutUnlessAskedFor) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 1024});
  const cli::StoredHead head(trace, 2);
  const std::vector<uint16_t> one(1024, 0);
  const auto without = KeyParts::Make(head.view(), 0, one, 1, /*bounds=*/false);
  const auto with = KeyParts::Make(head.view(), 0, one, 1, /*bounds=*/true);
  EXPECT_FALSE(without->has_bounds());
  EXPECT_TRUE(with->has_bounds());
  EXPECT_EQ(with->Bytes() - without->Bytes(), 2U * 64U * sizeof(uint16_t));
}

}  // namespace
}  // namespace kvseek::index
