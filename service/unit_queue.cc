#include "service/unit_queue.h"

#include <algorithm>
#include <cstdint>

#include "service/short_lock.h"

namespace kvseek::service {

void UnitQueue::List::PushBack(Step& step) {
  step.next = nullptr;
  if (back != nullptr) back->next = &step;
  back = &step;
  if (front.load() == nullptr) front.store(&step);
}

UnitQueue::UnitQueue(size_t searches_max, absl::Span<const int> workers_of_nodes,
                     std::pmr::memory_resource* memory)
    : steps_(searches_max, memory), nodes_(workers_of_nodes.size(), memory) {
  for (size_t n = 0; n < nodes_.size(); ++n) {
    nodes_[n].begun_max = kPlansOfWorker * workers_of_nodes[n];
  }
}

void UnitQueue::Add(int node) {
  const std::lock_guard lock(mutex_);
  Step& step = steps_[searches_++];
  step.node = static_cast<int>(static_cast<size_t>(node) % nodes_.size());
  ++unfinished_;
  Node& own = nodes_[static_cast<size_t>(step.node)];
  own.waiting.PushBack(step);
  UpdatePlansReady(own);
}

std::optional<SearchUnit> UnitQueue::Take(int node) {
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const auto unit = TakeOf(nodes_[(static_cast<size_t>(node) + i) % nodes_.size()]);
    if (unit.has_value()) return unit;
  }
  return std::nullopt;
}

std::optional<SearchUnit> UnitQueue::TakeOf(Node& node) {
  for (;;) {
    if (node.plans_ready.load()) {
      if (const auto plan = TakePlan(node)) return plan;
    }
    Step* const step = node.open.front.load();
    if (step == nullptr) {
      if (!node.plans_ready.load()) return std::nullopt;
      continue;
    }
    if (step->left.load(std::memory_order_relaxed) > 0) {
      // A late worker may find the next step of the same search: its pieces are as good.
      const int left = step->left.fetch_sub(1, std::memory_order_acquire);
      if (left > 0) {
        const SearchUnit unit = {Number(*step), step->pieces - left, step->node};
        if (left == 1) DropTaken(node);
        return unit;
      }
    }
    DropTaken(node);
  }
}

std::optional<SearchUnit> UnitQueue::TakePlan(Node& node) {
  const auto lock = LockShortly(mutex_);
  if (!node.plans_ready.load()) return std::nullopt;
  Step& step = *node.waiting.front.load();
  Unlist(node.waiting, step);
  ++node.begun;
  ++planned_;
  UpdatePlansReady(node);
  return SearchUnit{Number(step), SearchUnit::kPlan, step.node};
}

void UnitQueue::UpdatePlansReady(Node& node) {
  node.plans_ready.store(node.waiting.front.load() != nullptr &&
                         (node.begun < node.begun_max || node.open.front.load() == nullptr));
}

void UnitQueue::DropTaken(Node& node) {
  const auto lock = LockShortly(mutex_);
  for (Step* step = node.open.front.load(); step != nullptr && step->left.load() <= 0;
       step = node.open.front.load()) {
    Unlist(node.open, *step);
  }
  UpdatePlansReady(node);
}

void UnitQueue::Unlist(List& list, Step& step) {
  step.listed = false;
  if (list.front.load() == &step) {
    list.front.store(step.next);
    if (step.next == nullptr) list.back = nullptr;
    return;
  }
  Step* before = list.front.load();
  while (before->next != &step) before = before->next;
  before->next = step.next;
  if (list.back == &step) list.back = before;
}

bool UnitQueue::MayHaveUnits() const {
  for (size_t n = 0; n < nodes_.size(); ++n) {
    if (nodes_[n].plans_ready.load() || nodes_[n].open.front.load() != nullptr) return true;
  }
  return false;
}

int UnitQueue::Open(size_t search, int pieces, int enough) {
  const auto lock = LockShortly(mutex_);
  Step& step = steps_[search];
  Node& node = nodes_[static_cast<size_t>(step.node)];
  if (step.listed) Unlist(node.open, step);  // all are taken, but nobody has looked since
  step.pieces = pieces;
  step.left.store(pieces, std::memory_order_release);
  step.listed = true;
  node.open.PushBack(step);
  UpdatePlansReady(node);
  auto units = static_cast<int64_t>(searches_ - planned_);
  for (size_t n = 0; n < nodes_.size(); ++n) {
    const Step* open = nodes_[n].open.front.load();
    for (; open != nullptr && units < enough; open = open->next) {
      units += std::max(0, open->left.load(std::memory_order_relaxed));
    }
  }
  return static_cast<int>(std::min<int64_t>(units, enough));
}

size_t UnitQueue::Finish(size_t search) {
  const auto lock = LockShortly(mutex_);
  Node& node = nodes_[static_cast<size_t>(steps_[search].node)];
  --node.begun;
  UpdatePlansReady(node);
  return --unfinished_;
}

}  // namespace kvseek::service
