#include "service/memory_budget.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "proto/status_code.h"

namespace kvseek::service {
namespace {

TEST(MemoryBudgetTest, NeverPassesItsLimit) {
  MemoryBudget budget(100, std::chrono::milliseconds(50));
  auto first = budget.Reserve(60, "a");
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(budget.used_bytes(), 60U);
  const auto refused = budget.Reserve(41, "b");
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(proto::ErrorField(refused.status()), "b");
  EXPECT_EQ(proto::RetryAfterMs(refused.status()), 50U);
  EXPECT_EQ(budget.used_bytes(), 60U);
  EXPECT_TRUE(budget.Reserve(40, "c").ok());
  EXPECT_FALSE(budget.Reserve(~uint64_t{0}, "d").ok());
  EXPECT_FALSE(budget.Check(41, "e").ok());
  EXPECT_TRUE(budget.Check(40, "f").ok());
}

TEST(MemoryBudgetTest, GivesBackWithTheReservation) {
  MemoryBudget budget(100, std::chrono::milliseconds(50));
  {
    auto reserved = budget.Reserve(30, "");
    MemoryBudget::Reservation moved = *std::move(reserved);
    MemoryBudget::Reservation assigned;
    assigned = std::move(moved);
    EXPECT_EQ(assigned.bytes(), 30U);
    // NOLINTNEXTLINE(bugprone-use-after-move,clang-analyzer-cplusplus.Move): that is the question.
    EXPECT_EQ(moved.bytes(), 0U);
    EXPECT_EQ(budget.used_bytes(), 30U);
  }
  EXPECT_EQ(budget.used_bytes(), 0U);
}

TEST(MemoryBudgetTest, GrantIsTakenFirstAndTheBudgetNext) {
  MemoryBudget budget(100, std::chrono::milliseconds(50));
  {
    auto grant = MemoryGrant::Make(budget, 50, "payload");
    ASSERT_TRUE(grant.ok());
    const auto first = grant->Take(20);
    EXPECT_EQ(budget.used_bytes(), 50U);
    MemoryGrant half = grant->Split(15);
    const auto second = half.Take(35);
    ASSERT_TRUE(second.ok());
    EXPECT_EQ(second->bytes(), 35U);
    EXPECT_EQ(budget.used_bytes(), 70U);
    const auto refused = grant->Take(46);
    EXPECT_EQ(proto::ErrorField(refused.status()), "payload");
    EXPECT_EQ(first->bytes(), 20U);
  }
  EXPECT_EQ(budget.used_bytes(), 0U);
}

TEST(MemoryBudgetTest, CountsExactlyUnderContention) {
  MemoryBudget budget(1000, std::chrono::milliseconds(50));
  std::atomic<bool> passed{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 5000; ++i) {
        const auto reserved = budget.Reserve(300, "");
        if (budget.used_bytes() > 1000) passed = true;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(passed);
  EXPECT_EQ(budget.used_bytes(), 0U);
}

}  // namespace
}  // namespace kvseek::service
