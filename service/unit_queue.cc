#include "service/unit_queue.h"

#include <algorithm>
#include <cstdint>

#include "service/short_lock.h"

namespace kvseek::service {

UnitQueue::UnitQueue(size_t searches, int plans_max, std::pmr::memory_resource* memory)
    : plans_max_(plans_max),
      steps_(searches, memory),
      plans_ready_(searches > 0),
      unfinished_(searches) {}

std::optional<SearchUnit> UnitQueue::Take() {
  for (;;) {
    if (plans_ready_.load()) {
      if (const auto plan = TakePlan()) return plan;
    }
    Step* const step = front_.load();
    if (step == nullptr) {
      if (!plans_ready_.load()) return std::nullopt;
      continue;
    }
    if (step->left.load(std::memory_order_relaxed) > 0) {
      // A late worker may find the next step of the same search: its pieces are as good.
      const int left = step->left.fetch_sub(1, std::memory_order_acquire);
      if (left > 0) {
        const SearchUnit unit = {static_cast<size_t>(step - steps_.data()), step->pieces - left};
        if (left == 1) DropTaken();
        return unit;
      }
    }
    DropTaken();
  }
}

std::optional<SearchUnit> UnitQueue::TakePlan() {
  const auto lock = LockShortly(mutex_);
  if (!plans_ready_.load()) return std::nullopt;
  ++begun_;
  const SearchUnit unit = {next_plan_++, SearchUnit::kPlan};
  UpdatePlansReady();
  return unit;
}

void UnitQueue::UpdatePlansReady() {
  plans_ready_.store(next_plan_ < steps_.size() &&
                     (begun_ < plans_max_ || front_.load() == nullptr));
}

void UnitQueue::DropTaken() {
  const auto lock = LockShortly(mutex_);
  for (Step* step = front_.load(); step != nullptr && step->left.load() <= 0;
       step = front_.load()) {
    Unlist(*step);
  }
  UpdatePlansReady();
}

void UnitQueue::Unlist(Step& step) {
  step.listed = false;
  if (front_.load() == &step) {
    front_.store(step.next);
    if (step.next == nullptr) back_ = nullptr;
    return;
  }
  Step* before = front_.load();
  while (before->next != &step) before = before->next;
  before->next = step.next;
  if (back_ == &step) back_ = before;
}

int UnitQueue::Open(size_t search, int pieces, int enough) {
  const auto lock = LockShortly(mutex_);
  Step& step = steps_[search];
  if (step.listed) Unlist(step);  // all are taken, but nobody has looked since
  step.pieces = pieces;
  step.left.store(pieces, std::memory_order_release);
  step.listed = true;
  step.next = nullptr;
  if (back_ != nullptr) back_->next = &step;
  back_ = &step;
  if (front_.load() == nullptr) front_.store(&step);
  UpdatePlansReady();
  auto units = static_cast<int64_t>(steps_.size() - next_plan_);
  for (const Step* open = front_.load(); open != nullptr && units < enough; open = open->next) {
    units += std::max(0, open->left.load(std::memory_order_relaxed));
  }
  return static_cast<int>(std::min<int64_t>(units, enough));
}

size_t UnitQueue::Finish() {
  const auto lock = LockShortly(mutex_);
  --begun_;
  --unfinished_;
  UpdatePlansReady();
  return unfinished_;
}

}  // namespace kvseek::service
