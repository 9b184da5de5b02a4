#include "index/key_parts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "tests/index/double_attention.h"
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

/// Moments and bounds against the scores of each part's members.
void ExpectMomentsOfScores(const cli::HeadTrace& trace, const KeyParts& parts) {
  const KvShape shape = {.key_dim = trace.key_dim,
                         .value_dim = trace.value_dim,
                         .dtype = trace.dtype,
                         .softmax_scale = trace.softmax_scale};
  const PartQueries queries({trace.StepQueries(0), trace.group}, shape, *parts.basis());
  const int count = parts.count();
  const auto size = static_cast<size_t>(trace.group) * count;
  std::vector<float> means(size);
  std::vector<float> variances(size);
  std::vector<float> bounds(size);
  std::vector<float> work(size);
  parts.ScoreMoments(queries, 0, count, means.data(), variances.data(), count);
  parts.UpperBounds(queries, 0, count, bounds.data(), work.data(), count);
  for (int h = 0; h < trace.group; ++h) {
    double true_spread = 0.0;
    double spread = 0.0;
    for (int p = 0; p < count; ++p) {
      const auto at = static_cast<size_t>(h * count + p);
      const auto members = parts.Members(p);
      double sum = 0.0;
      double squares = 0.0;
      for (const uint16_t member : members) {
        const double score = ScoreOf(trace, 0, h, parts.begin() + member);
        sum += score;
        squares += score * score;
        ASSERT_LE(score, bounds[at] + parts.RoundingMargin(queries, h));
      }
      const auto keys = static_cast<double>(members.size());
      ASSERT_NEAR(means[at], sum / keys, 1e-4);
      true_spread += squares - sum * sum / keys;
      spread += keys * variances[at];
      if (members.size() > 1) continue;
      ASSERT_NEAR(variances[at], 0.0, 1e-6);
      ASSERT_NEAR(bounds[at], means[at], 0.3);  // 128 elements rounded to bf16
    }
    EXPECT_NEAR(spread, true_spread, 0.01 * true_spread + 1e-4) << "head " << h;
    EXPECT_LT(parts.RoundingMargin(queries, h), 1e-2);
  }
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
      for (const uint16_t member : part) {
        sum += Element(trace.keys, trace.dtype, begin + member, trace.key_dim, d);
      }
      const auto at = static_cast<size_t>(p * trace.key_dim + d);
      const double mean = sum / size;
      ASSERT_NEAR(parts->mean_keys()[at], mean, 1e-5 * (1.0 + std::abs(mean)));
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
  ExpectMomentsOfScores(trace, *parts);
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
  EXPECT_GT(with->Bytes(), without->Bytes());
  EXPECT_EQ(with->SummaryBytes() - without->SummaryBytes(), 2U * 64U * sizeof(uint16_t));
}

}  // namespace
}  // namespace kvseek::index
