#include "service/unit_queue.h"

#include <algorithm>
#include <cstdint>

#include "service/short_lock.h"
#include "transport/pause.h"

namespace kvseek::service {
namespace {

// A worker takes so small a part of its share at a time: the last ones end at about the same time.
constexpr int kTakesOfShare = 8;

}  // namespace

UnitQueue::UnitQueue(size_t searches_max, absl::Span<const int> workers_of_nodes,
                     std::pmr::memory_resource* memory)
    : steps_(searches_max, memory), nodes_(workers_of_nodes.size(), memory) {
  for (size_t n = 0; n < nodes_.size(); ++n) {
    nodes_[n].begun_max = kPlansOfWorker * workers_of_nodes[n];
    workers_ += workers_of_nodes[n];
  }
}

void UnitQueue::Add(int node) {
  Step& step = steps_[searches_++];
  step.node = static_cast<int>(static_cast<size_t>(node) % nodes_.size());
  Node& own = nodes_[static_cast<size_t>(step.node)];
  if (own.last_plan == nullptr) {
    own.plan.store(&step);
  } else {
    own.last_plan->next_plan = &step;
  }
  own.last_plan = &step;
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
    if (PlansFirst(node)) {
      if (const auto plan = TakePlan(node)) return plan;
    }
    Step* step = node.front.load();
    if (step == nullptr) {
      if (!PlansFirst(node)) return std::nullopt;
      continue;
    }
    // Steps that nobody has dropped yet are passed over. One that is opened again meanwhile may end
    // the walk early; another follows, as long as the list is not empty.
    for (; step != nullptr; step = step->next.load(std::memory_order_acquire)) {
      const auto piece = TakePiece(*step);
      if (!piece.has_value()) continue;
      if (piece->piece + piece->pieces == step->pieces) DropTaken(node);
      return piece;
    }
    if (!DropTaken(node)) transport::Pause();
  }
}

std::optional<SearchUnit> UnitQueue::TakePlan(Node& node) {
  int begun = node.begun.load();
  do {
    if (begun >= node.begun_max && node.front.load() != nullptr) return std::nullopt;
  } while (!node.begun.compare_exchange_weak(begun, begun + 1));
  Step* step = node.plan.load();
  while (step != nullptr && !node.plan.compare_exchange_weak(step, step->next_plan)) {
  }
  if (step == nullptr) {
    node.begun.fetch_sub(1);
    return std::nullopt;
  }
  planned_.fetch_add(1);
  return SearchUnit{Number(*step), SearchUnit::kPlan, 1, step->node};
}

std::optional<SearchUnit> UnitQueue::TakePiece(Step& step) {
  if (step.left.load(std::memory_order_relaxed) <= 0) return std::nullopt;
  // A late worker may find the next step of the same search: its pieces are as good.
  const int together = step.together.load(std::memory_order_relaxed);
  const int left = step.left.fetch_sub(together, std::memory_order_acquire);
  if (left <= 0) return std::nullopt;
  return SearchUnit{Number(step), step.pieces - left, std::min(together, left), step.node};
}

bool UnitQueue::DropTaken(Node& node) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return false;
  for (Step* step = node.front.load(); step != nullptr && step->left.load() <= 0;
       step = node.front.load()) {
    Unlist(node, *step);
  }
  return true;
}

void UnitQueue::Unlist(Node& node, Step& step) {
  step.listed = false;
  Step* const next = step.next.load();
  if (node.front.load() == &step) {
    node.front.store(next);
    if (next == nullptr) node.back = nullptr;
    return;
  }
  Step* before = node.front.load();
  while (before->next.load() != &step) before = before->next.load();
  before->next.store(next);
  if (node.back == &step) node.back = before;
}

bool UnitQueue::MayHaveUnits() const {
  for (const Node& node : nodes_) {
    if (node.front.load() != nullptr || PlansFirst(node)) return true;
  }
  return false;
}

int UnitQueue::Open(size_t search, int pieces, int enough) {
  const auto lock = LockShortly(mutex_);
  Step& step = steps_[search];
  Node& node = nodes_[static_cast<size_t>(step.node)];
  if (step.listed) Unlist(node, step);  // all are taken, but nobody has dropped it since
  int64_t units = pieces + static_cast<int64_t>(searches_ - planned_.load());
  for (const Node& other : nodes_) {
    const Step* open = other.front.load();
    for (; open != nullptr && units < enough; open = open->next.load()) {
      units += std::max(0, open->left.load(std::memory_order_relaxed));
    }
  }
  step.pieces = pieces;
  step.together.store(Together(pieces), std::memory_order_relaxed);
  step.next.store(nullptr);
  step.left.store(pieces, std::memory_order_release);
  step.listed = true;
  if (node.back != nullptr) node.back->next.store(&step, std::memory_order_release);
  node.back = &step;
  if (node.front.load() == nullptr) node.front.store(&step);
  return static_cast<int>(std::min<int64_t>(units, enough));
}

int UnitQueue::Together(int pieces) const {
  const auto searches = static_cast<int64_t>(searches_ - finished_.load(std::memory_order_relaxed));
  const int64_t takes = std::max<int64_t>(int64_t{kTakesOfShare} * workers_, 1);
  return static_cast<int>(std::clamp<int64_t>(searches * pieces / takes, 1, kTogetherMax));
}

size_t UnitQueue::Finish(size_t search) {
  nodes_[static_cast<size_t>(steps_[search].node)].begun.fetch_sub(1);
  return searches_ - finished_.fetch_add(1) - 1;
}

}  // namespace kvseek::service
