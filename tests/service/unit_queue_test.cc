#include "service/unit_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace kvseek::service {
namespace {

/// Searches of one node.
class OneNodeQueue : public UnitQueue {
 public:
  OneNodeQueue(size_t searches, int workers) : UnitQueue(searches, {workers}) {
    for (size_t s = 0; s < searches; ++s) Add(0);
  }
};

TEST(UnitQueueTest, PiecesInTheOrderOfTheirSteps) {
  OneNodeQueue queue(3, 1);
  EXPECT_TRUE(queue.MayHaveUnits());
  for (const size_t search : {0U, 1U}) {
    const auto plan = queue.Take(0);
    ASSERT_TRUE(plan.has_value());
    EXPECT_EQ(plan->search, search);
    EXPECT_EQ(plan->piece, SearchUnit::kPlan);
  }
  EXPECT_EQ(queue.Open(1, 2, 100), 3) << "two pieces and a plan";
  EXPECT_EQ(queue.Open(0, 3, 4), 4) << "no more are counted";
  const auto expect_piece = [&](size_t search, int piece) {
    const auto unit = queue.Take(0);
    ASSERT_TRUE(unit.has_value());
    EXPECT_EQ(unit->search, search);
    EXPECT_EQ(unit->piece, piece);
  };
  expect_piece(1, 0);
  expect_piece(1, 1);
  expect_piece(0, 0);
  EXPECT_EQ(queue.Open(1, 1, 100), 4);  // its next step, behind the other's
  expect_piece(0, 1);
  EXPECT_EQ(queue.Finish(0), 2U);
  expect_piece(2, SearchUnit::kPlan);  // now there are fewer than two
  expect_piece(0, 2);
  expect_piece(1, 0);
  EXPECT_FALSE(queue.Take(0).has_value());
  EXPECT_FALSE(queue.MayHaveUnits());
  EXPECT_EQ(queue.Finish(1), 1U);
  EXPECT_EQ(queue.Finish(2), 0U);
}

TEST(UnitQueueTest, PlansGoOnWhereNothingElseIsLeft) {
  OneNodeQueue queue(5, 1);
  for (const size_t search : {0U, 1U, 2U}) {  // more than two: nobody has pieces
    EXPECT_EQ(queue.Take(0)->search, search);
  }
  queue.Open(0, 1, 100);
  EXPECT_EQ(queue.Take(0)->piece, 0);
  EXPECT_EQ(queue.Take(0)->search, 3U);
}

TEST(UnitQueueTest, OwnNodesUnitsFirst) {
  UnitQueue queue(4, {1, 1});
  for (const int node : {1, 0, 1, 2}) queue.Add(node);  // of two nodes, 2 is 0
  EXPECT_EQ(queue.Take(0)->search, 1U);
  EXPECT_EQ(queue.Take(0)->search, 3U);
  EXPECT_EQ(queue.Take(1)->search, 0U);
  queue.Open(0, 2, 100);
  queue.Open(1, 1, 100);
  const auto own = queue.Take(0);
  EXPECT_EQ(own->search, 1U);
  EXPECT_EQ(own->node, 0);
  const auto stolen = queue.Take(0);
  EXPECT_EQ(stolen->search, 2U) << "a plan before pieces, of the other node, too";
  EXPECT_EQ(stolen->node, 1);
  EXPECT_EQ(queue.Take(0)->search, 0U);
  EXPECT_EQ(queue.Take(1)->search, 0U);
  EXPECT_FALSE(queue.Take(1).has_value());
  EXPECT_EQ(queue.Finish(0), 3U);
}

TEST(UnitQueueTest, AStepOpensWhileTheLastIsStillListed) {
  OneNodeQueue queue(2, 1);
  queue.Take(0);
  queue.Take(0);
  for (int step = 0; step < 50; ++step) {  // each empties before the next, in both orders
    queue.Open(0, 1, 100);
    queue.Open(1, 1, 100);
    EXPECT_EQ(queue.Take(0)->search, 0U);
    if (step % 2 == 0) {
      EXPECT_EQ(queue.Open(0, 1, 100), 2);
      EXPECT_EQ(queue.Take(0)->search, 1U);
      EXPECT_EQ(queue.Take(0)->search, 0U);
    } else {
      EXPECT_EQ(queue.Take(0)->search, 1U);
    }
    EXPECT_FALSE(queue.Take(0).has_value());
  }
}

TEST(UnitQueueTest, SeveralPiecesTogetherWhereManySearchesAreLeft) {
  constexpr size_t kSearches = 32;
  OneNodeQueue queue(kSearches, 2);
  while (queue.Take(0).has_value()) {  // all plans: there is nothing else
  }
  std::vector<std::vector<int>> takes(kSearches);
  for (size_t s = 0; s < kSearches; ++s) {
    queue.Open(s, 6, 100);
    for (int piece = 0; piece < 6; piece += takes[s].back()) {
      const auto unit = queue.Take(0);
      ASSERT_TRUE(unit.has_value());
      EXPECT_EQ(unit->search, s);
      EXPECT_EQ(unit->piece, piece);
      takes[s].push_back(unit->pieces);
    }
    EXPECT_EQ(queue.Finish(s), kSearches - s - 1);
  }
  // 6 pieces of each that is left, in 8 takes of either worker.
  using testing::ElementsAre;
  EXPECT_THAT(takes[0], ElementsAre(4, 2));
  EXPECT_THAT(takes[32 - 11], ElementsAre(4, 2));
  EXPECT_THAT(takes[32 - 10], ElementsAre(3, 3));
  EXPECT_THAT(takes[32 - 6], ElementsAre(2, 2, 2));
  EXPECT_THAT(takes[32 - 5], ElementsAre(1, 1, 1, 1, 1, 1));
}

// Whoever runs a step's last piece opens the next. Each unit is taken once, and plans are bounded.
TEST(UnitQueueTest, ManyWorkers) {
  constexpr size_t kSearches = 200;
  constexpr int kSteps = 6;
  constexpr int kWorkers = 8;
  constexpr int kPlansMax = 10;
  const auto pieces_of = [](size_t search, int step) {
    return 1 + static_cast<int>(search * 7 + static_cast<size_t>(step) * 3) % 5;
  };
  struct Search {
    int step = -1;
    std::atomic<int> left{0};
    std::atomic<int> taken[kSteps]{};
  };
  OneNodeQueue queue(kSearches, kPlansMax / UnitQueue::kPlansOfWorker);
  std::vector<Search> searches(kSearches);
  std::atomic<int> plans{0};
  std::atomic<int> begun{0};
  std::atomic<int> begun_max{0};
  std::atomic<bool> several{false};
  std::atomic<bool> done{false};
  const auto next_step = [&](size_t s) {
    Search& search = searches[s];
    if (++search.step == kSteps) {
      begun.fetch_sub(1);
      if (queue.Finish(s) == 0) done.store(true);
      return;
    }
    const int pieces = pieces_of(s, search.step);
    search.left.store(pieces);
    EXPECT_GE(queue.Open(s, pieces, 1), 1);
  };
  std::vector<std::thread> workers;
  for (int w = 0; w < kWorkers; ++w) {
    workers.emplace_back([&] {
      while (!done.load()) {
        const auto unit = queue.Take(0);
        if (!unit.has_value()) continue;
        Search& search = searches[unit->search];
        if (unit->piece == SearchUnit::kPlan) {
          plans.fetch_add(1);
          const int now = begun.fetch_add(1) + 1;
          int known = begun_max.load();
          while (known < now && !begun_max.compare_exchange_weak(known, now)) {
          }
          next_step(unit->search);
          continue;
        }
        EXPECT_GE(unit->pieces, 1);
        EXPECT_LE(unit->piece + unit->pieces, pieces_of(unit->search, search.step));
        if (unit->pieces == UnitQueue::kTogetherMax) several.store(true);
        const int mask = ((1 << unit->pieces) - 1) << unit->piece;
        EXPECT_EQ(search.taken[search.step].fetch_or(mask) & mask, 0);
        if (search.left.fetch_sub(unit->pieces) == unit->pieces) next_step(unit->search);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  EXPECT_EQ(plans.load(), static_cast<int>(kSearches));
  EXPECT_TRUE(several.load());
  EXPECT_LE(begun_max.load(), kPlansMax);
  for (size_t s = 0; s < kSearches; ++s) {
    for (int step = 0; step < kSteps; ++step) {
      EXPECT_EQ(searches[s].taken[step].load(), (1 << pieces_of(s, step)) - 1);
    }
  }
}

}  // namespace
}  // namespace kvseek::service
