#include "service/strand.h"

#include <gtest/gtest.h>

#include <array>
#include <latch>
#include <random>
#include <vector>

namespace kvseek::service {
namespace {

DaemonOptions Workers(int workers) {
  DaemonOptions options;
  options.workers = workers;
  return options;
}

TEST(StrandTest, KeepsOrderWithoutHoldingWorkers) {
  ComputePool pool(Workers(4));
  std::vector<int> order;  // the strand is its lock
  std::latch release(1);
  std::latch all(1000);
  {
    Strand strand;  // may go before its jobs
    strand.Submit(pool, [&](index::Scratch&) { release.wait(); });
    for (int i = 0; i < 1000; ++i) {
      strand.Submit(pool, [&, i](index::Scratch&) {
        order.push_back(i);
        all.count_down();
      });
    }
  }
  std::latch other(1);
  pool.Submit([&](index::Scratch&) { other.count_down(); });
  other.wait();
  release.count_down();
  all.wait();
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(order[static_cast<size_t>(i)], i);
}

TEST(StrandTest, JobsOfSeveralStrandsKeepTheOrderOfEach) {
  constexpr int kRounds = 500;
  constexpr size_t kStrands = 8;
  ComputePool pool(Workers(4));
  std::array<Strand, kStrands> strands;
  std::array<std::vector<int>, kStrands> order;  // a strand is its list's lock
  std::latch all(kRounds * kStrands);
  std::mt19937 random(1);
  for (int round = 0; round < kRounds; ++round) {
    StrandJobs jobs;
    const size_t together = 1 + random() % kStrands;
    for (size_t s = 0; s < kStrands; ++s) {
      jobs.Add(strands[s], [&, s, round](index::Scratch&) {
        order[s].push_back(round);
        all.count_down();
      });
      if (jobs.size() == together) jobs.RunOn(pool);
    }
    if (jobs.size() > 0) jobs.RunOn(pool);
  }
  all.wait();
  for (const std::vector<int>& of_strand : order) {
    for (int round = 0; round < kRounds; ++round) {
      ASSERT_EQ(of_strand[static_cast<size_t>(round)], round);
    }
  }
}

}  // namespace
}  // namespace kvseek::service
