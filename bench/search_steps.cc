#include "bench/search_steps.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>

namespace kvseek::bench {
namespace {

// Steps (index/ladder_plan.h), and what one thread does between them.
const char* const kNames[] = {"plan",    "sample",     "thresholds", "scan",
                              "merging", "exact rows", "finish"};

class Clock {
 public:
  /// Microseconds since the last call.
  double Lap() {
    const auto now = std::chrono::steady_clock::now();
    const std::chrono::duration<double, std::micro> time = now - last_;
    last_ = now;
    return time.count();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace

void SearchSteps::Add(size_t step, double micros, int units) {
  if (steps_.size() <= step) steps_.resize(step + 1);
  steps_[step].units += units;
  steps_[step].unit_us.push_back(units == 0 ? 0.0 : micros / units);
}

index::SearchResult SearchSteps::Search(const index::KeyIndex& index, const index::KvView& view,
                                        const index::SearchQuery& query,
                                        const index::SearchOptions& options,
                                        index::Scratch& scratch) {
  Clock clock;
  scratch.Reset();
  const std::unique_ptr<index::SearchPlan> plan = index.Plan(view, query, options, scratch);
  size_t step = 0;
  Add(step++, clock.Lap(), 1);
  for (;;) {
    const int pieces = plan->pieces();
    for (int p = 0; p < pieces; ++p) {
      scratch.Reset();
      plan->Run(p, scratch);
    }
    Add(step++, clock.Lap(), pieces);
    scratch.Reset();
    if (!plan->NextStep(scratch)) break;
    Add(step++, clock.Lap(), 1);
  }
  scratch.Reset();
  index::SearchResult result = plan->Finish(scratch);
  Add(step, clock.Lap(), 1);
  return result;
}

std::vector<StepTime> SearchSteps::Times() const {
  std::vector<StepTime> times;
  for (size_t i = 0; i < steps_.size(); ++i) {
    std::vector<double> unit_us = steps_[i].unit_us;
    const auto middle = unit_us.begin() + static_cast<ptrdiff_t>(unit_us.size() / 2);
    std::nth_element(unit_us.begin(), middle, unit_us.end());
    times.push_back({i < std::size(kNames) ? kNames[i] : "step " + std::to_string(i),
                     steps_[i].units / static_cast<double>(unit_us.size()), *middle,
                     *std::min_element(unit_us.begin(), middle + 1)});
  }
  return times;
}

}  // namespace kvseek::bench
