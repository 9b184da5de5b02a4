// Memory for segments: slots of equal size, cut from slabs of huge pages.
//
// A search of a long sequence touches some ten thousand scattered lines; with pages of 4 KiB nearly
// each of them costs a walk of the page tables as well. A segment is too small for huge pages of
// its own (2 MiB), so many share a slab. The system is asked for huge pages, and small ones do
// where it has none.
//
// Process-wide, as malloc is: segments outlive whoever made them. Slots of one size come from
// slabs of their own; a slab goes back to the system when its last slot is given back.
#ifndef KVSEEK_INDEX_SLAB_MEMORY_H_
#define KVSEEK_INDEX_SLAB_MEMORY_H_

#include <cstddef>
#include <memory>

namespace kvseek::index {

/// `bytes` uninitialised bytes, aligned to a cache line. Throws std::bad_alloc. Thread-safe.
void* TakeSlot(size_t bytes);
/// Gives back what TakeSlot(bytes) returned. Thread-safe.
void GiveSlotBack(void* slot, size_t bytes) noexcept;

struct SlotFree {
  size_t bytes = 0;
  void operator()(std::byte* slot) const noexcept { GiveSlotBack(slot, bytes); }
};
using Slot = std::unique_ptr<std::byte[], SlotFree>;

inline Slot MakeSlot(size_t bytes) {
  return Slot(static_cast<std::byte*>(TakeSlot(bytes)), SlotFree{bytes});
}

/// Bytes of the slabs that the process has now. Thread-safe.
size_t SlabBytes();

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_SLAB_MEMORY_H_
