// All doorbells of a daemon, and the thread that looks at them.
//
// The thread looks at every slot of every doorbell without a rest for options.doorbell_spin after
// the last question. Then it sleeps between its looks: a sixteenth of the time since then, at least
// 20 us and at most 1 ms. So a question is seen late by no more than a sixteenth of the pause
// before it, or 1 ms, and an idle daemon looks a thousand times a second. Without a doorbell it
// sleeps until there is one. While it looks without a rest, it is a guest of the compute pool.
#ifndef KVSEEK_SERVICE_DOORBELLS_H_
#define KVSEEK_SERVICE_DOORBELLS_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "proto/kvseek.pb.h"
#include "service/byte_gate.h"
#include "service/compute_pool.h"
#include "service/doorbell.h"
#include "service/options.h"
#include "service/request_validation.h"
#include "service/search_validation.h"
#include "service/session_store.h"

namespace kvseek::service {

/// Thread-safe.
class Doorbells {
 public:
  /// `store`, `pool` and what `ask` calls outlive it; without a pool the thread is nobody's guest.
  /// Uses the bounds of `options`.
  Doorbells(const DaemonOptions& options, SessionStore& store, AskHandler ask,
            ComputePool* pool = nullptr);
  /// Looks no more. Answers under way still come.
  ~Doorbells();
  Doorbells(const Doorbells&) = delete;
  Doorbells& operator=(const Doorbells&) = delete;

  /// Makes a doorbell that nobody looks at yet, with memory that `gate` lets through, which it
  /// keeps: a question under way has its doorbell beyond the server's end. invalid_argument naming
  /// a field of the message; resource_exhausted: too many, too large ("items_max"), or no memory.
  absl::StatusOr<std::shared_ptr<Doorbell>> Open(const proto::OpenDoorbellRequest& message,
                                                 std::shared_ptr<ByteGate> gate);
  /// Looks at it from now on, until it is closed.
  void Serve(std::shared_ptr<Doorbell> doorbell) ABSL_LOCKS_EXCLUDED(mutex_);

  /// By name, for Stats.
  std::vector<std::pair<std::string, uint64_t>> Counters() const;

 private:
  absl::StatusOr<DoorbellSettings> Check(const proto::OpenDoorbellRequest& message) const;
  void Work() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Takes over what Serve has brought; without any doorbell, waits. False: the end.
  bool Gather(std::vector<std::shared_ptr<Doorbell>>& served) ABSL_LOCKS_EXCLUDED(mutex_);

  const DaemonOptions options_;
  SessionStore& store_;
  ComputePool* const pool_;  ///< or null
  const RequestValidator validator_;
  const SearchValidator search_validator_;
  const AskHandler ask_;
  const std::shared_ptr<DoorbellCounts> counts_ = std::make_shared<DoorbellCounts>();

  std::mutex mutex_;
  std::condition_variable news_;
  std::vector<std::shared_ptr<Doorbell>> arrived_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> has_news_{false};  ///< changes with the lock
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_DOORBELLS_H_
