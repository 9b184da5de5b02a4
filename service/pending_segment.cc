#include "service/pending_segment.h"

#include <cassert>
#include <cstring>
#include <utility>

#include "service/head_cache.h"

namespace kvseek::service {
namespace {

using Reservation = MemoryBudget::Reservation;

/// A segment and the memory it was promised.
struct AccountedSegment {
  std::shared_ptr<const index::Segment> segment;
  Reservation memory;
};

}  // namespace

std::shared_ptr<const index::Segment> WithMemory(std::shared_ptr<const index::Segment> segment,
                                                 Reservation&& memory) {
  auto accounted = std::make_shared<AccountedSegment>();
  accounted->segment = std::move(segment);
  accounted->memory = std::move(memory);
  const index::Segment* const made = accounted->segment.get();
  return {std::move(accounted), made};
}

PendingSegment::PendingSegment(const index::KvShape& shape,
                               std::vector<std::shared_ptr<TailChunk>> chunks, Reservation memory)
    : shape_(shape), chunks_(std::move(chunks)), memory_(std::move(memory)) {
  assert(chunks_.size() * index::kTailChunkTokens == index::kSegmentTokens);
}

PendingSegment::PendingSegment(std::shared_ptr<const index::Segment> made)
    : made_(true), segment_(std::move(made)) {}

std::shared_ptr<const index::Segment> PendingSegment::Make(index::Scratch& scratch) {
  std::vector<std::shared_ptr<TailChunk>> gone;  // after the lock
  const std::lock_guard lock(mutex_);
  if (segment_ != nullptr) return segment_;
  scratch.Reset();
  index::Segment::Draft draft(shape_);
  const size_t key_bytes = index::kTailChunkTokens * shape_.KeyRowBytes();
  const size_t value_bytes = index::kTailChunkTokens * shape_.ValueRowBytes();
  auto* keys = reinterpret_cast<uint8_t*>(draft.keys());
  auto* values = reinterpret_cast<uint8_t*>(draft.values());
  for (const auto& chunk : chunks_) {
    std::memcpy(keys, chunk->keys(), key_bytes);
    std::memcpy(values, chunk->values(), value_bytes);
    keys += key_bytes;
    values += value_bytes;
  }
  segment_ = WithMemory(draft.Encode(scratch), std::move(memory_));
  made_.store(true, std::memory_order_release);
  gone.swap(chunks_);
  return segment_;
}

}  // namespace kvseek::service
