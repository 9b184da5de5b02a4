#include "index/slab_memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "index/scratch.h"

namespace kvseek::index {
namespace {

constexpr size_t kSlabBytes = size_t{32}
                              << 20;  // aligned to as much, so that a slot finds its slab
static_assert(sizeof(void*) == 8, "slabs take twice their size of addresses for a moment");

/// kSlabBytes of zeros, aligned to kSlabBytes; null: the system has no more.
std::byte* MapSlab() {
  void* const mapped = mmap(nullptr, 2 * kSlabBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* const begin = static_cast<std::byte*>(mapped);
  const size_t before = (kSlabBytes - reinterpret_cast<uintptr_t>(begin) % kSlabBytes) % kSlabBytes;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + kSlabBytes, kSlabBytes - before);
  madvise(begin + before, kSlabBytes, MADV_HUGEPAGE);  // best effort
  return begin + before;
}

constexpr size_t RoundUp(size_t bytes) {
  return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
}

class SlabHeap {
 public:
  void* Take(size_t bytes) {
    const size_t slot_bytes = RoundUp(bytes);
    const std::lock_guard lock(mutex_);
    SizeClass& size = sizes_[slot_bytes];
    if (size.with_room.empty()) AddSlab(slot_bytes, size);
    Slab& slab = size.with_room.front();
    std::byte* const slot = slab.free.back();
    slab.free.pop_back();
    if (slab.free.empty())
      size.full.splice(size.full.begin(), size.with_room, size.with_room.begin());
    return slot;
  }

  void Give(void* slot, size_t bytes) noexcept {
    auto* const base =
        static_cast<std::byte*>(slot) - reinterpret_cast<uintptr_t>(slot) % kSlabBytes;
    const std::lock_guard lock(mutex_);
    SizeClass& size = sizes_.find(RoundUp(bytes))->second;
    const auto found = slabs_.find(base);
    Slab& slab = *found->second;
    if (slab.free.empty()) size.with_room.splice(size.with_room.end(), size.full, found->second);
    slab.free.push_back(static_cast<std::byte*>(slot));  // has the capacity
    if (slab.free.size() < slab.slots) return;
    size.with_room.erase(found->second);
    slabs_.erase(found);
    munmap(base, kSlabBytes);
  }

  size_t bytes() {
    const std::lock_guard lock(mutex_);
    return slabs_.size() * kSlabBytes;
  }

 private:
  struct Slab {
    size_t slots = 0;
    std::vector<std::byte*> free;
  };
  struct SizeClass {
    std::list<Slab> with_room;  ///< a free slot at least
    std::list<Slab> full;
  };

  void AddSlab(size_t slot_bytes, SizeClass& size) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    std::list<Slab> added(1);
    Slab& slab = added.front();
    slab.slots = kSlabBytes / slot_bytes;
    slab.free.reserve(slab.slots);
    std::byte* const base = MapSlab();
    if (base == nullptr) throw std::bad_alloc();
    for (size_t i = slab.slots; i > 0; --i) slab.free.push_back(base + (i - 1) * slot_bytes);
    try {
      slabs_.emplace(base, added.begin());
    } catch (...) {
      munmap(base, kSlabBytes);
      throw;
    }
    size.with_room.splice(size.with_room.end(), added);
  }

  std::mutex mutex_;
  std::map<std::byte*, std::list<Slab>::iterator> slabs_ ABSL_GUARDED_BY(mutex_);
  /// As many as there are sizes of segments.
  std::map<size_t, SizeClass> sizes_ ABSL_GUARDED_BY(mutex_);
};

/// Never destroyed: segments may be given back while the process ends.
SlabHeap& Heap() {
  static auto* const heap = new SlabHeap;
  return *heap;
}

/// Slots that no slab holds, and, so that they find what is written beside a slot, all under the
/// address sanitizer.
bool StandsAlone(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  (void)bytes;
  return true;
#else
  return bytes > kSlabBytes / 4;
#endif
}

}  // namespace

void* TakeSlot(size_t bytes) {
  if (bytes == 0) bytes = 1;
  if (StandsAlone(bytes)) return MakeAligned<std::byte>(bytes).release();
  return Heap().Take(bytes);
}

void GiveSlotBack(void* slot, size_t bytes) noexcept {
  if (slot == nullptr) return;
  if (bytes == 0) bytes = 1;
  if (StandsAlone(bytes)) {
    AlignedFree()(slot);
  } else {
    Heap().Give(slot, bytes);
  }
}

size_t SlabBytes() { return Heap().bytes(); }

}  // namespace kvseek::index
