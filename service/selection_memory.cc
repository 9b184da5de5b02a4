#include "service/selection_memory.h"

#include <utility>

#include "kernels/cpu/ladder_codes.h"

namespace kvseek::service {
namespace {

/// The segment that holds the last block of a selection.
size_t LastSegment(const index::LastSearch& last) {
  constexpr int64_t kBlocks = index::kSegmentTokens / kernels::kScanBlock;
  return static_cast<size_t>((last.last_block - 1) / kBlocks);
}

}  // namespace

bool SelectionMemory::Remembered::IsOf(const index::KvView& view) const {
  const size_t at = LastSegment(*last);
  if (at >= view.segments.size()) return false;
  const std::shared_ptr<const index::Segment>& held = view.segments[at];
  return !segment.owner_before(held) && !held.owner_before(segment);
}

std::shared_ptr<const index::LastSearch> SelectionMemory::NextStep(size_t kv_head, int every,
                                                                   const index::KeyIndex& index,
                                                                   const index::KvView& view) {
  std::shared_ptr<const Remembered> remembered;
  {
    const std::lock_guard lock(mutex_);
    Slot& slot = slots_[kv_head];
    if (slot.remembered == nullptr || ++slot.steps_since >= every) return nullptr;
    remembered = slot.remembered;
  }
  if (remembered->index != index.name() || !remembered->IsOf(view)) return nullptr;
  return {remembered, remembered->last.get()};
}

void SelectionMemory::Remember(size_t kv_head, const index::KeyIndex& index,
                               const index::KvView& view,
                               std::shared_ptr<const index::LastSearch> last,
                               MemoryBudget& budget) {
  std::shared_ptr<const Remembered> before;
  {
    const std::lock_guard lock(mutex_);
    before.swap(slots_[kv_head].remembered);
  }
  before.reset();  // its memory may be what the next one needs
  if (last == nullptr || last->last_block <= last->first_block) return;
  auto memory = budget.Reserve(last->Bytes(), "options.reuse_keep");
  if (!memory.ok()) return;
  auto next = std::make_shared<Remembered>();
  next->index = std::string(index.name());
  next->segment = view.segments[LastSegment(*last)];
  next->memory = *std::move(memory);
  next->last = std::move(last);
  Slot slot{std::move(next), 0};
  const std::lock_guard lock(mutex_);
  std::swap(slots_[kv_head], slot);
}

void SelectionMemory::ForgetGone(size_t kv_head, const index::KvView& view) {
  std::shared_ptr<const Remembered> gone;
  const std::lock_guard lock(mutex_);
  Slot& slot = slots_[kv_head];
  if (slot.remembered != nullptr && !slot.remembered->IsOf(view)) gone.swap(slot.remembered);
}

uint64_t SelectionMemory::Bytes() const {
  uint64_t bytes = 0;
  const std::lock_guard lock(mutex_);
  for (const Slot& slot : slots_) {
    if (slot.remembered != nullptr) bytes += slot.remembered->memory.bytes();
  }
  return bytes;
}

}  // namespace kvseek::service
