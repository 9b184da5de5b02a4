// A segment whose tokens are all there and whose codes nobody needs yet (index/segment.h,
// kSealDelay): a worker makes it beside the decoder's steps, or whoever needs it does.
#ifndef KVSEEK_SERVICE_PENDING_SEGMENT_H_
#define KVSEEK_SERVICE_PENDING_SEGMENT_H_

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "index/key_index.h"
#include "index/scratch.h"
#include "index/segment.h"
#include "service/memory_budget.h"

namespace kvseek::service {

class TailChunk;

/// Shared by all head caches that have its tokens. Thread-safe.
class PendingSegment {
 public:
  /// To be made of sixteen whole chunks, with memory for one segment.
  PendingSegment(const index::KvShape& shape, std::vector<std::shared_ptr<TailChunk>> chunks,
                 MemoryBudget::Reservation memory);
  /// Made already; has its memory.
  explicit PendingSegment(std::shared_ptr<const index::Segment> made);

  /// The segment, made by the first caller while others wait. Empties `scratch` and uses it. Throws
  /// std::bad_alloc, and the next caller tries again.
  std::shared_ptr<const index::Segment> Make(index::Scratch& scratch) ABSL_LOCKS_EXCLUDED(mutex_);
  bool made() const { return made_.load(std::memory_order_acquire); }

 private:
  const index::KvShape shape_;
  std::atomic<bool> made_{false};
  std::mutex mutex_;
  std::vector<std::shared_ptr<TailChunk>> chunks_ ABSL_GUARDED_BY(mutex_);  ///< until it is made
  MemoryBudget::Reservation memory_ ABSL_GUARDED_BY(mutex_);                ///< until it is made
  std::shared_ptr<const index::Segment> segment_ ABSL_GUARDED_BY(mutex_);
};

/// A segment that gives `memory` back when it goes.
std::shared_ptr<const index::Segment> WithMemory(std::shared_ptr<const index::Segment> segment,
                                                 MemoryBudget::Reservation&& memory);

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_PENDING_SEGMENT_H_
