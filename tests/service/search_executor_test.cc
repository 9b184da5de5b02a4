#include "service/search_executor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <latch>
#include <new>
#include <random>
#include <thread>

#include "tests/service/two_nodes.h"

namespace kvseek::service {
namespace {

/// An index whose searches have `query.end` pieces and answer with a number made of all of them, in
/// their order.
class CountingIndex final : public index::KeyIndex {
 public:
  absl::string_view name() const override { return "counting"; }
  index::PlanPtr Plan(const index::KvView& view, const index::SearchQuery& query,
                      const index::SearchOptions&, index::Scratch&) const override {
    plans_.fetch_add(1);
    if (query.begin < 0) throw std::bad_alloc();
    if (on_unit) on_unit(view.shape.node);
    return index::MakePlan<CountingPlan>(*this, static_cast<int>(query.end), view.shape.node);
  }
  int plans() const { return plans_.load(); }
  int plans_alive_max() const { return alive_max_.load(); }
  int runs() const { return runs_.load(); }

  std::function<void()> on_run;
  std::function<void(int node)> on_unit;  ///< plans, too; with the node of its search
  int steps = 1;
  /// Of step `step`, after one of so many pieces.
  static size_t PiecesOfStep(size_t before, int step) {
    return (before + static_cast<size_t>(step)) % 4;
  }

 private:
  class CountingPlan final : public index::SearchPlan {
   public:
    CountingPlan(index::Scratch&, const CountingIndex& index, int pieces, int node)
        : index_(index), node_(node), values_(static_cast<size_t>(pieces)) {
      const int alive = index_.alive_.fetch_add(1) + 1;
      int known = index_.alive_max_.load();
      while (known < alive && !index_.alive_max_.compare_exchange_weak(known, alive)) {
      }
    }
    ~CountingPlan() override { index_.alive_.fetch_sub(1); }
    int pieces() const override { return static_cast<int>(values_.size()); }
    void Run(int piece, index::Scratch&) override {
      index_.runs_.fetch_add(1);
      if (index_.on_run) index_.on_run();
      if (index_.on_unit) index_.on_unit(node_);
      values_[static_cast<size_t>(piece)] = 100 * step_ + piece + 1;
    }
    bool NextStep(index::Scratch&) override {
      done_.insert(done_.end(), values_.begin(), values_.end());
      if (++step_ == index_.steps) return false;
      values_.assign(PiecesOfStep(values_.size(), step_), 0);
      return true;
    }
    void Finish(index::SearchResult& result, index::Scratch&) override {
      for (const int value : done_) result.positions.push_back(value);
    }

   private:
    const CountingIndex& index_;
    const int node_;
    int step_ = 0;
    std::vector<int> values_;  // of the step's pieces
    std::vector<int> done_;    // of the steps before
  };

  mutable std::atomic<int> plans_{0};
  mutable std::atomic<int> runs_{0};
  mutable std::atomic<int> alive_{0};
  mutable std::atomic<int> alive_max_{0};
};

class SearchExecutorTest : public testing::TestWithParam<int> {
 protected:
  explicit SearchExecutorTest(std::chrono::microseconds worker_spin = {},
                              const Topology& topology = OneNode()) {
    DaemonOptions options;
    options.workers = GetParam();
    options.worker_spin = worker_spin;
    pool_ = std::make_unique<ComputePool>(options, topology);
  }
  static GiveUp In(std::chrono::milliseconds time) {
    return {std::chrono::steady_clock::now() + time, std::make_shared<std::atomic<bool>>(false),
            std::make_shared<std::atomic<bool>>(false)};
  }
  std::vector<SearchTask> Tasks(const std::vector<int64_t>& pieces) {
    std::vector<SearchTask> tasks;
    for (const int64_t count : pieces) {
      tasks.push_back({&index_, {}, {nullptr, 1, std::min<int64_t>(count, 0), count}, {}});
    }
    return tasks;
  }
  absl::StatusOr<std::vector<index::SearchResult>> Run(const std::vector<SearchTask>& tasks,
                                                       GiveUp give_up) {
    absl::StatusOr<std::vector<index::SearchResult>> answer = absl::InternalError("");
    std::latch done(1);
    pool_->Submit([&](index::Scratch& scratch) {
      RunSearches(
          *pool_, tasks, std::move(give_up),
          [&](auto results, index::Scratch&) {
            if (results.ok()) {
              answer.emplace(results->begin(), results->end());
            } else {
              answer = results.status();
            }
            done.count_down();  // twice would abort
          },
          scratch);
    });
    done.wait();
    return answer;
  }

  CountingIndex index_;
  std::unique_ptr<ComputePool> pool_;
};

TEST_P(SearchExecutorTest, EveryResultHasItsSlot) {
  std::vector<int64_t> pieces;
  for (int64_t i = 0; i < 300; ++i) pieces.push_back(i % 7);
  index_.steps = 3;
  const auto results = Run(Tasks(pieces), In(std::chrono::minutes(1)));
  ASSERT_TRUE(results.ok()) << results.status();
  ASSERT_EQ(results->size(), 300U);
  for (size_t i = 0; i < 300; ++i) {
    std::vector<int64_t> expected;
    auto count = static_cast<size_t>(pieces[i]);
    for (int step = 0; step < 3; ++step) {
      if (step > 0) count = CountingIndex::PiecesOfStep(count, step);
      for (size_t p = 0; p < count; ++p) {
        expected.push_back(100 * step + static_cast<int64_t>(p) + 1);
      }
    }
    EXPECT_EQ((*results)[i].positions, expected);
  }
  EXPECT_LE(index_.plans_alive_max(), 2 * GetParam()) << "a batch must not hold all its plans";
  EXPECT_TRUE(Run({}, In(std::chrono::minutes(1)))->empty());
}

TEST_P(SearchExecutorTest, PlansOfTwoWavesComeFirst) {
  std::atomic<int> plans_min{1000};
  index_.on_run = [&] {
    int known = plans_min.load();
    const int plans = index_.plans();
    while (plans < known && !plans_min.compare_exchange_weak(known, plans)) {
    }
  };
  const int two_waves = 2 * GetParam();
  const std::vector<int64_t> pieces(static_cast<size_t>(two_waves), 3);
  ASSERT_TRUE(Run(Tasks(pieces), In(std::chrono::minutes(1))).ok());
  // All have been given out before a piece is; the other workers' may just not have begun.
  EXPECT_GE(plans_min.load(), two_waves - (GetParam() - 1));
}

TEST_P(SearchExecutorTest, DeadlineDropsWhatHasNotBegun) {
  EXPECT_EQ(Run(Tasks({1, 2}), In(std::chrono::milliseconds(0))).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(index_.plans(), 0);
  index_.on_run = [] { std::this_thread::sleep_for(std::chrono::milliseconds(5)); };
  EXPECT_EQ(Run(Tasks({1000, 1000}), In(std::chrono::milliseconds(50))).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_LT(index_.runs(), 200);
}

TEST_P(SearchExecutorTest, CancelAndStop) {
  GiveUp cancelled = In(std::chrono::minutes(1));
  index_.on_run = [flag = cancelled.cancelled] { flag->store(true); };
  EXPECT_EQ(Run(Tasks({1000}), cancelled).status().code(), absl::StatusCode::kCancelled);
  EXPECT_LE(index_.runs(), GetParam());
  GiveUp stopping = In(std::chrono::minutes(1));
  stopping.stopping = std::make_shared<std::atomic<bool>>(true);
  EXPECT_EQ(Run(Tasks({1}), stopping).status().code(), absl::StatusCode::kUnavailable);
}

TEST_P(SearchExecutorTest, OutOfMemoryIsAnAnswer) {
  EXPECT_EQ(Run(Tasks({3, -1, 3, 3}), In(std::chrono::minutes(1))).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST_P(SearchExecutorTest, RequestsShareTheWorkers) {
  index_.on_run = [] { std::this_thread::sleep_for(std::chrono::milliseconds(2)); };
  std::latch large(1);
  const std::vector<SearchTask> large_tasks = Tasks({400});
  pool_->Submit([&](index::Scratch& scratch) {
    RunSearches(
        *pool_, large_tasks, In(std::chrono::minutes(1)),
        [&](auto, index::Scratch&) { large.count_down(); }, scratch);
  });
  EXPECT_TRUE(Run(Tasks({1}), In(std::chrono::minutes(1))).ok());
  EXPECT_FALSE(large.try_wait()) << "the small request waited for the large one";
  large.wait();
}

TEST_P(SearchExecutorTest, CountsItsTime) {
  constexpr auto kUnit = std::chrono::milliseconds(3);
  index_.on_run = [kUnit] { std::this_thread::sleep_for(kUnit); };
  index_.steps = 2;
  ASSERT_TRUE(Run(Tasks({3, 2}), In(std::chrono::minutes(1))).ok());
  const SearchCounts::Totals totals = pool_->search_counts().Sum();
  EXPECT_EQ(totals.units_own_node, 2 + static_cast<uint64_t>(index_.runs()));
  EXPECT_EQ(totals.units_other_node, 0U);
  const auto of = [&](index::SearchPhase phase) { return totals.time[static_cast<size_t>(phase)]; };
  EXPECT_GE(of(index::SearchPhase::kScan), index_.runs() * kUnit);
  EXPECT_GT(of(index::SearchPhase::kPlan).count(), 0);
  EXPECT_GT(of(index::SearchPhase::kFinish).count(), 0);
  EXPECT_EQ(of(index::SearchPhase::kRefine).count(), 0);
}

TEST_P(SearchExecutorTest, WorkersThatDoNotComeAreNotWaitedFor) {
  const int others = GetParam() - 1;
  std::latch busy(others);
  std::latch release(1);
  for (int i = 0; i < others; ++i) {
    pool_->Submit([&](index::Scratch&) {
      busy.count_down();
      release.wait();
    });
  }
  busy.wait();
  const auto results = Run(Tasks({3, 2, 4, 1, 5}), In(std::chrono::seconds(20)));
  release.count_down();
  pool_.reset();  // before the latches
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_EQ(index_.runs(), 15);
}

INSTANTIATE_TEST_SUITE_P(Workers, SearchExecutorTest, testing::Values(1, 4));

/// Workers look for units that are not there yet.
class LookingExecutorTest : public SearchExecutorTest {
 protected:
  LookingExecutorTest() : SearchExecutorTest(std::chrono::microseconds(300)) {}
};

TEST_P(LookingExecutorTest, ManyShortSteps) {
  index_.steps = 40;
  for (int round = 0; round < 20; ++round) {
    const auto results = Run(Tasks({1, 4, 0, 3, 2}), In(std::chrono::minutes(1)));
    ASSERT_TRUE(results.ok()) << results.status();
    for (size_t i = 0; i < 5; ++i) {
      size_t count = std::vector<size_t>{1, 4, 0, 3, 2}[i];
      size_t all = count;
      for (int step = 1; step < 40; ++step) {
        all += count = CountingIndex::PiecesOfStep(count, step);
      }
      EXPECT_EQ((*results)[i].positions.size(), all);
    }
  }
}

TEST_P(LookingExecutorTest, GivesWay) {
  // One unit is under way, and nothing else of its run is there to be done meanwhile.
  std::latch begun(1);
  std::latch release(1);
  std::latch large(1);
  const std::vector<SearchTask> large_tasks = Tasks({1});
  index_.on_run = [&] {
    begun.count_down();
    release.wait();
  };
  pool_->Submit([&](index::Scratch& scratch) {
    RunSearches(
        *pool_, large_tasks, In(std::chrono::minutes(1)),
        [&](auto, index::Scratch&) { large.count_down(); }, scratch);
  });
  begun.wait();
  if (GetParam() > 1) {
    CountingIndex other;
    std::vector<SearchTask> tasks = Tasks({2, 2, 2, 2});
    for (SearchTask& task : tasks) task.index = &other;
    const auto start = std::chrono::steady_clock::now();
    EXPECT_TRUE(Run(tasks, In(std::chrono::minutes(1))).ok());
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  }
  release.count_down();
  large.wait();
}

INSTANTIATE_TEST_SUITE_P(Workers, LookingExecutorTest, testing::Values(1, 4));

TEST_P(LookingExecutorTest, GuestsOfThePoolTakeUnits) {
  const int all = GetParam() + 1;
  std::atomic<bool> stop{false};
  std::atomic<int> business{0};
  std::thread guest([&] {
    ComputePool::Guest self(*pool_, [&] { business.fetch_add(1); });
    while (!stop.load()) self.Help();
  });
  index_.steps = 5;
  // Until as many units are under way at once as there are workers and guests.
  std::atomic<int> at_once{0};
  std::atomic<int> most{0};
  index_.on_run = [&] {
    const int now = at_once.fetch_add(1) + 1;
    int known = most.load();
    while (known < now && !most.compare_exchange_weak(known, now)) {
    }
    std::this_thread::sleep_for(std::chrono::microseconds(300));
    at_once.fetch_sub(1);
  };
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (most.load() < all && std::chrono::steady_clock::now() < end) {
    const auto results = Run(Tasks({8, 9, 10}), In(std::chrono::minutes(1)));
    ASSERT_TRUE(results.ok()) << results.status();
    for (int i = 0; i < 3; ++i) EXPECT_EQ((*results)[static_cast<size_t>(i)].positions[0], 1);
  }
  EXPECT_EQ(most.load(), all);
  EXPECT_GT(business.load(), 0);
  stop.store(true);
  guest.join();
}

/// Searches of two nodes.
class NodesExecutorTest : public SearchExecutorTest {
 protected:
  NodesExecutorTest() : SearchExecutorTest(std::chrono::microseconds(100), TwoNodes()) {}

  std::vector<SearchTask> Tasks(const std::vector<int64_t>& pieces, const std::vector<int>& nodes) {
    std::vector<SearchTask> tasks = SearchExecutorTest::Tasks(pieces);
    for (size_t i = 0; i < tasks.size(); ++i) tasks[i].view.shape.node = nodes[i];
    return tasks;
  }
};

TEST_P(NodesExecutorTest, AWorkerTakesItsOwnNodesUnitsFirstAndThenOthers) {
  // All workers but one are kept busy.
  const int others = GetParam() - 1;
  std::latch busy(others);
  std::latch release(1);
  pool_->Submit(
      [&](index::Scratch&) {
        busy.count_down();
        release.wait();
      },
      others);
  busy.wait();
  std::vector<int> order;
  int own = -1;
  index_.on_unit = [&](int node) {
    own = ComputePool::CallersNode();
    order.push_back(node);
  };
  index_.steps = 2;
  const auto results =
      Run(Tasks({3, 2, 3, 2, 3, 2}, {1, 0, 0, 1, 1, 0}), In(std::chrono::seconds(20)));
  const uint64_t units_own = pool_->search_counts().Sum().units_own_node;
  const uint64_t units_other = pool_->search_counts().Sum().units_other_node;
  release.count_down();
  pool_.reset();  // before the latches
  ASSERT_TRUE(results.ok()) << results.status();
  const auto first_other = std::find(order.begin(), order.end(), 1 - own);
  const auto of_own = static_cast<size_t>(std::count(order.begin(), order.end(), own));
  EXPECT_EQ(static_cast<size_t>(first_other - order.begin()), of_own)
      << "one of the other node's units came before the last of its own";
  EXPECT_GT(of_own, 6U);
  EXPECT_LT(of_own, order.size()) << "nobody else would have taken the others";
  EXPECT_EQ(units_own, of_own);
  EXPECT_EQ(units_other, order.size() - of_own);
}

TEST_P(NodesExecutorTest, AllIsDoneWhereverItLies) {
  index_.steps = 5;
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<int64_t> pieces;
    std::vector<int> nodes;
    const int ones = static_cast<int>(random() % 3);  // half of them; all; none
    for (int i = 0; i < 40; ++i) {
      pieces.push_back(static_cast<int64_t>(random() % 5));
      nodes.push_back(ones == 0 ? static_cast<int>(random() % 2) : ones - 1);
    }
    const auto results = Run(Tasks(pieces, nodes), In(std::chrono::minutes(1)));
    ASSERT_TRUE(results.ok()) << results.status();
    for (size_t i = 0; i < pieces.size(); ++i) {
      auto count = static_cast<size_t>(pieces[i]);
      size_t all = count;
      for (int step = 1; step < 5; ++step) {
        all += count = CountingIndex::PiecesOfStep(count, step);
      }
      EXPECT_EQ((*results)[i].positions.size(), all);
    }
  }
  EXPECT_GT(pool_->search_counts().Sum().units_own_node, 0U);
  EXPECT_GT(pool_->search_counts().Sum().units_other_node, 0U);
}

TEST_P(NodesExecutorTest, ANodeThatThePoolDoesNotHaveIsOneOfIts) {
  EXPECT_TRUE(Run(Tasks({1, 2}, {7, 2}), In(std::chrono::minutes(1))).ok());
}

INSTANTIATE_TEST_SUITE_P(Workers, NodesExecutorTest, testing::Values(1, 2, 5));

}  // namespace
}  // namespace kvseek::service
