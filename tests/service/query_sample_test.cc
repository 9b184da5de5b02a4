#include "service/query_sample.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "tests/kernels/reference.h"

namespace kvseek::service {
namespace {

constexpr size_t kKvHeads = 2;
constexpr size_t kGroup = 3;
constexpr size_t kKeyDim = 8;
constexpr size_t kElements = kKvHeads * kGroup * kKeyDim;

class QuerySampleTest : public testing::Test {
 protected:
  // Queries whose first element tells their position.
  std::shared_ptr<const QuerySample> Add(const std::shared_ptr<const QuerySample>& sample,
                                         const std::vector<uint64_t>& positions, float mark = 0) {
    std::vector<uint16_t> rows;
    for (const uint64_t position : positions) {
      for (size_t e = 0; e < kElements; ++e) {
        rows.push_back(kernels::FloatToBf16(e % kKeyDim == 0   ? static_cast<float>(position % 256)
                                            : e % kKeyDim == 1 ? static_cast<float>(e / kKeyDim)
                                                               : mark));
      }
    }
    auto more = sample->With({positions, rows.data()}, budget_);
    EXPECT_TRUE(more.ok()) << more.status();
    return more.ok() ? *more : nullptr;
  }

  MemoryBudget budget_{uint64_t{16} << 20, std::chrono::milliseconds(1)};
  std::shared_ptr<const QuerySample> empty_ = std::make_shared<QuerySample>(kElements);
};

TEST_F(QuerySampleTest, KeepsPositionsAndQueriesTogether) {
  const auto first = Add(empty_, {3, 9, 40});
  const auto second = Add(first, {5, 9, 41}, 7.0F);
  EXPECT_EQ(first->positions(), (std::vector<int64_t>{3, 9, 40}));
  EXPECT_EQ(second->positions(), (std::vector<int64_t>{3, 5, 9, 40, 41}));
  for (size_t head = 0; head < kKvHeads; ++head) {
    const auto queries = second->OfHead(head, kGroup, kKeyDim, kernels::DType::kBf16);
    ASSERT_EQ(queries.size(), second->positions().size() * kGroup * kKeyDim);
    for (size_t i = 0; i < second->positions().size(); ++i) {
      for (size_t g = 0; g < kGroup; ++g) {
        const float* const row = queries.data() + (i * kGroup + g) * kKeyDim;
        EXPECT_EQ(row[0], static_cast<float>(second->positions()[i]));
        EXPECT_EQ(row[1], static_cast<float>(head * kGroup + g));
        // What came first stays.
        EXPECT_EQ(row[2], second->positions()[i] == 5 || second->positions()[i] == 41 ? 7.0F : 0);
      }
    }
  }
}

TEST_F(QuerySampleTest, IsBoundedAndEven) {
  auto sample = empty_;
  constexpr uint64_t kTokens = 40000;
  for (uint64_t begin = 0; begin < kTokens; begin += 500) {
    std::vector<uint64_t> positions;
    for (uint64_t p = begin; p < begin + 500; p += 5) positions.push_back(p);
    sample = Add(sample, positions);
  }
  ASSERT_EQ(sample->positions().size(), kQuerySampleMax);
  EXPECT_TRUE(std::is_sorted(sample->positions().begin(), sample->positions().end()));
  // A quarter of the sequence has a quarter of the sample: 256, standard deviation 13.
  for (uint64_t quarter = 0; quarter < 4; ++quarter) {
    const auto count =
        std::count_if(sample->positions().begin(), sample->positions().end(),
                      [&](int64_t p) { return static_cast<uint64_t>(p) * 4 / kTokens == quarter; });
    EXPECT_NEAR(static_cast<double>(count), 256.0, 60.0) << quarter;
  }
}

TEST_F(QuerySampleTest, IsCutWithItsSequenceAndSharedWhereItCan) {
  const auto sample = Add(empty_, {3, 9, 40});
  EXPECT_EQ(*QuerySample::Below(sample, 41, budget_), sample);
  EXPECT_EQ((*QuerySample::Below(sample, 40, budget_))->positions(), (std::vector<int64_t>{3, 9}));
  EXPECT_TRUE((*QuerySample::Below(sample, 0, budget_))->positions().empty());
  EXPECT_EQ(*QuerySample::Below(nullptr, 5, budget_), nullptr);
}

TEST_F(QuerySampleTest, TakesMemoryFromTheBudgetAndGivesItBack) {
  {
    const auto sample = Add(empty_, {1, 2, 3});
    EXPECT_GE(budget_.used_bytes(), 3 * kElements * sizeof(uint16_t));
    MemoryBudget small(64, std::chrono::milliseconds(1));
    const std::vector<uint64_t> positions = {1};
    const std::vector<uint16_t> rows(kElements);
    const auto refused = empty_->With({positions, rows.data()}, small);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  }
  EXPECT_EQ(budget_.used_bytes(), 0U);
}

}  // namespace
}  // namespace kvseek::service
