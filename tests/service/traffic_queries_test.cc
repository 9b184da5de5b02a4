#include "service/traffic_queries.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <vector>

#include "tests/kernels/reference.h"

namespace kvseek::service {
namespace {

using kernels::DType;

constexpr size_t kHeads = 3;
constexpr size_t kHeadElements = 2 * 8;
const std::vector<uint32_t> kAll = {0, 1, 2};

class TrafficQueriesTest : public testing::TestWithParam<DType> {
 protected:
  static TrafficQueries::Shape Shape() { return {kHeads, 2, 8, GetParam()}; }
  /// What token `position` of this test asks with, for all heads.
  static std::vector<float> QueriesAt(int64_t position) {
    return reference::RandomFloats(static_cast<uint32_t>(position), kHeads * kHeadElements, 2.0F);
  }
  static std::vector<uint16_t> Rounded(int64_t position) {
    std::vector<uint16_t> rows;
    for (const float query : QueriesAt(position)) {
      rows.push_back(reference::Round(query, GetParam()));
    }
    return rows;
  }
  std::optional<TrafficQueries::Batch> Ask(int64_t position,
                                           const std::vector<uint32_t>& heads = kAll) {
    const std::vector<float> all = QueriesAt(position);
    std::vector<float> some;
    for (const uint32_t head : heads) {
      const auto row = all.begin() + static_cast<ptrdiff_t>(head * kHeadElements);
      some.insert(some.end(), row, row + kHeadElements);
    }
    return traffic_.Add({position, heads, some.data()}, Shape(), budget_);
  }

  MemoryBudget budget_{1 << 20, std::chrono::milliseconds(1)};
  TrafficQueries traffic_;
};

INSTANTIATE_TEST_SUITE_P(DTypes, TrafficQueriesTest, testing::Values(DType::kBf16, DType::kFp16));

TEST_P(TrafficQueriesTest, TakesOneOfEightPositions) {
  std::vector<uint64_t> expected;
  std::vector<uint16_t> rows;
  std::optional<TrafficQueries::Batch> batch;
  int64_t position = 100;
  for (; !batch.has_value(); ++position) {
    ASSERT_LT(position, 1000);
    batch = Ask(position);
    if (position == 100 || position % 8 == 0) {
      expected.push_back(static_cast<uint64_t>(position));
      const std::vector<uint16_t> rounded = Rounded(position);
      rows.insert(rows.end(), rounded.begin(), rounded.end());
    }
  }
  EXPECT_EQ(batch->positions.size(), TrafficQueries::kBatchTokens);
  EXPECT_EQ(batch->positions, expected);
  EXPECT_EQ(batch->rows, rows);
  EXPECT_EQ(batch->memory.bytes(), budget_.used_bytes());
  batch.reset();
  EXPECT_EQ(budget_.used_bytes(), 0U);
  EXPECT_FALSE(Ask(position).has_value()) << "the last stretch has been taken";
  EXPECT_EQ(budget_.used_bytes(), 0U);
}

TEST_P(TrafficQueriesTest, HeadsMayComeInSeveralRequests) {
  std::optional<TrafficQueries::Batch> batch;
  std::vector<uint64_t> expected;
  for (int64_t position = 0; !batch.has_value(); position += 16) {
    ASSERT_LT(position, 10000);
    EXPECT_FALSE(Ask(position, {1}).has_value());
    if (position % 48 == 0) continue;  // the others never come
    EXPECT_FALSE(Ask(position, {1}).has_value());
    batch = Ask(position, {0, 2});
    expected.push_back(static_cast<uint64_t>(position));
  }
  EXPECT_EQ(batch->positions, expected);
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto row = batch->rows.begin() + static_cast<ptrdiff_t>(i * kHeads * kHeadElements);
    EXPECT_EQ(std::vector<uint16_t>(row, row + kHeads * kHeadElements),
              Rounded(static_cast<int64_t>(expected[i])));
  }
}

TEST_P(TrafficQueriesTest, WithoutMemoryNothingIsTaken) {
  auto all = budget_.Reserve(budget_.limit_bytes(), "");
  ASSERT_TRUE(all.ok());
  for (int64_t position = 0; position < 400; position += 8) {
    EXPECT_FALSE(Ask(position).has_value());
  }
  { const MemoryBudget::Reservation given_back = *std::move(all); }
  size_t batches = 0;
  for (int64_t position = 400; position < 800; position += 8) {
    batches += Ask(position).has_value() ? 1 : 0;
  }
  EXPECT_EQ(batches, 3U);
}

}  // namespace
}  // namespace kvseek::service
