// Jobs of the compute pool that run one at a time and in order.
#ifndef KVSEEK_SERVICE_STRAND_H_
#define KVSEEK_SERVICE_STRAND_H_

#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "index/scratch.h"
#include "service/compute_pool.h"

namespace kvseek::service {

/// Runs jobs on a pool one at a time and in order; while they wait they occupy no worker.
/// Thread-safe; may be destroyed while jobs wait, they still run.
class Strand {
 public:
  Strand() : state_(std::make_shared<State>()) {}
  void Submit(ComputePool& pool, ComputePool::Job job);

 private:
  friend class StrandJobs;
  struct State {
    std::mutex mutex;
    std::deque<ComputePool::Job> jobs ABSL_GUARDED_BY(mutex);
    bool busy ABSL_GUARDED_BY(mutex) = false;  ///< one of its jobs is on the pool
  };
  using StatePtr = std::shared_ptr<State>;

  /// Queues a job. True: the strand was idle, and now waits for RunNext.
  static bool Queue(State& state, ComputePool::Job job);
  /// Runs the first job, and lets the pool go on if there are more.
  static void RunNext(ComputePool& pool, const StatePtr& state, index::Scratch& scratch);

  StatePtr state_;
};

/// Jobs of different strands which one worker runs one after the other: where they are short,
/// handing each to a worker takes longer than they do. A job whose strand is busy comes when its
/// turn is there. Not thread-safe.
class StrandJobs {
 public:
  /// Takes a place in the strand's order. REQUIRES: RunOn follows.
  void Add(Strand& strand, ComputePool::Job job);
  size_t size() const { return size_; }
  /// Hands over what has been added, and is empty again.
  void RunOn(ComputePool& pool);

 private:
  std::vector<Strand::StatePtr> states_;  ///< that were idle
  size_t size_ = 0;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_STRAND_H_
