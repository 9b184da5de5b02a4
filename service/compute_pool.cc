#include "service/compute_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "proto/status_code.h"
#include "service/short_lock.h"
#include "transport/pause.h"

namespace kvseek::service {
namespace {

// A worker looks several times a microsecond, unless it does not run.
constexpr std::chrono::microseconds kLookerAway{20};

thread_local int callers_node = 0;
thread_local size_t callers_worker = 0;
thread_local const std::function<void()>* callers_business = nullptr;  // a guest's

/// Where a worker runs.
struct Place {
  size_t node = 0;
  std::vector<int> cpu;  ///< its own; none: it is not known
};

/// As many as there are cpus, or cores if cpus are not known, each node's in turn: so many workers
/// as there are have their share on each node.
std::vector<Place> Places(const Topology& topology) {
  std::vector<Place> places;
  size_t most = 0;
  for (const NumaNode& node : topology) most = std::max(most, node.cpus.size());
  for (size_t i = 0; i < most; ++i) {
    for (size_t n = 0; n < topology.size(); ++n) {
      if (i < topology[n].cpus.size()) {
        places.push_back({n, {topology[n].cpus[i]}});
      }
    }
  }
  if (places.empty()) places.resize(std::max(1U, std::thread::hardware_concurrency()));
  return places;
}

void PinTo(const std::vector<int>& cpus) {
  if (cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(static_cast<size_t>(cpu), &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // best effort
}

/// Threads of a daemon that may look for work other than the pool's.
size_t GuestCount(const DaemonOptions& options) {
  return static_cast<size_t>(options.io_threads) + 1;  // and one for doorbells
}

/// What the threads of one ForEach share. Helpers that come late find no index left and touch
/// `work` no more.
struct Sharing {
  Sharing(int all, absl::FunctionRef<void(int, index::Scratch&)> each)
      : count(all), work(each), unfinished(all) {}

  const int count;
  const absl::FunctionRef<void(int, index::Scratch&)> work;
  std::atomic<int> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  int unfinished ABSL_GUARDED_BY(mutex);
  std::exception_ptr failure ABSL_GUARDED_BY(mutex);

  void Run(index::Scratch& scratch) {
    for (int i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      std::exception_ptr thrown;
      scratch.Reset();
      try {
        work(i, scratch);
      } catch (...) {
        thrown = std::current_exception();
      }
      const std::lock_guard lock(mutex);
      if (thrown != nullptr && failure == nullptr) failure = thrown;
      if (--unfinished == 0) finished.notify_one();
    }
  }
};

size_t WorkerCount(const DaemonOptions& options, const Topology& topology) {
  return options.workers > 0 ? static_cast<size_t>(options.workers) : Places(topology).size();
}

}  // namespace

ComputePool::ComputePool(const DaemonOptions& options, Topology topology)
    : topology_(std::move(topology)),
      requests_max_(options.queue_limit),
      retry_after_(options.retry_after),
      spin_(options.worker_spin),
      workers_(WorkerCount(options, topology_)),
      guests_(GuestCount(options)),
      node_workers_(topology_.size()),
      search_counts_(WorkerCount(options, topology_) + GuestCount(options)) {
  const std::vector<Place> places = Places(topology_);
  const auto workers = static_cast<int>(WorkerCount(options, topology_));
  threads_.reserve(static_cast<size_t>(workers));
  for (int i = 0; i < workers; ++i) {
    const Place& place = places[static_cast<size_t>(i) % places.size()];
    ++node_workers_[place.node];
    std::vector<int> cpus;  // none: all that the process may use
    if (topology_.size() > 1) cpus = topology_[place.node].cpus;
    if (options.pin_workers) cpus = place.cpu;
    threads_.emplace_back([this, i, node = place.node, cpus = std::move(cpus)] {
      callers_node = static_cast<int>(node);
      callers_worker = static_cast<size_t>(i);
      PinTo(cpus);
      Work(i);
    });
  }
}

ComputePool::~ComputePool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_.store(true);
  }
  job_waits_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

int ComputePool::CallersNode() { return callers_node; }

size_t ComputePool::CallersWorker() { return callers_worker; }

absl::StatusOr<ComputePool::Admission> ComputePool::Admit() {
  if (requests_.fetch_add(1, std::memory_order_relaxed) >= requests_max_) {
    requests_.fetch_sub(1, std::memory_order_relaxed);
    return proto::Exhausted("", absl::StrCat(requests_max_, " requests are waiting already"),
                            static_cast<uint64_t>(retry_after_.count()));
  }
  return Admission(this);
}

int ComputePool::HandOver(Job& job, int count, Lookers& lookers) {
  using State = Looker::State;
  const auto oldest = (std::chrono::steady_clock::now() - kLookerAway).time_since_epoch().count();
  int handed = 0;
  for (size_t i = 0; i < lookers.each.size() && handed < count; ++i) {
    Looker& looker = lookers.each[i];
    State state = looker.state.load(std::memory_order_relaxed);
    if (state != State::kLooking || looker.looked.load(std::memory_order_relaxed) < oldest) {
      continue;
    }
    const bool last = handed + 1 == count;
    Job copy = last ? nullptr : job;
    if (!looker.state.compare_exchange_strong(state, State::kHanding, std::memory_order_acquire)) {
      continue;
    }
    looker.job.swap(last ? job : copy);
    lookers.idle.fetch_sub(1, std::memory_order_relaxed);
    looker.state.store(State::kHanded, std::memory_order_release);
    ++handed;
  }
  return handed;
}

void ComputePool::Submit(Job job, int count) {
  if (count <= 0) return;
  // What is queued is taken first.
  const bool looked_for = spin_.count() > 0 && waiting_.load(std::memory_order_relaxed) <= 0;
  if (looked_for) count -= HandOver(job, count, workers_);
  if (count <= 0) return;
  int sleepers = 0;
  bool all = false;
  {
    const auto lock = LockShortly(mutex_);
    for (int i = 1; i < count; ++i) jobs_.push_back(job);
    jobs_.push_back(std::move(job));
    waiting_.fetch_add(count, std::memory_order_relaxed);
    sleepers = std::min(count, sleeping_);
    all = sleepers == sleeping_;
  }
  // Without the lock, which they want first of all.
  if (sleepers > 1 && all) return job_waits_.notify_all();
  for (int i = 0; i < sleepers; ++i) job_waits_.notify_one();
}

int ComputePool::Invite(Job job, int count) { return HandOver(job, count, guests_); }

bool ComputePool::Wanted() const {
  if (callers_business == nullptr) return Crowded();
  (*callers_business)();
  return false;
}

void ComputePool::ForEach(int count, absl::FunctionRef<void(int, index::Scratch&)> work,
                          index::Scratch& scratch) {
  if (count <= 0) return;
  if (count == 1) {
    scratch.Reset();
    return work(0, scratch);
  }
  const auto sharing = std::make_shared<Sharing>(count, work);
  const int64_t idle = workers_.idle.load(std::memory_order_relaxed) - waiting_.load();
  Submit([sharing](index::Scratch& own) { sharing->Run(own); },
         static_cast<int>(std::min<int64_t>(count - 1, idle)));
  sharing->Run(scratch);
  std::unique_lock lock(sharing->mutex);
  while (sharing->unfinished > 0) sharing->finished.wait(lock);
  if (sharing->failure != nullptr) std::rethrow_exception(sharing->failure);
}

bool ComputePool::Claim() {
  int64_t waiting = waiting_.load(std::memory_order_relaxed);
  while (waiting > 0) {
    if (waiting_.compare_exchange_weak(waiting, waiting - 1, std::memory_order_relaxed)) {
      return true;
    }
  }
  return false;
}

ComputePool::Job ComputePool::Looker::TakeHanded() {
  while (state.load(std::memory_order_acquire) != State::kHanded) transport::Pause();
  state.store(State::kAway, std::memory_order_relaxed);
  return std::exchange(job, nullptr);
}

ComputePool::Job ComputePool::TakeQueued() {
  workers_.idle.fetch_sub(1, std::memory_order_relaxed);
  Job job = std::move(jobs_.front());
  jobs_.pop_front();
  return job;
}

ComputePool::Job ComputePool::Look(Looker& own) {
  using State = Looker::State;
  auto now = std::chrono::steady_clock::now();
  const auto end = now + spin_;
  own.looked.store(now.time_since_epoch().count(), std::memory_order_relaxed);
  own.state.store(State::kLooking, std::memory_order_release);
  while (own.state.load(std::memory_order_relaxed) == State::kLooking) {
    transport::Pause();
    now = std::chrono::steady_clock::now();
    own.looked.store(now.time_since_epoch().count(), std::memory_order_relaxed);
    const bool over = now >= end || stopping_.load(std::memory_order_relaxed);
    if (!over && waiting_.load(std::memory_order_relaxed) <= 0) continue;
    State looking = State::kLooking;
    if (!own.state.compare_exchange_strong(looking, State::kAway)) break;
    if (Claim()) {
      const auto lock = LockShortly(mutex_);
      return TakeQueued();
    }
    if (over) return nullptr;
    own.state.store(State::kLooking, std::memory_order_release);
  }
  return own.TakeHanded();
}

ComputePool::Job ComputePool::Next(Looker& own) {
  workers_.idle.fetch_add(1, std::memory_order_relaxed);
  if (spin_.count() > 0) {
    if (Job job = Look(own)) return job;
  }
  std::unique_lock lock = LockShortly(mutex_);
  while (!Claim()) {
    if (stopping_.load(std::memory_order_relaxed)) {
      workers_.idle.fetch_sub(1, std::memory_order_relaxed);
      return nullptr;
    }
    ++sleeping_;
    job_waits_.wait(lock);
    --sleeping_;
  }
  return TakeQueued();
}

void ComputePool::Work(int worker) {
  const std::string name = absl::StrCat("kvseek-work-", worker);
  pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
  index::Scratch scratch;
  Looker& own = workers_.each[static_cast<size_t>(worker)];
  while (const Job job = Next(own)) {
    scratch.Reset();
    job(scratch);
  }
}

ComputePool::Guest::Guest(ComputePool& pool, std::function<void()> business)
    : pool_(pool), business_(std::move(business)) {
  const size_t number = pool.guests_come_.fetch_add(1, std::memory_order_relaxed);
  if (number >= pool.guests_.each.size()) return;
  own_ = &pool.guests_.each[number];
  callers_worker = static_cast<size_t>(pool.workers()) + number;
}

ComputePool::Guest::~Guest() {
  Leave();
  callers_worker = 0;
}

bool ComputePool::Guest::Help() {
  using State = Looker::State;
  if (own_ == nullptr) return false;
  own_->looked.store(std::chrono::steady_clock::now().time_since_epoch().count(),
                     std::memory_order_relaxed);
  const State state = own_->state.load(std::memory_order_relaxed);
  if (state == State::kAway) {
    pool_.guests_.idle.fetch_add(1, std::memory_order_relaxed);
    own_->state.store(State::kLooking, std::memory_order_release);
  }
  if (state == State::kAway || state == State::kLooking) return false;
  RunHanded();
  return true;
}

void ComputePool::Guest::Leave() {
  using State = Looker::State;
  if (own_ == nullptr || own_->state.load(std::memory_order_relaxed) == State::kAway) return;
  State looking = State::kLooking;
  if (own_->state.compare_exchange_strong(looking, State::kAway)) {
    pool_.guests_.idle.fetch_sub(1, std::memory_order_relaxed);
  } else {
    RunHanded();
  }
}

void ComputePool::Guest::RunHanded() {
  const Job job = own_->TakeHanded();
  scratch_.Reset();
  callers_business = &business_;
  job(scratch_);
  callers_business = nullptr;
}

}  // namespace kvseek::service
