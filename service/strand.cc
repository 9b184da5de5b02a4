#include "service/strand.h"

#include <mutex>
#include <utility>

namespace kvseek::service {

bool Strand::Queue(State& state, ComputePool::Job job) {
  const std::lock_guard lock(state.mutex);
  state.jobs.push_back(std::move(job));
  return !std::exchange(state.busy, true);
}

void Strand::Submit(ComputePool& pool, ComputePool::Job job) {
  if (!Queue(*state_, std::move(job))) return;
  pool.Submit([&pool, state = state_](index::Scratch& scratch) { RunNext(pool, state, scratch); });
}

void Strand::RunNext(ComputePool& pool, const StatePtr& state, index::Scratch& scratch) {
  ComputePool::Job job;
  {
    const std::lock_guard lock(state->mutex);
    job = std::move(state->jobs.front());
    state->jobs.pop_front();
  }
  job(scratch);
  job = nullptr;
  {
    const std::lock_guard lock(state->mutex);
    state->busy = !state->jobs.empty();
    if (!state->busy) return;
  }
  pool.Submit([&pool, state](index::Scratch& own) { RunNext(pool, state, own); });
}

void StrandJobs::Add(Strand& strand, ComputePool::Job job) {
  if (states_.size() == states_.capacity()) states_.reserve(2 * states_.size() + 8);
  if (Strand::Queue(*strand.state_, std::move(job))) states_.push_back(strand.state_);
  ++size_;
}

void StrandJobs::RunOn(ComputePool& pool) {
  size_ = 0;
  if (states_.empty()) return;
  pool.Submit([&pool, states = std::exchange(states_, {})](index::Scratch& scratch) {
    for (const Strand::StatePtr& state : states) {
      scratch.Reset();
      Strand::RunNext(pool, state, scratch);
    }
  });
}

}  // namespace kvseek::service
