// Memory for segments: slots of equal size, cut from slabs of huge pages.
//
// A search of a long sequence touches some ten thousand scattered lines; with pages of 4 KiB nearly
// each of them costs a walk of the page tables as well. A segment is too small for huge pages of
// its own (2 MiB), so many share a slab. The system is asked for huge pages, and small ones do
// where it has none.
//
// Process-wide, as malloc is: segments outlive whoever made them. Slots of one size come from
// slabs of their own. A slab without slots in use is kept as a spare one, for slots of any size, as
// long as all slabs together are within KeepSlabs; else it goes back to the system. New memory is
// cleared by the system when it is first touched, which takes longer than encoding what is then
// written there; spare slabs have been touched.
#ifndef KVSEEK_INDEX_SLAB_MEMORY_H_
#define KVSEEK_INDEX_SLAB_MEMORY_H_

#include <cstddef>
#include <memory>

namespace kvseek::index {

inline constexpr size_t kSlabBytes = size_t{32} << 20;

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

/// From now on slabs of so many bytes, those in use among them, stay with the process once it has
/// them; 0, as at first: none. Thread-safe.
void KeepSlabs(size_t bytes);
/// Takes one more slab from the system and touches it, if it may stay as a spare one. False: it may
/// not, or there is none. Thread-safe: threads that call it touch slabs side by side.
bool AddSpareSlab();

/// Bytes of the slabs that the process has now, spare ones included. Thread-safe.
size_t SlabBytes();

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_SLAB_MEMORY_H_
