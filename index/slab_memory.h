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
//
// A slab lies on one NUMA node, as far as the system has memory there (PlaceSlabs), and its slots
// are for those who ask for that node.
#ifndef KVSEEK_INDEX_SLAB_MEMORY_H_
#define KVSEEK_INDEX_SLAB_MEMORY_H_

#include <cstddef>
#include <memory>
#include <vector>

namespace kvseek::index {

inline constexpr size_t kSlabBytes = size_t{32} << 20;

/// `bytes` uninitialised bytes on a node, aligned to a cache line. Those of more than kSlabBytes /
/// 4 lie wherever they are first touched. Throws std::bad_alloc. Thread-safe.
void* TakeSlot(size_t bytes, int node = 0);
/// Gives back what TakeSlot(bytes) returned. Thread-safe.
void GiveSlotBack(void* slot, size_t bytes) noexcept;

struct SlotFree {
  size_t bytes = 0;
  void operator()(std::byte* slot) const noexcept { GiveSlotBack(slot, bytes); }
};
using Slot = std::unique_ptr<std::byte[], SlotFree>;

inline Slot MakeSlot(size_t bytes, int node = 0) {
  return Slot(static_cast<std::byte*>(TakeSlot(bytes, node)), SlotFree{bytes});
}

/// From now on new slabs of node n are asked to lie on the system's node system_nodes[n]; those of
/// other nodes, and all at first, lie where they are first touched. A node without free memory lets
/// others help out. False: the system does not let this process say where memory lies on one of
/// them; the rest goes on. Thread-safe.
bool PlaceSlabs(std::vector<int> system_nodes);

/// From now on slabs of so many bytes, those in use among them, stay with the process once it has
/// them; 0, as at first: none. Thread-safe.
void KeepSlabs(size_t bytes);
/// Takes one more slab of a node from the system and touches it, if it may stay as a spare one.
/// False: it may not, or there is none. Thread-safe: threads that call it touch slabs side by side.
bool AddSpareSlab(int node = 0);

/// Bytes of the slabs that the process has now, spare ones included. Thread-safe.
size_t SlabBytes();
/// Of them those that were asked for on a node.
size_t SlabBytes(int node);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_SLAB_MEMORY_H_
