// What the searches of a layer left for the decode steps after them (index/reuse.h).
//
// One selection for each KV head, that of the last search which was asked to leave one. It belongs
// to the layer and not to its state: a fork begins without, and queries change it while appends go
// on. A selection is good as long as the layer still holds the very segments that it was made of,
// which is looked at whenever it is asked for; so nobody has to tell it of a truncation in time.
// Its memory is of the budget; where that refuses, the next step is searched.
#ifndef KVSEEK_SERVICE_SELECTION_MEMORY_H_
#define KVSEEK_SERVICE_SELECTION_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "index/key_index.h"
#include "index/reuse.h"
#include "service/memory_budget.h"

namespace kvseek::service {

/// Thread-safe: what is handed out is immutable. Of two searches that end at once one is
/// remembered.
class SelectionMemory {
 public:
  explicit SelectionMemory(size_t kv_heads) : slots_(kv_heads) {}
  /// Bytes that it takes without any selection.
  static uint64_t BookkeepingBytes(size_t kv_heads) { return kv_heads * sizeof(Slot); }

  /// Counts a step of one KV head. The selection that it may be answered from; null if a search is
  /// due: `every` steps are over since the last, that was not one of `index`, or its keys are not
  /// all in `view`.
  std::shared_ptr<const index::LastSearch> NextStep(size_t kv_head, int every,
                                                    const index::KeyIndex& index,
                                                    const index::KvView& view)
      ABSL_LOCKS_EXCLUDED(mutex_);

  /// Takes what a search of `index` in `view` left in place of what is there; nothing where `last`
  /// is null or of no whole block, or the budget refuses.
  void Remember(size_t kv_head, const index::KeyIndex& index, const index::KvView& view,
                std::shared_ptr<const index::LastSearch> last, MemoryBudget& budget)
      ABSL_LOCKS_EXCLUDED(mutex_);

  /// Gives back the memory of what is not all in `view`, the KV head's new state.
  void ForgetGone(size_t kv_head, const index::KvView& view) ABSL_LOCKS_EXCLUDED(mutex_);

  uint64_t Bytes() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  /// A selection and the memory that it takes.
  struct Remembered {
    std::shared_ptr<const index::LastSearch> last;
    std::string index;  ///< its name
    /// The last that the selection is of: who holds it holds all before it.
    std::weak_ptr<const index::Segment> segment;
    MemoryBudget::Reservation memory;

    bool IsOf(const index::KvView& view) const;
  };
  struct Slot {
    std::shared_ptr<const Remembered> remembered;
    int steps_since = 0;
  };

  mutable std::mutex mutex_;  ///< held for the swap of a pointer only
  std::vector<Slot> slots_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SELECTION_MEMORY_H_
