// All sessions of the daemon, by handle.
#ifndef KVSEEK_SERVICE_SESSION_STORE_H_
#define KVSEEK_SERVICE_SESSION_STORE_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "service/memory_budget.h"
#include "service/options.h"
#include "service/session.h"
#include "service/shared_planners.h"

namespace kvseek::service {

/// Thread-safe. Every Find renews the session's lease. A session that is closed or reaped is out of
/// reach at once, and its memory goes when the last operation under way lets go of it; letting go
/// of a large session takes milliseconds to seconds, so do it on a compute worker.
class SessionStore {
 public:
  /// `budget` must outlive the store and everything found in it. Uses the memory and session bounds
  /// of `options`. KV heads are dealt out to so many NUMA nodes, from one layer and session to the
  /// next beginning with another.
  SessionStore(const DaemonOptions& options, MemoryBudget& budget, int nodes = 1);
  SessionStore(const SessionStore&) = delete;
  SessionStore& operator=(const SessionStore&) = delete;

  /// Random number of this start of the daemon, never 0.
  uint64_t boot_id() const { return boot_id_; }

  /// A new, empty session. The lease in `settings` becomes the default if 0, lease_max if longer.
  /// Errors, resource_exhausted: too many sessions; naming "tokens_expected": no memory for so many
  /// tokens now (nothing is reserved).
  absl::StatusOr<std::shared_ptr<Session>> Open(SessionSettings settings, int64_t tokens_expected,
                                                TimePoint now) ABSL_LOCKS_EXCLUDED(mutex_);

  /// A new session that shares what `parent` holds: the first `tokens` tokens of each layer, or
  /// everything; and shares its plan and planner. Errors as Open and Session::Truncate.
  absl::StatusOr<std::shared_ptr<Session>> Fork(const Session& parent,
                                                std::optional<uint64_t> tokens,
                                                std::chrono::milliseconds lease, std::string name,
                                                TimePoint now) ABSL_LOCKS_EXCLUDED(mutex_);

  /// `field` is the handle's name in the request. Errors: failed_precondition naming
  /// "<field>.boot_id" (another start of the daemon), not_found naming `field` (unknown, closed, or
  /// its lease has run out).
  absl::StatusOr<std::shared_ptr<Session>> Find(uint64_t boot_id, uint64_t session_id,
                                                absl::string_view field, TimePoint now)
      ABSL_LOCKS_EXCLUDED(mutex_);

  /// Takes the session out and hands it over. Errors as Find.
  absl::StatusOr<std::shared_ptr<Session>> Close(uint64_t boot_id, uint64_t session_id,
                                                 absl::string_view field, TimePoint now)
      ABSL_LOCKS_EXCLUDED(mutex_);

  /// Takes out the sessions whose lease has run out and hands them over.
  std::vector<std::shared_ptr<Session>> ReapExpired(TimePoint now) ABSL_LOCKS_EXCLUDED(mutex_);

  /// All sessions by ascending id. Renews nothing.
  std::vector<std::shared_ptr<Session>> List() const ABSL_LOCKS_EXCLUDED(mutex_);
  uint64_t size() const ABSL_LOCKS_EXCLUDED(mutex_);
  /// Sessions that ReapExpired has taken out since the start.
  uint64_t expired() const { return expired_.load(std::memory_order_relaxed); }

  MemoryBudget& budget() { return budget_; }
  const SharedPlanners& planners() const { return planners_; }

 private:
  using Sessions = absl::flat_hash_map<uint64_t, std::shared_ptr<Session>>;

  /// Makes a session and registers it.
  absl::StatusOr<std::shared_ptr<Session>> Add(SessionSettings settings, Session::Start start,
                                               TimePoint now) ABSL_LOCKS_EXCLUDED(mutex_);
  absl::StatusOr<Sessions::iterator> Locate(uint64_t boot_id, uint64_t session_id,
                                            absl::string_view field, TimePoint now)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const uint64_t boot_id_;
  const uint64_t sessions_max_;
  const std::chrono::milliseconds lease_default_;
  const std::chrono::milliseconds lease_max_;
  const std::chrono::milliseconds retry_after_;
  MemoryBudget& budget_;
  const int nodes_;
  SharedPlanners planners_;
  std::atomic<uint32_t> opened_{0};
  std::atomic<uint64_t> expired_{0};

  mutable std::mutex mutex_;
  Sessions sessions_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_id_ ABSL_GUARDED_BY(mutex_) = 1;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SESSION_STORE_H_
