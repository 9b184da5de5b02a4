// Builds the indexes that sessions were opened with, in the background.
//
// Threads of its own, which the system runs only where a core is idle (SCHED_IDLE), so that no
// answer waits for a build: it takes a core away from nobody. A build reads a layer's state as a
// query does, and what comes out is published as the layer's next state, if the keys it was made of
// are still there; queries never wait. An index is due again when the keys that it does not cover,
// which are read exactly until then, are many; one that was built before there were queries to
// learn from, once there are (clusters, landmark means); and landmark when landmarks of the
// client's came for blocks that it covers already.
#ifndef KVSEEK_SERVICE_INDEX_BUILDER_H_
#define KVSEEK_SERVICE_INDEX_BUILDER_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "service/memory_budget.h"
#include "service/options.h"
#include "service/session.h"

namespace kvseek::service {

/// Thread-safe.
class IndexBuilder {
 public:
  /// Uses options.build_threads and build_from_tokens; `budget` must outlive it.
  IndexBuilder(const DaemonOptions& options, MemoryBudget& budget);
  /// Gives up what is under way.
  ~IndexBuilder();
  IndexBuilder(const IndexBuilder&) = delete;
  IndexBuilder& operator=(const IndexBuilder&) = delete;

  /// Queues the layer if one of its indexes is due. A layer is queued once at most, so the queue is
  /// bounded by the layers of all sessions. Cheap: after every append, and when queries were taken
  /// from traffic.
  void Consider(const std::shared_ptr<Session>& session, uint32_t layer)
      ABSL_LOCKS_EXCLUDED(mutex_);

  /// Indexes (of one KV head each) that were published, that found no memory, whose keys were gone.
  uint64_t built() const { return built_.load(std::memory_order_relaxed); }
  uint64_t refused() const { return refused_.load(std::memory_order_relaxed); }
  uint64_t outdated() const { return outdated_.load(std::memory_order_relaxed); }
  /// Layers queued or being built: as long as there are any, more may be built.
  uint64_t layers() const { return layers_.load(std::memory_order_relaxed); }
  /// Time that builds took on a core.
  uint64_t core_ms() const { return core_us_.load(std::memory_order_relaxed) / 1000; }

 private:
  struct Job {
    std::weak_ptr<Session> session;  ///< one that was closed need not wait for its builds
    uint32_t layer = 0;
  };

  bool IsDue(const SessionSettings& settings, const LayerState& state, size_t head,
             index::BuiltKind kind) const;
  bool IsDue(const SessionSettings& settings, const LayerState& state) const;
  void Work();
  /// A layer keeps its place until it is done with, so that no two threads build it.
  void BuildQueued(const Job& job);
  void BuildLayer(const Job& job, const SessionSettings& settings);
  /// False if it was given up.
  bool BuildHead(const Job& job, const SessionSettings& settings, size_t head,
                 index::BuiltKind kind);

  const int64_t from_tokens_;
  MemoryBudget& budget_;
  std::atomic<uint64_t> built_{0}, refused_{0}, outdated_{0}, core_us_{0}, layers_{0};
  std::atomic<bool> stopping_{false};  ///< set with the lock

  std::mutex mutex_;
  std::condition_variable job_waits_;  ///< or the builder stops
  std::deque<Job> jobs_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_INDEX_BUILDER_H_
