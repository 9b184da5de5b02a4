// The planner on made-up heads: known mean errors that fall with the budget, noisy audits.
#include "index/planner.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace kvseek::index {
namespace {

/// error(budget) = at_one * budget^-power, cost = base + budget * slope.
struct MadeUpCurve {
  double at_one;
  double power;
  double base;
  double slope;

  double Error(int budget) const { return at_one * std::pow(budget, -power); }
  double Bytes(int budget) const { return base + slope * budget; }
};

class MadeUpHead {
 public:
  MadeUpHead(std::vector<MadeUpCurve> curves, double exact_bytes, uint64_t seed)
      : curves_(std::move(curves)), exact_bytes_(exact_bytes), random_(seed) {
    std::vector<PlanCurve> planned;
    for (size_t i = 0; i < curves_.size(); ++i) {
      planned.push_back({absl::StrCat("curve", i), BudgetLadder(16, 16384)});
    }
    planner_.emplace_back(std::move(planned), PlannerOptions{});
  }

  HeadPlanner& planner() { return planner_.front(); }
  MadeUpCurve& curve(size_t i) { return curves_[i]; }
  int Budget(const PlanSetting& setting) {
    return planner().curves()[setting.curve].candidates[setting.budget];
  }
  double TrueError(const PlanSetting& setting) {
    return setting.curve == PlanSetting::kExact ? 0.0
                                                : curves_[setting.curve].Error(Budget(setting));
  }
  double TrueBytes(const PlanSetting& setting) {
    return setting.curve == PlanSetting::kExact ? exact_bytes_
                                                : curves_[setting.curve].Bytes(Budget(setting));
  }
  double BestBytes(double target) {
    double best = exact_bytes_;
    for (size_t c = 0; c < curves_.size(); ++c) {
      for (const int budget : planner().curves()[c].candidates) {
        if (curves_[c].Error(budget) <= target) best = std::min(best, curves_[c].Bytes(budget));
      }
    }
    return best;
  }
  /// Audits whose errors are log-normal around the truth, with a tail as real heads have.
  void Run(int audits) {
    constexpr double kSigma = 0.5;
    std::normal_distribution<double> normal(-0.5 * kSigma * kSigma, kSigma);
    for (int i = 0; i < audits; ++i) {
      std::vector<PlanTrial> trials;
      for (const PlanSetting& setting : planner().Wanted()) {
        trials.push_back({setting, TrueBytes(setting) * (1.0 + 0.02 * std::cos(i)),
                          TrueError(setting) * std::exp(normal(random_))});
      }
      trials_ += trials.size();
      planner().Add(exact_bytes_, trials);
    }
  }
  size_t trials() const { return trials_; }

 private:
  std::vector<MadeUpCurve> curves_;
  double exact_bytes_;
  std::mt19937_64 random_;
  std::vector<HeadPlanner> planner_;
  size_t trials_ = 0;
};

/// A scan of all keys that is cheap to refine, and two that pay for what they read.
std::vector<MadeUpCurve> Typical(std::mt19937_64& random) {
  std::uniform_real_distribution<double> factor(0.6, 1.6);
  return {{3.0 * factor(random), 0.5, 1e6, 70.0},
          {4.0 * factor(random), 0.45, 3e6, 500.0},
          {2.0 * factor(random), 0.45, 7e5 * factor(random), 500.0}};
}

TEST(PlannerTest, BudgetLadderRisesInSmallSteps) {
  const std::vector<int> budgets = BudgetLadder(64, 32256);
  EXPECT_EQ(budgets.front(), 64);
  EXPECT_EQ(budgets.back(), 32256);
  for (size_t i = 1; i < budgets.size(); ++i) {
    EXPECT_GT(budgets[i], budgets[i - 1]);
    EXPECT_LE(budgets[i], 1.21 * budgets[i - 1]);
  }
  EXPECT_EQ(BudgetLadder(5, 5), std::vector<int>{5});
  EXPECT_EQ(BudgetLadder(1, 3), (std::vector<int>{1, 2, 3}));
}

TEST(PlannerTest, FindsACheapSettingThatMeetsTheTarget) {
  constexpr int kHeads = 200;
  int met = 0;
  int cheap = 0;
  for (uint64_t seed = 0; seed < kHeads; ++seed) {
    std::mt19937_64 random(seed);
    MadeUpHead head(Typical(random), 1.6e7, seed + 1000);
    head.Run(300);
    const PlanSetting chosen = head.planner().chosen();
    met += head.TrueError(chosen) <= 0.1 ? 1 : 0;
    cheap += head.TrueBytes(chosen) <= 1.2 * head.BestBytes(0.1) ? 1 : 0;
    EXPECT_LE(head.TrueError(chosen), 0.115) << "seed " << seed;
    EXPECT_LE(head.TrueBytes(chosen), 1.45 * head.BestBytes(0.1)) << "seed " << seed;
    EXPECT_LT(head.trials(), 300U * 9U) << "seed " << seed;
  }
  EXPECT_GE(met, kHeads * 9 / 10);
  EXPECT_GE(cheap, kHeads * 9 / 10);
}

TEST(PlannerTest, PrefersExactWhereItIsCheaper) {
  std::mt19937_64 random(3);
  MadeUpHead head(Typical(random), 9e5, 3);
  head.Run(200);
  EXPECT_EQ(head.planner().chosen(), PlanSetting{});
  // Nothing that costs more is looked at any longer, but now and then.
  const size_t before = head.trials();
  head.Run(160);
  EXPECT_LE(head.trials() - before, 10U * 12U);
}

TEST(PlannerTest, ChoosesExactWhereNothingMeetsTheTarget) {
  MadeUpHead head({{50.0, 0.3, 1e6, 70.0}}, 1.6e7, 5);
  head.Run(200);
  EXPECT_EQ(head.planner().chosen(), PlanSetting{});
}

TEST(PlannerTest, BelievesNothingBeforeItHasAudits) {
  HeadPlanner planner({{"ladder", {64, 128}}}, PlannerOptions{});
  EXPECT_EQ(planner.chosen(), PlanSetting{});
  ASSERT_FALSE(planner.Wanted().empty());
  const PlanSetting wanted = planner.Wanted().front();
  for (int i = 0; i < PlannerOptions{}.audits_min - 1; ++i) {
    planner.Add(1e6, {{{wanted, 1e3, 0.01}}});
    EXPECT_EQ(planner.chosen(), PlanSetting{}) << i;
    EXPECT_TRUE(std::isinf(planner.Estimate(wanted).bound));
  }
  planner.Add(1e6, {{{wanted, 1e3, 0.01}}});
  EXPECT_EQ(planner.chosen(), wanted);
  EXPECT_NEAR(planner.Estimate(wanted).bound, 0.01, 1e-12);
}

TEST(PlannerTest, PoolsWhatRisesAlongACurve) {
  HeadPlanner planner({{"ladder", {64, 128, 256}}}, PlannerOptions{});
  for (int i = 0; i < 10; ++i) {
    planner.Add(1e6, {{{{0, 0}, 1e3, 0.2}, {{0, 1}, 2e3, 0.05}, {{0, 2}, 3e3, 0.07}}});
  }
  EXPECT_NEAR(planner.Estimate({0, 0}).error, 0.2, 1e-12);
  EXPECT_NEAR(planner.Estimate({0, 1}).error, 0.06, 1e-12);
  EXPECT_NEAR(planner.Estimate({0, 2}).error, 0.06, 1e-12);
  EXPECT_EQ(planner.chosen(), (PlanSetting{0, 1}));
}

TEST(PlannerTest, KeepsTheMeanAndVarianceOfItsAudits) {
  std::mt19937_64 random(8);
  std::uniform_real_distribution<double> uniform(0.0, 0.2);
  HeadPlanner planner({{"ladder", {64}}}, PlannerOptions{});
  double sum = 0.0;
  double squares = 0.0;
  constexpr int kAudits = 100;
  for (int i = 0; i < kAudits; ++i) {
    const double error = uniform(random);
    sum += error;
    squares += error * error;
    planner.Add(1e6, {{{{0, 0}, 1e3, error}}});
  }
  const double mean = sum / kAudits;
  const double variance = (squares - sum * mean) / (kAudits - 1);
  EXPECT_NEAR(planner.Estimate({0, 0}).error, mean, 1e-9);
  EXPECT_NEAR(planner.Estimate({0, 0}).bound, mean + 1.6 * std::sqrt(variance / kAudits), 1e-9);
}

TEST(PlannerTest, DoesNotFlap) {
  int changes = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    std::mt19937_64 random(seed);
    MadeUpHead head(Typical(random), 1.6e7, seed);
    head.Run(400);
    PlanSetting before = head.planner().chosen();
    for (int i = 0; i < 400; ++i) {
      head.Run(1);
      changes += head.planner().chosen() == before ? 0 : 1;
      before = head.planner().chosen();
    }
  }
  EXPECT_LE(changes, 20 * 6);  // in 8000 audits
}

TEST(PlannerTest, FollowsAHeadThatBecomesHarder) {
  std::mt19937_64 random(9);
  MadeUpHead head(Typical(random), 1.6e7, 9);
  head.Run(400);
  const double before = head.TrueBytes(head.planner().chosen());
  for (size_t c = 0; c < 3; ++c) head.curve(c).at_one *= 2.0;
  head.Run(2500);
  const PlanSetting chosen = head.planner().chosen();
  EXPECT_GT(head.TrueBytes(chosen), before);
  EXPECT_LE(head.TrueError(chosen), 0.11);
  EXPECT_LE(head.TrueBytes(chosen), 1.3 * head.BestBytes(0.1));
}

TEST(PlannerTest, SameAuditsSameChoice) {
  for (uint64_t seed = 0; seed < 5; ++seed) {
    std::mt19937_64 random(seed);
    const std::vector<MadeUpCurve> curves = Typical(random);
    MadeUpHead a(curves, 1.6e7, seed);
    MadeUpHead b(curves, 1.6e7, seed);
    a.Run(150);
    b.Run(150);
    EXPECT_EQ(a.planner().chosen(), b.planner().chosen());
    EXPECT_EQ(a.planner().Wanted(), b.planner().Wanted());
  }
}

}  // namespace
}  // namespace kvseek::index
