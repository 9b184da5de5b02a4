// The threads that compute: all searches, builds and large copies run here.
//
// A request is admitted once (queue_limit of them at a time) and may then submit jobs. It keeps no
// more of them queued than there are workers or, for an append, layers in it, so the queue is
// bounded by about queue_limit * max(workers, layers_max) (a request may be answered before its
// last jobs, which then do nothing). Queued jobs are taken in the order of submission.
//
// A worker without a job looks for one for options.worker_spin before it sleeps. Who submits a job
// hands it to a worker that looks, each in a cache line of its own and without a lock; jobs are
// queued, and sleepers woken, only where none looks.
//
// Threads that wait for something else, and look for it without sleeping, may be guests: they work
// on jobs that they are invited to, and see to their own business between the parts of one. All
// else comes without them.
//
// A worker belongs to one NUMA node and, where there are several, runs on its cpus only. Jobs are
// anybody's; those that consist of parts may prefer the parts of their worker's node (CallersNode).
#ifndef KVSEEK_SERVICE_COMPUTE_POOL_H_
#define KVSEEK_SERVICE_COMPUTE_POOL_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "index/scratch.h"
#include "service/options.h"
#include "service/search_counts.h"
#include "service/topology.h"

namespace kvseek::service {

/// Thread-safe.
class ComputePool {
 public:
  /// Gets its worker's scratch, empty. Must not throw.
  using Job = std::function<void(index::Scratch&)>;

  /// A request's place among those waiting or under way; given back on destruction.
  class Admission {
   public:
    Admission() = default;
    Admission(Admission&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)) {}
    Admission& operator=(Admission&& other) noexcept {
      std::swap(pool_, other.pool_);
      return *this;
    }
    ~Admission() {
      if (pool_ != nullptr) pool_->requests_.fetch_sub(1, std::memory_order_relaxed);
    }

   private:
    friend class ComputePool;
    explicit Admission(ComputePool* pool) : pool_(pool) {}
    ComputePool* pool_ = nullptr;
  };

  class Guest;

  /// Uses options.workers, worker_spin, pin_workers, queue_limit, retry_after and io_threads, which
  /// may be guests. Workers are dealt out to the nodes in turn, as long as these have cpus without
  /// one.
  explicit ComputePool(const DaemonOptions& options, Topology topology = OneNode());
  /// Runs what is queued, and what those jobs submit, then stops.
  ~ComputePool();
  ComputePool(const ComputePool&) = delete;
  ComputePool& operator=(const ComputePool&) = delete;

  /// resource_exhausted with retry-after when queue_limit requests are there already.
  absl::StatusOr<Admission> Admit();

  /// Has a job, or `count` copies of it, run: by workers that look for one, else it is queued.
  void Submit(Job job, int count = 1) ABSL_LOCKS_EXCLUDED(mutex_);

  /// Has copies of a job run by guests that look, `count` at most. Returns how many; the job must
  /// do without the others.
  int Invite(Job job, int count);
  /// How many look now.
  int GuestsLooking() const { return guests_.idle.load(std::memory_order_relaxed); }

  /// Calls work(0) .. work(count - 1), each once, in the calling worker and in workers that are
  /// idle now, and returns when all are done. Waits only for work that another worker has begun.
  /// `scratch` is the caller's and is emptied before each call; the first exception is rethrown
  /// after the others are done.
  void ForEach(int count, absl::FunctionRef<void(int, index::Scratch&)> work,
               index::Scratch& scratch) ABSL_LOCKS_EXCLUDED(mutex_);

  /// Whether more jobs are queued than workers are there to take them, or on their way: a long job
  /// then makes room.
  bool Crowded() const {
    return waiting_.load(std::memory_order_relaxed) > workers_.idle.load(std::memory_order_relaxed);
  }

  /// For long jobs, between two parts: whether to end here, since the worker is wanted for others
  /// (Crowded). A guest sees to its own business, and is not wanted.
  bool Wanted() const;

  /// How long a worker without a job looks for one (options.worker_spin).
  std::chrono::microseconds spin() const { return spin_; }
  int workers() const { return static_cast<int>(threads_.size()); }
  const Topology& topology() const { return topology_; }
  int nodes() const { return static_cast<int>(topology_.size()); }
  absl::Span<const int> workers_of_nodes() const { return node_workers_; }
  /// Of the worker that calls; guests are on node 0, and come after the workers. 0 in other
  /// threads.
  static int CallersNode();
  static size_t CallersWorker();

  /// Of its workers and guests.
  SearchCounts& search_counts() { return search_counts_; }
  const SearchCounts& search_counts() const { return search_counts_; }
  /// Requests admitted, and how many may be.
  uint64_t requests() const { return requests_.load(std::memory_order_relaxed); }
  uint64_t requests_max() const { return requests_max_; }

 private:
  /// What a worker that looks is handed a job through.
  struct alignas(64) Looker {
    enum class State : uint8_t {
      kAway,     ///< its worker does not look
      kLooking,  ///< may be handed a job by whoever makes this kHanding
      kHanding,  ///< is about to get it
      kHanded,
    };
    std::atomic<State> state{State::kAway};
    /// When its worker looked last, of the steady clock: one that the system has put aside since is
    /// handed nothing.
    std::atomic<std::chrono::steady_clock::rep> looked{0};
    Job job;  ///< valid while kHanded

    /// What it is being handed or has been; it looks no more then.
    Job TakeHanded();
  };
  /// Those of one kind; `idle`: how many of them have no job and are handed none.
  struct Lookers {
    explicit Lookers(size_t count) : each(count) {}
    std::vector<Looker> each;
    alignas(64) std::atomic<int> idle{0};
  };
  /// Hands copies to those that look, as far as there are such. Returns how many; after `count` of
  /// them, `job` is gone.
  static int HandOver(Job& job, int count, Lookers& lookers);
  void Work(int worker);
  /// The next job, as soon as there is one; null when the pool stops.
  Job Next(Looker& own) ABSL_LOCKS_EXCLUDED(mutex_);
  /// Looks for a job as long as options.worker_spin says; null: there was none.
  Job Look(Looker& own) ABSL_LOCKS_EXCLUDED(mutex_);
  /// Makes one of the queued jobs the caller's, who then finds it in jobs_.
  bool Claim();
  /// A claimed job.
  Job TakeQueued() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Topology topology_;
  const uint64_t requests_max_;
  const std::chrono::milliseconds retry_after_;
  const std::chrono::microseconds spin_;
  Lookers workers_;  ///< by worker
  Lookers guests_;
  std::atomic<size_t> guests_come_{0};
  std::atomic<uint64_t> requests_{0};

  // What workers that look read, apart from what changes at each job.
  alignas(64) std::atomic<int64_t> waiting_{0};  ///< jobs in jobs_ that nobody has claimed
  std::atomic<bool> stopping_{false};            ///< set with the lock

  alignas(64) std::mutex mutex_;
  std::condition_variable job_waits_;  ///< or the pool stops
  std::deque<Job> jobs_ ABSL_GUARDED_BY(mutex_);
  int sleeping_ ABSL_GUARDED_BY(mutex_) = 0;  ///< idle workers that sleep, or are waking up
  std::vector<int> node_workers_;             ///< by node
  SearchCounts search_counts_;
  std::vector<std::thread> threads_;
};

/// Makes the thread that has it a guest of a pool (above). Used by that thread alone; the pool
/// outlives it.
class ComputePool::Guest {
 public:
  /// `business`: what the thread waits for; it is called while the guest has a job, must not throw
  /// and must not call Help. A pool has room for its daemon's threads that look; others help with
  /// nothing.
  Guest(ComputePool& pool, std::function<void()> business);
  ~Guest();
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;

  /// Runs a job that the guest has been invited to; true: there was one. Otherwise it may be
  /// invited from now on, if it calls often: one that has not for 20 us is not.
  bool Help();
  /// Is invited no more, until it helps again; a job that it has been invited to is run.
  void Leave();

 private:
  friend class ComputePool;
  void RunHanded();

  ComputePool& pool_;
  const std::function<void()> business_;
  Looker* own_ = nullptr;  ///< null: there was no room
  index::Scratch scratch_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_COMPUTE_POOL_H_
