#include "service/search_counts.h"

#include "absl/strings/str_cat.h"

namespace kvseek::service {

SearchCounts::Totals SearchCounts::Sum() const {
  Totals totals;
  for (const OfWorker& counts : of_workers_) {
    totals.units_own_node += counts.own_node.load(std::memory_order_relaxed);
    totals.units_other_node += counts.other_node.load(std::memory_order_relaxed);
    for (size_t p = 0; p < totals.time.size(); ++p) {
      totals.time[p] +=
          std::chrono::nanoseconds(counts.nanoseconds[p].load(std::memory_order_relaxed));
    }
  }
  return totals;
}

std::map<std::string, uint64_t> SearchCounts::Values() const {
  const Totals totals = Sum();
  std::map<std::string, uint64_t> values = {{"units_own_node", totals.units_own_node},
                                            {"units_other_node", totals.units_other_node}};
  for (size_t p = 0; p < totals.time.size(); ++p) {
    const auto phase = static_cast<index::SearchPhase>(p);
    const auto time = std::chrono::duration_cast<std::chrono::microseconds>(totals.time[p]);
    values[absl::StrCat("search_us_", index::NameOf(phase))] = static_cast<uint64_t>(time.count());
  }
  return values;
}

}  // namespace kvseek::service
