#include "service/compute_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <latch>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "proto/status_code.h"
#include "tests/service/two_nodes.h"

namespace kvseek::service {
namespace {

DaemonOptions Workers(int workers, std::chrono::microseconds spin = {}) {
  DaemonOptions options;
  options.workers = workers;
  options.worker_spin = spin;
  options.queue_limit = 3;
  return options;
}

/// The parameter: how long workers look for jobs before they sleep.
class ComputePoolTest : public testing::TestWithParam<std::chrono::microseconds> {
 protected:
  static DaemonOptions Workers(int workers) { return service::Workers(workers, GetParam()); }
};

TEST_P(ComputePoolTest, RunsManyJobsOnce) {
  constexpr int kJobs = 10000;
  std::vector<std::atomic<int>> runs(kJobs);
  {
    ComputePool pool(Workers(4));
    EXPECT_EQ(pool.workers(), 4);
    for (int i = 0; i < kJobs; ++i) {
      pool.Submit([&runs, i](index::Scratch& scratch) {
        scratch.Take<char>(100)[0] = 1;
        runs[static_cast<size_t>(i)].fetch_add(1);
      });
    }
  }
  for (const auto& count : runs) EXPECT_EQ(count.load(), 1);
}

TEST_P(ComputePoolTest, DestructionRunsWhatIsQueuedAndWhatThatSubmits) {
  std::atomic<int> runs{0};
  {
    ComputePool pool(Workers(1));
    std::latch go(1);
    pool.Submit([&](index::Scratch&) { go.wait(); });
    for (int i = 0; i < 100; ++i) {
      pool.Submit([&](index::Scratch&) {
        runs.fetch_add(1);
        pool.Submit([&](index::Scratch&) { runs.fetch_add(1); });
      });
    }
    go.count_down();
  }
  EXPECT_EQ(runs.load(), 200);
}

TEST_P(ComputePoolTest, AdmitsUpToTheLimit) {
  ComputePool pool(Workers(1));
  auto a = pool.Admit();
  auto b = pool.Admit();
  {
    auto c = pool.Admit();
    ASSERT_TRUE(c.ok());
    EXPECT_EQ(pool.requests(), 3U);
    const auto refused = pool.Admit();
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_GT(proto::RetryAfterMs(refused.status()), 0U);
  }
  EXPECT_EQ(pool.requests(), 2U);
  EXPECT_TRUE(pool.Admit().ok());
}

TEST_P(ComputePoolTest, ForEachDoesAllBeforeItReturns) {
  ComputePool pool(Workers(4));
  for (int round = 0; round < 200; ++round) {
    std::latch done(1);
    pool.Submit([&](index::Scratch& scratch) {
      std::vector<std::atomic<int>> runs(37);
      pool.ForEach(
          37, [&](int i, index::Scratch&) { runs[static_cast<size_t>(i)].fetch_add(1); }, scratch);
      for (const auto& count : runs) EXPECT_EQ(count.load(), 1);
      pool.ForEach(
          0, [](int, index::Scratch&) { FAIL(); }, scratch);
      done.count_down();
    });
    done.wait();
  }
}

TEST_P(ComputePoolTest, ForEachUsesIdleWorkersAndNeverWaitsForBusyOnes) {
  ComputePool pool(Workers(3));
  std::latch release(1);
  std::latch busy(1);
  pool.Submit([&](index::Scratch&) {
    busy.count_down();
    release.wait();
  });
  busy.wait();
  std::latch done(1);
  std::atomic<bool> together{false};
  pool.Submit([&](index::Scratch& scratch) {
    for (int attempt = 0; attempt < 500 && !together; ++attempt) {  // the third may not idle yet
      std::atomic<int> here{0};
      pool.ForEach(
          2,
          [&](int, index::Scratch&) {
            here.fetch_add(1);
            for (int i = 0; i < 10 && here.load() < 2; ++i) {
              std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
            if (here.load() == 2) together = true;
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            here.fetch_sub(1);
          },
          scratch);
    }
    done.count_down();
  });
  done.wait();
  EXPECT_TRUE(together);
  release.count_down();
}

TEST_P(ComputePoolTest, ForEachRethrows) {
  ComputePool pool(Workers(2));
  std::latch done(1);
  pool.Submit([&](index::Scratch& scratch) {
    std::atomic<int> runs{0};
    EXPECT_THROW(pool.ForEach(
                     8,
                     [&](int i, index::Scratch&) {
                       runs.fetch_add(1);
                       if (i == 3) throw std::runtime_error("three");
                     },
                     scratch),
                 std::runtime_error);
    EXPECT_EQ(runs.load(), 8);
    done.count_down();
  });
  done.wait();
}

TEST_P(ComputePoolTest, EveryJobFindsAWorkerWhateverWorkersDoJustThen) {
  constexpr int kRounds = 3000;
  ComputePool pool(Workers(4));
  std::mt19937 random(5);
  for (int round = 0; round < kRounds; ++round) {
    const int copies = 1 + static_cast<int>(random() % 6);
    std::latch done(copies + 1);
    pool.Submit([&](index::Scratch&) { done.count_down(); });
    if (random() % 4 == 0) std::this_thread::yield();
    pool.Submit([&](index::Scratch&) { done.count_down(); }, copies);
    done.wait();
    EXPECT_FALSE(pool.Crowded());
    // Until workers are about to sleep, or asleep.
    if (random() % 8 == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 400));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Spins, ComputePoolTest,
                         testing::Values(std::chrono::microseconds(0),
                                         std::chrono::microseconds(200)),
                         [](const auto& spin) {
                           return std::to_string(spin.param.count()) + "us";
                         });

/// A thread that is a guest until the object goes.
class GuestThread {
 public:
  explicit GuestThread(ComputePool& pool)
      : thread_([this, &pool] {
          ComputePool::Guest guest(pool, [this] { business_.fetch_add(1); });
          while (!stopping_.load()) {
            if (guest.Help()) helped_.fetch_add(1);
          }
        }) {}
  ~GuestThread() {
    stopping_.store(true);
    thread_.join();
  }
  std::thread::id id() const { return thread_.get_id(); }
  int helped() const { return helped_.load(); }
  int business() const { return business_.load(); }

 private:
  std::atomic<bool> stopping_{false};
  std::atomic<int> helped_{0};
  std::atomic<int> business_{0};
  std::thread thread_;
};

/// Invites until somebody comes: a guest that the system has put aside is not invited.
void InviteOne(ComputePool& pool, const ComputePool::Job& job) {
  while (pool.Invite(job, 1) == 0) std::this_thread::yield();
}

TEST(ComputePoolGuests, AGuestRunsWhatItIsInvitedToAndSeesToItsBusiness) {
  ComputePool pool(Workers(1));
  GuestThread guest(pool);
  for (int round = 0; round < 100; ++round) {
    std::latch done(1);
    InviteOne(pool, [&](index::Scratch& scratch) {
      scratch.Take<char>(100)[0] = 1;
      EXPECT_EQ(std::this_thread::get_id(), guest.id());
      EXPECT_EQ(ComputePool::CallersWorker(), 1U);
      const int before = guest.business();
      EXPECT_FALSE(pool.Wanted());
      EXPECT_EQ(guest.business(), before + 1);
      done.count_down();
    });
    done.wait();
  }
  while (guest.helped() < 100) std::this_thread::yield();
  EXPECT_EQ(guest.business(), 100);
}

TEST(ComputePoolGuests, JobsOfThePoolAreNotForThem) {
  ComputePool pool(Workers(1, std::chrono::microseconds(200)));
  GuestThread guest(pool);
  while (pool.GuestsLooking() == 0) std::this_thread::yield();
  for (int round = 0; round < 100; ++round) {
    std::latch done(3);
    pool.Submit(
        [&](index::Scratch&) {
          EXPECT_NE(std::this_thread::get_id(), guest.id());
          EXPECT_FALSE(pool.Wanted() && !pool.Crowded());
          done.count_down();
        },
        3);
    done.wait();
  }
  EXPECT_EQ(guest.helped(), 0);
}

TEST(ComputePoolGuests, OneThatHasLeftIsNotInvited) {
  ComputePool pool(Workers(1));
  ComputePool::Guest guest(pool, [] {});
  EXPECT_EQ(pool.GuestsLooking(), 0);  // before it helps
  int runs = 0;
  const auto job = [&](index::Scratch&) { ++runs; };
  EXPECT_EQ(pool.Invite(job, 1), 0);
  // Invited at once, so that it has looked a moment ago, it runs the job when it leaves.
  for (int invited = 0; invited == 0; guest.Leave()) {
    EXPECT_FALSE(guest.Help());
    EXPECT_EQ(pool.GuestsLooking(), 1);
    invited = pool.Invite(job, 5);
    EXPECT_EQ(runs, 0);
  }
  EXPECT_EQ(runs, 1);
  EXPECT_EQ(pool.GuestsLooking(), 0);
  EXPECT_EQ(pool.Invite(job, 1), 0);
  guest.Help();
  std::this_thread::sleep_for(std::chrono::milliseconds(5));  // it does not look meanwhile
  EXPECT_EQ(pool.Invite(job, 1), 0);
  EXPECT_EQ(runs, 1);
}

TEST(ComputePoolGuests, ThereIsRoomForSoManyThreadsAsADaemonHas) {
  DaemonOptions options = Workers(1);
  options.io_threads = 2;
  ComputePool pool(options);
  std::vector<std::unique_ptr<ComputePool::Guest>> guests;
  for (int i = 0; i < 5; ++i) {
    guests.push_back(std::make_unique<ComputePool::Guest>(pool, [] {}));
    EXPECT_FALSE(guests.back()->Help());
    EXPECT_EQ(pool.GuestsLooking(), std::min(i + 1, 3));  // and the thread of doorbells
  }
  for (const auto& guest : guests) guest->Leave();
  EXPECT_EQ(pool.GuestsLooking(), 0);
}

TEST(ComputePoolNodes, WorkersHaveTheirShareOfEachNodeAndStayThere) {
  EXPECT_EQ(ComputePool::CallersNode(), 0);
  const Topology topology = TwoNodes();
  DaemonOptions options = Workers(5);
  for (const bool pin : {false, true}) {
    options.pin_workers = pin;
    ComputePool pool(options, topology);
    ASSERT_EQ(pool.nodes(), 2);
    EXPECT_EQ(pool.workers_of_nodes()[0], 3);
    EXPECT_EQ(pool.workers_of_nodes()[1], 2);
    std::array<std::atomic<int>, 2> seen{};
    std::latch all(5);  // so that each worker has one of the jobs
    pool.Submit(
        [&](index::Scratch&) {
          const auto node = static_cast<size_t>(ComputePool::CallersNode());
          EXPECT_EQ(AllowedCpus(), topology[node].cpus);
          seen[node].fetch_add(1);
          all.arrive_and_wait();
        },
        5);
    all.wait();
    EXPECT_EQ(seen[0].load(), 3);
    EXPECT_EQ(seen[1].load(), 2);
  }
}

TEST(ComputePoolNodes, OneWorkerACpuThatTheProcessMayUse) {
  EXPECT_EQ(ComputePool(Workers(0), {{0, {0, 1, 2}}, {3, {5}}}).workers(), 4);
  const ComputePool pool(Workers(0), {{0, {0}}, {3, {4, 5, 6}}});
  EXPECT_EQ(pool.workers_of_nodes()[0], 1);
  EXPECT_EQ(pool.workers_of_nodes()[1], 3);
  EXPECT_EQ(ComputePool(Workers(0)).workers(), static_cast<int>(AllowedCpus().size()));
  EXPECT_GE(ComputePool(Workers(0), OneNode({})).workers(), 1) << "not known";
}

TEST(ComputePoolNodes, WorkersOfOneNodeRunWhereTheProcessMay) {
  ComputePool pool(Workers(1));
  std::vector<int> cpus;
  std::latch done(1);
  pool.Submit([&](index::Scratch&) {
    cpus = AllowedCpus();
    done.count_down();
  });
  done.wait();
  EXPECT_EQ(cpus, AllowedCpus());
}

}  // namespace
}  // namespace kvseek::service
