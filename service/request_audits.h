// Answers a share of requests exactly as well, off the answering path: how right the daemon is on
// its own traffic, and how its KV heads are best searched.
//
// The request handler offers each Attend and TopK that has been answered. Of one taken, a single
// search (one query token of one KV head) is copied into a short queue; a thread that runs only
// where a core is idle answers it exactly (index/search_audit.h) and again as the request was, and
// counts how far apart the two are. Searches that were exact anyway, and those of a TopK, are not
// counted. In sessions with an error_target all kinds are taken, and the session's planner learns
// from them (service/live_planner.h). What finds the queue full or in use is dropped. With an
// audit_share of 0 there is no thread.
//
// Memory: the queue holds queries alone, at most 128 KiB each, and no session; an audit reads the
// session's keys as they are when its turn comes, and is dropped if the range is gone by then. One
// audit at a time holds a layer's state, so that a session that is closed meanwhile goes after it.
// What it works with, at most 256 MiB, is reserved from the daemon's budget; without room for it
// the audit is dropped.
#ifndef KVSEEK_SERVICE_REQUEST_AUDITS_H_
#define KVSEEK_SERVICE_REQUEST_AUDITS_H_

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "index/search_audit.h"
#include "service/memory_budget.h"
#include "service/options.h"
#include "service/search_validation.h"
#include "service/session.h"

namespace kvseek::service {

/// How many values were at most each of some bounds. Thread-safe.
class AuditHistogram {
 public:
  /// At most kBounds bounds, ascending.
  explicit AuditHistogram(std::vector<double> bounds) : bounds_(std::move(bounds)) {}
  void Count(double value);
  /// One counter a bound, cumulative: NAME_le_BOUND.
  void AddTo(const std::string& name, std::map<std::string, uint64_t>& values) const;

 private:
  static constexpr size_t kBounds = 8;
  const std::vector<double> bounds_;
  std::array<std::atomic<uint64_t>, kBounds + 1> counts_{};  ///< by the first bound that holds
};

/// Thread-safe.
class RequestAudits {
 public:
  /// Uses options.audit_share and audit_queue_max. `budget` must outlive it.
  RequestAudits(const DaemonOptions& options, MemoryBudget& budget);
  /// Waits for the audit under way; those queued are forgotten.
  ~RequestAudits();
  RequestAudits(const RequestAudits&) = delete;
  RequestAudits& operator=(const RequestAudits&) = delete;

  /// May take a search that was just answered. `search` and its payload must be there until it
  /// returns.
  void Offer(const CheckedSearch& search) ABSL_LOCKS_EXCLUDED(mutex_);

  /// By name (docs/operations.md); none with an audit_share of 0.
  std::map<std::string, uint64_t> Values() const;

 private:
  /// One search, with all that it needs.
  struct Taken {
    std::weak_ptr<const Session> session;
    uint32_t layer = 0;
    uint32_t kv_head = 0;
    proto::IndexKind index = proto::INDEX_EXACT;  ///< that answered
    bool counts = true;                           ///< in the statistics
    std::vector<float> queries;                   ///< (group, key_dim)
    index::SearchQuery query;                     ///< these
    index::SearchOptions options;
  };

  /// A number below `bound`, like chance.
  uint64_t Draw(uint64_t bound);
  void Work() ABSL_LOCKS_EXCLUDED(mutex_);
  /// False: dropped.
  bool Audit(const Taken& taken);
  /// Compares the answer as the request was.
  void Count(const Taken& taken, const index::KeyIndex& index, const index::KvView& view,
             const index::SearchAudit& audit, index::Scratch& scratch);

  MemoryBudget& budget_;
  const double share_;
  const size_t queue_max_;
  std::atomic<uint64_t> draws_;
  std::atomic<uint64_t> audits_{0};  ///< searches
  std::atomic<uint64_t> heads_{0};   ///< query heads of them
  std::atomic<uint64_t> dropped_{0};
  std::atomic<uint64_t> bytes_{0};        ///< that the searches read
  std::atomic<uint64_t> exact_bytes_{0};  ///< that exact would have
  std::atomic<uint64_t> trials_{0};       ///< searches for planners
  std::atomic<uint64_t> plan_changes_{0};
  AuditHistogram error_;
  AuditHistogram recall_;
  AuditHistogram missed_;
  AuditHistogram missed_ratio_;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::unique_ptr<const Taken>> queue_ ABSL_GUARDED_BY(mutex_);
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_REQUEST_AUDITS_H_
