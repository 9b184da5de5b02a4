// Picks index and budget of one head: the cheapest that meets an error target, from audits.
//
// An audit is a request that was also answered exactly (search_audit.h), and again with the
// settings that the planner asks for. `kvseek plan` feeds it a trace's prefill queries, a daemon a
// small share of its traffic (service/live_planner.h).
//
// Settings form curves: one index with growing budgets (`candidates`), whose cost grows and whose
// mean error falls. The exact index needs no curve; what it costs is known from every audit.
//
//   - Model: the mean error of each setting over its audits, the last `memory` of them weighing
//     most, made monotone along its curve (pool adjacent violators, weighted by audits).
//   - A setting meets the target by its *bound*: mean + `confidence` standard errors, or the bound
//     of a smaller budget, if that is lower. It takes audits_min audits of its own.
//   - Exploration: each curve is bisected for the budget where the mean crosses the target; then
//     only the budgets on either side of it are audited, and the next larger ones up to the first
//     that meets the target by its bound. A curve whose frontier costs more than what is chosen is
//     looked at in one audit of kRevisit only.
//   - Choice: the cheapest setting that meets the target by its bound, or exact.
//   - Hysteresis: what is chosen stays until its *mean* misses the target, or something is cheaper
//     by more than `worthwhile`.
//
// Deterministic: the same audits in the same order give the same choice.
#ifndef KVSEEK_INDEX_PLANNER_H_
#define KVSEEK_INDEX_PLANNER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"

namespace kvseek::index {

/// One index and its budgets.
struct PlanCurve {
  std::string index;            ///< name, for the caller
  std::vector<int> candidates;  ///< ascending, at least one
};

struct PlannerOptions {
  double error_target = 0.1;  ///< mean output error
  double confidence = 1.6;    ///< standard errors; 1.6: about 95 %, one-sided
  int audits_min = 8;         ///< of a setting, before it is believed
  int memory = 512;           ///< audits of a setting after which older ones fade
  double worthwhile = 0.03;   ///< of the cost
};

/// A place on a curve, or exact.
struct PlanSetting {
  static constexpr size_t kExact = SIZE_MAX;
  size_t curve = kExact;
  size_t budget = 0;  ///< index into its candidates
  bool operator==(const PlanSetting&) const = default;
};

/// A setting's answer to an audited request.
struct PlanTrial {
  PlanSetting setting;
  double bytes = 0.0;         ///< read for the answer
  double output_error = 0.0;  ///< mean over the group's heads
};

/// What is believed of a setting.
struct PlanEstimate {
  double bytes = 0.0;
  double error = 0.0;  ///< mean
  double bound = 0.0;  ///< the mean is below it, most likely; infinity with too few audits
  int audits = 0;
};

/// 1.19-fold steps (four an octave) from `least` to below `most`, and `most`. REQUIRES: 1 <= least
/// <= most.
std::vector<int> BudgetLadder(int least, int most);

/// Not thread-safe.
class HeadPlanner {
 public:
  static constexpr int kRevisit = 16;

  HeadPlanner(std::vector<PlanCurve> curves, const PlannerOptions& options);

  /// What to try on the next audited request, none twice; empty: nothing but the exact answer is
  /// of interest.
  std::vector<PlanSetting> Wanted() const;
  /// One audited request: what exact read, and how the settings did.
  void Add(double exact_bytes, absl::Span<const PlanTrial> trials);

  /// Exact until something meets the target at less.
  PlanSetting chosen() const { return chosen_; }
  PlanEstimate Estimate(const PlanSetting& setting) const;
  const std::vector<PlanCurve>& curves() const { return curves_; }

 private:
  /// Mean and variance of what was observed of a setting.
  struct Observed {
    int audits = 0;
    double bytes = 0.0;
    double error = 0.0;
    double variance = 0.0;
  };
  /// Where the mean crosses the target: the largest budget believed to miss it, or -1, and the
  /// smallest believed to meet it, or the number of budgets.
  struct Frontier {
    ptrdiff_t misses;
    ptrdiff_t meets;
  };

  bool Believed(const Observed& observed) const { return observed.audits >= options_.audits_min; }
  double Weight(const Observed& observed) const;
  /// The curve's estimates, monotone.
  std::vector<PlanEstimate> Estimates(size_t curve) const;
  Frontier FindFrontier(absl::Span<const PlanEstimate> estimates) const;
  /// What the curve could cost at the least and still meet the target.
  static double LeastBytes(absl::Span<const PlanEstimate> estimates, const Frontier& frontier);
  void Choose();

  const std::vector<PlanCurve> curves_;
  const PlannerOptions options_;
  std::vector<std::vector<Observed>> observed_;  ///< (curves, budgets)
  Observed exact_;
  PlanSetting chosen_;
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_PLANNER_H_
