#include "bench/search_steps.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>

namespace kvseek::bench {
namespace {

// Steps (index/ladder_plan.h), and what one thread does between them. Sign codes have no step of
// tables.
const char* const kNames[] = {"plan", "tables",  "between",    "sample", "thresholds",
                              "scan", "merging", "exact rows", "finish"};
constexpr size_t kTableNames = 2;

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

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

void SearchSteps::Add(size_t step, double micros, double longest, int units) {
  if (steps_.size() <= step) steps_.resize(step + 1);
  steps_[step].units += units;
  steps_[step].unit_us.push_back(units == 0 ? 0.0 : micros / units);
  steps_[step].longest_us.push_back(longest);
}

index::SearchResult SearchSteps::Search(const index::KeyIndex& index, const index::KvView& view,
                                        const index::SearchQuery& query,
                                        const index::SearchOptions& options,
                                        index::Scratch& scratch) {
  Clock clock;
  scratch.Reset();
  const index::PlanPtr plan = index.Plan(view, query, options, scratch);
  size_t step = 0;
  const auto add_one = [&] {
    const double micros = clock.Lap();
    Add(step++, micros, micros, 1);
  };
  add_one();
  for (;;) {
    const int pieces = plan->pieces();
    double sum = 0.0;
    double longest = 0.0;
    for (int p = 0; p < pieces; ++p) {
      scratch.Reset();
      plan->Run(p, scratch);
      const double micros = clock.Lap();
      sum += micros;
      longest = std::max(longest, micros);
    }
    Add(step++, sum, longest, pieces);
    scratch.Reset();
    if (!plan->NextStep(scratch)) break;
    add_one();
  }
  scratch.Reset();
  index::SearchResult result;
  plan->Finish(result, scratch);
  add_one();
  return result;
}

std::vector<StepTime> SearchSteps::Times() const {
  std::vector<StepTime> times;
  const size_t left_out = steps_.size() < std::size(kNames) ? kTableNames : 0;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const std::vector<double>& unit_us = steps_[i].unit_us;
    const size_t name = i == 0 ? 0 : i + left_out;
    times.push_back({name < std::size(kNames) ? kNames[name] : "step " + std::to_string(i),
                     steps_[i].units / static_cast<double>(unit_us.size()), Median(unit_us),
                     *std::min_element(unit_us.begin(), unit_us.end()),
                     Median(steps_[i].longest_us)});
  }
  return times;
}

}  // namespace kvseek::bench
