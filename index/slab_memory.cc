#include "index/slab_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "index/scratch.h"

namespace kvseek::index {
namespace {

// Slabs are aligned to kSlabBytes, so that a slot finds its slab.
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallPage = size_t{4} << 10;
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
    std::byte* const unneeded = TakeBack(slot, bytes);
    if (unneeded != nullptr) munmap(unneeded, kSlabBytes);  // takes long: without the lock
  }

  void Keep(size_t bytes) {
    std::vector<std::byte*> unneeded;
    {
      const std::lock_guard lock(mutex_);
      kept_ = bytes / kSlabBytes;
      spare_.reserve(kept_);
      while (!spare_.empty() && slabs_.size() + spare_.size() > kept_) {
        unneeded.push_back(spare_.back());
        spare_.pop_back();
      }
    }
    for (std::byte* const base : unneeded) munmap(base, kSlabBytes);
  }

  bool AddSpare() {
    {
      const std::lock_guard lock(mutex_);
      if (slabs_.size() + spare_.size() + coming_ >= kept_) return false;
      ++coming_;
    }
    std::byte* const base = MapSlab();
    for (size_t at = 0; base != nullptr && at < kSlabBytes; at += kSmallPage) {
      *static_cast<volatile std::byte*>(base + at) = std::byte{0};
    }
    const std::lock_guard lock(mutex_);
    --coming_;
    if (base == nullptr) return false;
    spare_.push_back(base);
    return true;
  }

  size_t bytes() {
    const std::lock_guard lock(mutex_);
    return (slabs_.size() + spare_.size()) * kSlabBytes;
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

  /// The slab that has become empty and is to be unmapped; null: none.
  std::byte* TakeBack(void* slot, size_t bytes) noexcept ABSL_LOCKS_EXCLUDED(mutex_) {
    auto* const base =
        static_cast<std::byte*>(slot) - reinterpret_cast<uintptr_t>(slot) % kSlabBytes;
    const std::lock_guard lock(mutex_);
    SizeClass& size = sizes_.find(RoundUp(bytes))->second;
    const auto found = slabs_.find(base);
    Slab& slab = *found->second;
    if (slab.free.empty()) size.with_room.splice(size.with_room.end(), size.full, found->second);
    slab.free.push_back(static_cast<std::byte*>(slot));  // has the capacity
    if (slab.free.size() < slab.slots) return nullptr;
    size.with_room.erase(found->second);
    slabs_.erase(found);
    if (slabs_.size() + spare_.size() + coming_ >= kept_) return base;
    spare_.push_back(base);  // has the capacity
    return nullptr;
  }

  void AddSlab(size_t slot_bytes, SizeClass& size) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    std::list<Slab> added(1);
    Slab& slab = added.front();
    slab.slots = kSlabBytes / slot_bytes;
    slab.free.reserve(slab.slots);
    const bool from_spare = !spare_.empty();
    std::byte* const base = from_spare ? spare_.back() : MapSlab();
    if (base == nullptr) throw std::bad_alloc();
    PutSlots(slot_bytes, base, slab);
    try {
      slabs_.emplace(base, added.begin());
    } catch (...) {
      if (!from_spare) munmap(base, kSlabBytes);
      throw;
    }
    if (from_spare) spare_.pop_back();
    size.with_room.splice(size.with_room.end(), added);
  }

  /// In such an order that slots taken one after the other begin in different huge pages: threads
  /// that fill them at once would each clear a page that they share, and one throw it away.
  static void PutSlots(size_t slot_bytes, std::byte* base, Slab& slab) {
    const size_t turns = kHugePage / slot_bytes + 1;  // slots that begin in a page, at most
    for (size_t turn = turns; turn > 0; --turn) {
      for (size_t page = kSlabBytes / kHugePage; page > 0; --page) {
        const size_t slot = ((page - 1) * kHugePage + slot_bytes - 1) / slot_bytes + turn - 1;
        if (slot < slab.slots && slot * slot_bytes < page * kHugePage) {
          slab.free.push_back(base + slot * slot_bytes);
        }
      }
    }
  }

  std::mutex mutex_;
  std::map<std::byte*, std::list<Slab>::iterator> slabs_ ABSL_GUARDED_BY(mutex_);
  /// As many as there are sizes of segments.
  std::map<size_t, SizeClass> sizes_ ABSL_GUARDED_BY(mutex_);
  size_t kept_ ABSL_GUARDED_BY(mutex_) = 0;  ///< slabs, spare ones among them, that may stay
  std::vector<std::byte*> spare_ ABSL_GUARDED_BY(mutex_);  ///< has a capacity of kept_
  size_t coming_ ABSL_GUARDED_BY(mutex_) = 0;              ///< spare ones that are being touched
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

void KeepSlabs(size_t bytes) { Heap().Keep(bytes); }
bool AddSpareSlab() { return Heap().AddSpare(); }
size_t SlabBytes() { return Heap().bytes(); }

}  // namespace kvseek::index
