// What a pool's workers do for searches (search_executor.h): counted by each in a place of its own,
// since units are as short as 5 us.
#ifndef KVSEEK_SERVICE_SEARCH_COUNTS_H_
#define KVSEEK_SERVICE_SEARCH_COUNTS_H_

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "index/key_index.h"

namespace kvseek::service {

/// Thread-safe.
class SearchCounts {
 public:
  struct Totals {
    uint64_t units_own_node = 0;  ///< run by workers of the node where their KV head lies
    uint64_t units_other_node = 0;
    std::array<std::chrono::nanoseconds, index::kSearchPhases> time{};  ///< of workers, by phase
  };

  explicit SearchCounts(size_t workers) : of_workers_(workers) {}

  void CountUnits(size_t worker, bool own_node, uint64_t units) {
    OfWorker& counts = of_workers_[worker];
    (own_node ? counts.own_node : counts.other_node).fetch_add(units, std::memory_order_relaxed);
  }
  void CountTime(size_t worker, index::SearchPhase phase, std::chrono::nanoseconds time) {
    of_workers_[worker].nanoseconds[static_cast<size_t>(phase)].fetch_add(
        time.count(), std::memory_order_relaxed);
  }
  Totals Sum() const;
  /// As Stats reports them (docs/operations.md): units_own_node, search_us_plan, ...
  std::map<std::string, uint64_t> Values() const;

 private:
  struct alignas(64) OfWorker {
    std::atomic<uint64_t> own_node{0};
    std::atomic<uint64_t> other_node{0};
    std::array<std::atomic<int64_t>, index::kSearchPhases> nanoseconds{};
  };

  std::vector<OfWorker> of_workers_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SEARCH_COUNTS_H_
