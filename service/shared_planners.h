// Planners that sessions of one model share (service/live_planner.h), and that outlive them: what
// one session's traffic taught is there for the next from its first request.
//
// Which sessions share is for the client to say (OpenSession.model): a shape fits many models, and
// heads that look alike from outside may need budgets that are far apart. Sessions with the same
// `model`, and the same in all that a budget's worth depends on (shape, scale, dtype, scan bits,
// indexes that are built and how, error target), have one planner. A session without a `model`, or
// with a plan of its own, has a planner to itself, which goes with it and its forks
// (docs/adr/0016).
//
// Bounded: so many are kept; past it one goes that no session has, the least recently opened of
// them first, else the least recently opened of all. Sessions that have it keep it.
#ifndef KVSEEK_SERVICE_SHARED_PLANNERS_H_
#define KVSEEK_SERVICE_SHARED_PLANNERS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "service/live_planner.h"

namespace kvseek::service {

struct SessionSettings;

/// Thread-safe.
class SharedPlanners {
 public:
  explicit SharedPlanners(size_t kept_max) : kept_max_(kept_max) {}

  /// The planner for a session that is opened with these settings; null without an error target.
  std::shared_ptr<LivePlanner> Find(const SessionSettings& settings) ABSL_LOCKS_EXCLUDED(mutex_);

  struct Counts {
    uint64_t kept = 0;
    uint64_t evicted = 0;  ///< since the start
    uint64_t heads = 0;    ///< LivePlanner::heads of those kept
    uint64_t audits = 0;   ///< LivePlanner::audits of those kept
  };
  Counts counts() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Kept {
    std::string key;
    std::shared_ptr<LivePlanner> planner;
  };

  /// Hands over the one that goes.
  std::shared_ptr<LivePlanner> EvictOne() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const size_t kept_max_;
  mutable std::mutex mutex_;
  std::vector<Kept> kept_ ABSL_GUARDED_BY(mutex_);  ///< the most recently opened last
  uint64_t evicted_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SHARED_PLANNERS_H_
