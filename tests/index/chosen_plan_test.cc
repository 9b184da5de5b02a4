#include "index/chosen_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "cli/evaluation.h"
#include "tests/index/chosen_subject.h"

namespace kvseek::index {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void ExpectState(const ChosenSubject& subject, const SearchResult& result, int head,
                 const DoubleState& truth) {
  const int dim = subject.trace().value_dim;
  const std::vector<double> out = truth.Out();
  EXPECT_LE(
      cli::OutputError(result.out.data() + static_cast<ptrdiff_t>(head) * dim, out.data(), dim),
      5e-5)
      << "head " << head;
  if (truth.Mass() > 0.0) {
    EXPECT_NEAR(result.lse[static_cast<size_t>(head)], truth.Lse(), 5e-5) << "head " << head;
  } else {
    EXPECT_EQ(result.lse[static_cast<size_t>(head)], -kInfinity);
  }
}

std::vector<ChosenSubject> Subjects() {
  std::vector<ChosenSubject> subjects;
  subjects.emplace_back(TraceShape{.group = 6, .seed = 11}, ChosenSizes{});
  subjects.emplace_back(TraceShape{.tokens = 2048, .key_dim = 80, .value_dim = 24, .group = 1},
                        ChosenSizes{.end = 2048, .share = 0.9});
  subjects.emplace_back(
      TraceShape{.tokens = 3100, .group = 7, .dtype = kernels::DType::kFp16, .seed = 12},
      ChosenSizes{.parts = 300, .begin = 700, .end = 1900});
  subjects.emplace_back(TraceShape{.tokens = 12000, .group = 2, .seed = 13},
                        ChosenSizes{.begin = 2047, .end = 11999});
  subjects.emplace_back(TraceShape{.seed = 14}, ChosenSizes{.share = 0.0});  // nothing chosen
  subjects.emplace_back(TraceShape{.seed = 15}, ChosenSizes{.end = 1500, .share = 0.0});
  subjects.emplace_back(TraceShape{.seed = 16}, ChosenSizes{.share = 2.0});  // nothing left
  subjects.emplace_back(TraceShape{.seed = 17}, ChosenSizes{.covered = 0, .begin = 5, .end = 2900});
  subjects.emplace_back(TraceShape{.seed = 18}, ChosenSizes{.begin = 9, .end = 9});
  return subjects;
}

TEST(ChosenPlanTest, AttendIsWhatIsReadAndTheEstimatedRest) {
  for (const ChosenSubject& subject : Subjects()) {
    for (const bool rest : {true, false}) {
      const SearchResult result = subject.Search({.list_read = true, .estimate_rest = rest});
      EXPECT_EQ(result.positions, subject.read());
      EXPECT_EQ(result.report.keys_exact, static_cast<int64_t>(subject.read().size()));
      for (int h = 0; h < subject.trace().group; ++h) {
        const auto all = [](int64_t) { return true; };
        ExpectState(subject, result, h, subject.State(h, all, rest));
        // The report tells of the rest whether or not it is in the answer.
        const double read = subject.State(h, all, false).Mass();
        const double with_rest = subject.State(h, all, true).Mass();
        const double missed = with_rest > 0.0 ? 1.0 - read / with_rest : 0.0;
        const auto at = static_cast<size_t>(h);
        EXPECT_NEAR(result.report.missed_mass[at], missed, 1e-5);
        EXPECT_EQ(result.report.missed_low[at], result.report.missed_mass[at]);
        EXPECT_EQ(result.report.missed_high[at], result.report.missed_mass[at]);
      }
    }
  }
}

TEST(ChosenPlanTest, TopKReturnsTheBestOfThoseReadAndTheStateOfAllOthers) {
  for (const ChosenSubject& subject : Subjects()) {
    const int group = subject.trace().group;
    std::vector<double> lse;
    const auto all = [](int64_t) { return true; };
    for (int h = 0; h < group; ++h) lse.push_back(subject.State(h, all, true).Lse());
    const auto best_weight = [&](int64_t position) {
      double best = -kInfinity;
      for (int h = 0; h < group; ++h) {
        best =
            std::max(best, ScoreOf(subject.trace(), 0, h, position) - lse[static_cast<size_t>(h)]);
      }
      return best;
    };
    for (const int k : {0, 1, 100, 100000}) {
      const SearchResult result = subject.Search({.k = k});
      ASSERT_EQ(result.positions.size(), std::min<size_t>(k, subject.read().size()));
      ASSERT_TRUE(std::is_sorted(result.positions.begin(), result.positions.end()));
      const auto returned = [&](int64_t position) {
        return std::binary_search(result.positions.begin(), result.positions.end(), position);
      };
      double least_returned = kInfinity;
      double best_left = -kInfinity;
      for (const int64_t position : subject.read()) {
        double& bound = returned(position) ? least_returned : best_left;
        bound = returned(position) ? std::min(bound, best_weight(position))
                                   : std::max(bound, best_weight(position));
      }
      EXPECT_LE(best_left, least_returned + 1e-4);
      const auto left = [&](int64_t position) { return !returned(position); };
      for (int h = 0; h < group; ++h) {
        const DoubleState others = subject.State(h, left, true);
        ExpectState(subject, result, h, others);
        const double total = std::exp(lse[static_cast<size_t>(h)]);
        EXPECT_NEAR(result.report.missed_mass[static_cast<size_t>(h)],
                    total > 0.0 ? others.Mass() / total : 0.0, 1e-5);
      }
    }
  }
}

TEST(ChosenPlanTest, PartWeightIsTheLogOfTheSumOfNormalScores) {
  EXPECT_NEAR(PartWeight(-2.5F, 0.0F, 1), -2.5F, 1e-6);
  EXPECT_NEAR(PartWeight(1.0F, 0.0F, 16), 1.0 + std::log(16.0), 1e-6);
  std::mt19937_64 random(1);
  std::normal_distribution<> normal(0.7, 1.2);
  double sum = 0.0;
  for (int i = 0; i < 1 << 16; ++i) sum += std::exp(normal(random));
  EXPECT_NEAR(PartWeight(0.7F, 1.44F, 1 << 16), std::log(sum), 0.03);
  // A wide part's tail is not believed in.
  EXPECT_EQ(PartWeight(0.0F, 400.0F, 16), PartWeight(0.0F, 1e9F, 16));
}

}  // namespace
}  // namespace kvseek::index
