// Which unit of a run's searches is next: what SearchRun (search_executor.cc) hands out to workers.
//
// A search is a plan to be made, and then one step after the other, each of some pieces. Plans go
// before pieces as long as no more than `plans_max` searches are begun and not finished; pieces go
// in the order in which their steps were opened. A piece is claimed by one atomic operation on its
// step's count: units are as short as 5 us, and sixteen workers that took turns at a mutex for each
// spent half of that waiting for it (docs/performance.md). Plans and the list of open steps
// have a mutex, which is taken a few times a step.
#ifndef KVSEEK_SERVICE_UNIT_QUEUE_H_
#define KVSEEK_SERVICE_UNIT_QUEUE_H_

#include <atomic>
#include <cstddef>
#include <memory_resource>
#include <mutex>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"

namespace kvseek::service {

struct SearchUnit {
  static constexpr int kPlan = -1;
  size_t search;
  int piece;  ///< or kPlan
};

/// Thread-safe.
class UnitQueue {
 public:
  /// `memory`: of what it holds of each search.
  UnitQueue(size_t searches, int plans_max,
            std::pmr::memory_resource* memory = std::pmr::get_default_resource());

  /// The next unit, if there is one now.
  std::optional<SearchUnit> Take() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Whether there may be one. As cheap as a load, for workers that look.
  bool MayHaveUnits() const { return plans_ready_.load() || front_.load() != nullptr; }
  /// Lets the pieces of a search's step be taken. All of the step before have been run. Returns how
  /// many units may be taken now, counted up to `enough`.
  /// REQUIRES: pieces > 0.
  int Open(size_t search, int pieces, int enough) ABSL_LOCKS_EXCLUDED(mutex_);
  /// A search has come to its end. Returns how many have not.
  size_t Finish() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  /// A search's step; a cache line of its own.
  struct alignas(64) Step {
    std::atomic<int> left{0};  ///< pieces not taken; workers that come too late make it negative
    int pieces = 0;            ///< set before `left`
    bool listed = false;       ///< with the lock
    Step* next = nullptr;      ///< opened after it; with the lock
  };

  std::optional<SearchUnit> TakePlan() ABSL_LOCKS_EXCLUDED(mutex_);
  void UpdatePlansReady() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  /// Drops steps at the front of which nothing is left.
  void DropTaken() ABSL_LOCKS_EXCLUDED(mutex_);
  void Unlist(Step& step) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int plans_max_;
  std::pmr::vector<Step> steps_;       ///< of each search
  std::atomic<Step*> front_{nullptr};  ///< the oldest open step; set with the lock
  std::atomic<bool> plans_ready_;      ///< a plan goes before pieces; set with the lock

  alignas(64) mutable std::mutex mutex_;
  Step* back_ ABSL_GUARDED_BY(mutex_) = nullptr;
  size_t next_plan_ ABSL_GUARDED_BY(mutex_) = 0;
  int begun_ ABSL_GUARDED_BY(mutex_) = 0;  ///< searches planned and not finished
  size_t unfinished_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_UNIT_QUEUE_H_
