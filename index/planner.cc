#include "index/planner.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace kvseek::index {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Consecutive settings of a curve that share one mean.
struct Pool {
  double weight;
  double error;
  size_t settings;
};

}  // namespace

std::vector<int> BudgetLadder(int least, int most) {
  std::vector<int> budgets;
  for (double budget = least; budget < most; budget *= std::sqrt(std::sqrt(2.0))) {
    const auto rounded = static_cast<int>(std::lround(budget));
    if (rounded < most && (budgets.empty() || rounded > budgets.back())) budgets.push_back(rounded);
  }
  budgets.push_back(most);
  return budgets;
}

HeadPlanner::HeadPlanner(std::vector<PlanCurve> curves, const PlannerOptions& options)
    : curves_(std::move(curves)), options_(options) {
  for (const PlanCurve& curve : curves_) observed_.emplace_back(curve.candidates.size());
}

double HeadPlanner::Weight(const Observed& observed) const {
  return std::min(observed.audits, options_.memory);
}

std::vector<PlanEstimate> HeadPlanner::Estimates(size_t curve) const {
  const std::vector<Observed>& observed = observed_[curve];
  std::vector<Pool> pools;
  for (const Observed& one : observed) {
    if (one.audits == 0) continue;
    pools.push_back({Weight(one), one.error, 1});
    while (pools.size() > 1 && pools[pools.size() - 2].error < pools.back().error) {
      const Pool last = pools.back();
      pools.pop_back();
      Pool& into = pools.back();
      into.error =
          (into.error * into.weight + last.error * last.weight) / (into.weight + last.weight);
      into.weight += last.weight;
      into.settings += last.settings;
    }
  }
  std::vector<PlanEstimate> estimates;
  auto pool = pools.begin();
  size_t left = pools.empty() ? 0 : pool->settings;
  double bound = kInfinity;
  for (const Observed& one : observed) {
    PlanEstimate estimate{one.bytes, kInfinity, kInfinity, one.audits};
    if (one.audits > 0) {
      estimate.error = pool->error;
      if (Believed(one)) {
        bound = std::min(bound,
                         pool->error + options_.confidence * std::sqrt(one.variance / Weight(one)));
        estimate.bound = bound;
      }
      if (--left == 0 && ++pool != pools.end()) left = pool->settings;
    }
    estimates.push_back(estimate);
  }
  return estimates;
}

PlanEstimate HeadPlanner::Estimate(const PlanSetting& setting) const {
  if (setting.curve == PlanSetting::kExact) return {exact_.bytes, 0.0, 0.0, exact_.audits};
  return Estimates(setting.curve)[setting.budget];
}

HeadPlanner::Frontier HeadPlanner::FindFrontier(absl::Span<const PlanEstimate> estimates) const {
  Frontier frontier{-1, static_cast<ptrdiff_t>(estimates.size())};
  for (size_t i = 0; i < estimates.size(); ++i) {
    if (estimates[i].audits < options_.audits_min) continue;
    if (estimates[i].error > options_.error_target) {
      frontier.misses = static_cast<ptrdiff_t>(i);
    } else {
      frontier.meets = static_cast<ptrdiff_t>(i);
      break;
    }
  }
  return frontier;
}

double HeadPlanner::LeastBytes(absl::Span<const PlanEstimate> estimates, const Frontier& frontier) {
  const auto count = static_cast<ptrdiff_t>(estimates.size());
  if (frontier.misses + 1 == count) return kInfinity;  // not even its largest budget meets it
  if (frontier.meets == frontier.misses + 1) {
    return estimates[static_cast<size_t>(frontier.meets)].bytes;
  }
  return frontier.misses < 0 ? 0.0 : estimates[static_cast<size_t>(frontier.misses)].bytes;
}

std::vector<PlanSetting> HeadPlanner::Wanted() const {
  std::vector<PlanSetting> wanted;
  const double bytes = Estimate(chosen_).bytes;
  const bool revisit = exact_.audits % kRevisit == kRevisit - 1;
  for (size_t curve = 0; curve < curves_.size(); ++curve) {
    const std::vector<PlanEstimate> estimates = Estimates(curve);
    const auto count = static_cast<ptrdiff_t>(estimates.size());
    const Frontier frontier = FindFrontier(estimates);
    const bool hopeful =
        exact_.audits == 0 || curve == chosen_.curve || LeastBytes(estimates, frontier) < bytes;
    if (!hopeful && !revisit) continue;
    const auto want = [&](ptrdiff_t budget) {
      wanted.push_back({curve, static_cast<size_t>(budget)});
    };
    if (frontier.meets - frontier.misses > 1) {
      want((frontier.misses + frontier.meets) / 2);
      continue;
    }
    if (frontier.misses >= 0) want(frontier.misses);
    for (ptrdiff_t i = frontier.meets; i < count; ++i) {
      want(i);
      if (estimates[static_cast<size_t>(i)].bound <= options_.error_target) break;
    }
  }
  if (chosen_.curve != PlanSetting::kExact &&
      std::find(wanted.begin(), wanted.end(), chosen_) == wanted.end()) {
    wanted.push_back(chosen_);
  }
  return wanted;
}

void HeadPlanner::Add(double exact_bytes, absl::Span<const PlanTrial> trials) {
  const auto observe = [this](Observed& observed, double bytes, double error) {
    ++observed.audits;
    const double share = 1.0 / Weight(observed);
    const double before = error - observed.error;
    observed.error += share * before;
    observed.bytes += share * (bytes - observed.bytes);
    // Of n observations alike in weight this is their variance, with n - 1 in the divisor.
    const double spread = before * before;
    if (observed.audits == 2) {
      observed.variance = spread / 2.0;
    } else if (observed.audits > 2) {
      const double keep = 1.0 - 1.0 / (Weight(observed) - 1.0);
      observed.variance = keep * observed.variance + share * spread;
    }
  };
  observe(exact_, exact_bytes, 0.0);
  for (const PlanTrial& trial : trials) {
    observe(observed_[trial.setting.curve][trial.setting.budget], trial.bytes, trial.output_error);
  }
  Choose();
}

void HeadPlanner::Choose() {
  PlanSetting best;
  double best_bytes = exact_.bytes;
  for (size_t curve = 0; curve < curves_.size(); ++curve) {
    const std::vector<PlanEstimate> estimates = Estimates(curve);
    for (size_t i = 0; i < estimates.size(); ++i) {
      if (estimates[i].bound <= options_.error_target && estimates[i].bytes < best_bytes) {
        best = {curve, i};
        best_bytes = estimates[i].bytes;
      }
    }
  }
  const PlanEstimate current = Estimate(chosen_);
  const bool stays = current.error <= options_.error_target &&
                     best_bytes >= (1.0 - options_.worthwhile) * current.bytes;
  if (!stays) chosen_ = best;
}

}  // namespace kvseek::index
