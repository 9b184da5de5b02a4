#include "index/slab_memory.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <climits>
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

/// Asks for memory that nobody has touched to lie on a node of the system's. False: it refuses.
bool PlaceOn(int system_node, void* begin, size_t bytes) {
  constexpr size_t kWordBits = sizeof(unsigned long) * CHAR_BIT;  // NOLINT(google-runtime-int)
  std::array<unsigned long, 1024 / kWordBits> nodes{};            // NOLINT(google-runtime-int)
  const auto node = static_cast<size_t>(system_node);
  if (system_node < 0 || node >= nodes.size() * kWordBits) return false;
  nodes[node / kWordBits] |= 1UL << (node % kWordBits);
  // The kernel takes the number of bits for one more than there are.
  return syscall(SYS_mbind, begin, bytes, MPOL_PREFERRED, nodes.data(),
                 nodes.size() * kWordBits + 1, 0) == 0;
}

constexpr int kAnyNode = -1;  ///< of the system's

/// kSlabBytes of zeros, aligned to kSlabBytes; null: the system has no more.
std::byte* MapSlab(int system_node) {
  void* const mapped = mmap(nullptr, 2 * kSlabBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* const begin = static_cast<std::byte*>(mapped);
  const size_t before = (kSlabBytes - reinterpret_cast<uintptr_t>(begin) % kSlabBytes) % kSlabBytes;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + kSlabBytes, kSlabBytes - before);
  madvise(begin + before, kSlabBytes, MADV_HUGEPAGE);  // best effort, and so is the next
  if (system_node != kAnyNode) PlaceOn(system_node, begin + before, kSlabBytes);
  return begin + before;
}

constexpr size_t RoundUp(size_t bytes) {
  return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
}

class SlabHeap {
 public:
  void* Take(size_t bytes, int node) {
    const size_t slot_bytes = RoundUp(bytes);
    Unneeded unneeded;
    const std::lock_guard lock(mutex_);
    SizeClass& size = sizes_[{node, slot_bytes}];
    if (size.with_room.empty()) unneeded.reset(AddSlab(node, slot_bytes, size));
    Slab& slab = size.with_room.front();
    std::byte* const slot = slab.free.back();
    slab.free.pop_back();
    if (slab.free.empty())
      size.full.splice(size.full.begin(), size.with_room, size.with_room.begin());
    return slot;
  }

  void Give(void* slot, size_t bytes) noexcept { const Unneeded unneeded(TakeBack(slot, bytes)); }

  bool Place(std::vector<int> system_nodes) {
    bool accepted = true;
    for (const int node : system_nodes) {
      void* const page =
          mmap(nullptr, kSmallPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      accepted = accepted && page != MAP_FAILED && PlaceOn(node, page, kSmallPage);
      if (page != MAP_FAILED) munmap(page, kSmallPage);
    }
    const std::lock_guard lock(mutex_);
    system_nodes_ = std::move(system_nodes);
    return accepted;
  }

  void Keep(size_t bytes) {
    std::vector<Unneeded> unneeded;
    const std::lock_guard lock(mutex_);
    kept_ = bytes / kSlabBytes;
    spare_.reserve(kept_);
    while (!spare_.empty() && slabs_.size() + spare_.size() > kept_) {
      unneeded.emplace_back(spare_.back().base);
      TakeSpare(spare_.size() - 1);
    }
  }

  bool AddSpare(int node) {
    int system_node = kAnyNode;
    {
      const std::lock_guard lock(mutex_);
      if (slabs_.size() + spare_.size() + coming_ >= kept_) return false;
      ++coming_;
      system_node = SystemNode(node);
      on_node_.try_emplace(node);
    }
    std::byte* const base = MapSlab(system_node);
    for (size_t at = 0; base != nullptr && at < kSlabBytes; at += kSmallPage) {
      *static_cast<volatile std::byte*>(base + at) = std::byte{0};
    }
    const std::lock_guard lock(mutex_);
    --coming_;
    if (base == nullptr) return false;
    spare_.push_back({base, node});
    ++on_node_.find(node)->second;
    return true;
  }

  size_t bytes() {
    const std::lock_guard lock(mutex_);
    return (slabs_.size() + spare_.size()) * kSlabBytes;
  }

  size_t bytes(int node) {
    const std::lock_guard lock(mutex_);
    const auto found = on_node_.find(node);
    return found == on_node_.end() ? 0 : found->second * kSlabBytes;
  }

 private:
  struct Unmap {
    void operator()(std::byte* base) const noexcept { munmap(base, kSlabBytes); }
  };
  /// A slab that goes back to the system, which takes long: declared before the lock is taken.
  using Unneeded = std::unique_ptr<std::byte, Unmap>;
  struct Spare {
    std::byte* base = nullptr;
    int node = 0;
  };
  struct Slab {
    int node = 0;
    size_t slots = 0;
    std::vector<std::byte*> free;
  };
  struct SizeClass {
    std::list<Slab> with_room;  ///< a free slot at least
    std::list<Slab> full;
  };

  int SystemNode(int node) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto at = static_cast<size_t>(node);
    return at < system_nodes_.size() ? system_nodes_[at] : kAnyNode;
  }

  std::byte* TakeSpare(size_t at) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const Spare spare = spare_[at];
    spare_.erase(spare_.begin() + static_cast<std::ptrdiff_t>(at));
    --on_node_.find(spare.node)->second;
    return spare.base;
  }

  /// The slab that has become empty and is to be unmapped; null: none.
  std::byte* TakeBack(void* slot, size_t bytes) noexcept ABSL_LOCKS_EXCLUDED(mutex_) {
    auto* const base =
        static_cast<std::byte*>(slot) - reinterpret_cast<uintptr_t>(slot) % kSlabBytes;
    const std::lock_guard lock(mutex_);
    const auto found = slabs_.find(base);
    Slab& slab = *found->second;
    const int node = slab.node;
    SizeClass& size = sizes_.find({node, RoundUp(bytes)})->second;
    if (slab.free.empty()) size.with_room.splice(size.with_room.end(), size.full, found->second);
    slab.free.push_back(static_cast<std::byte*>(slot));  // has the capacity
    if (slab.free.size() < slab.slots) return nullptr;
    size.with_room.erase(found->second);
    slabs_.erase(found);
    if (slabs_.size() + spare_.size() + coming_ >= kept_) {
      --on_node_.find(node)->second;
      return base;
    }
    spare_.push_back({base, node});  // has the capacity
    return nullptr;
  }

  /// Returns a spare slab of another node, to be unmapped, where a new one would be more than may
  /// stay; else null.
  std::byte* AddSlab(int node, size_t slot_bytes, SizeClass& size)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    std::list<Slab> added(1);
    Slab& slab = added.front();
    slab.node = node;
    slab.slots = kSlabBytes / slot_bytes;
    slab.free.reserve(slab.slots);
    size_t spare = spare_.size();  // the last of the node's
    while (spare > 0 && spare_[spare - 1].node != node) --spare;
    Unneeded mapped;
    if (spare == 0) {
      mapped.reset(MapSlab(SystemNode(node)));
      if (mapped == nullptr) throw std::bad_alloc();
    }
    std::byte* const base = spare == 0 ? mapped.get() : spare_[spare - 1].base;
    PutSlots(slot_bytes, base, slab);
    size_t& on_node = on_node_[node];
    slabs_.emplace(base, added.begin());
    size.with_room.splice(size.with_room.end(), added);
    ++on_node;
    if (spare > 0) {
      TakeSpare(spare - 1);
      return nullptr;
    }
    (void)mapped.release();
    const bool too_many = slabs_.size() + spare_.size() + coming_ > kept_;
    return too_many && !spare_.empty() ? TakeSpare(spare_.size() - 1) : nullptr;
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
  /// By node and size; as many as there are nodes, times sizes of segments.
  std::map<std::pair<int, size_t>, SizeClass> sizes_ ABSL_GUARDED_BY(mutex_);
  std::map<int, size_t> on_node_ ABSL_GUARDED_BY(mutex_);  ///< slabs, spare ones among them
  std::vector<int> system_nodes_ ABSL_GUARDED_BY(mutex_);
  size_t kept_ ABSL_GUARDED_BY(mutex_) = 0;  ///< slabs, spare ones among them, that may stay
  std::vector<Spare> spare_ ABSL_GUARDED_BY(mutex_);  ///< has a capacity of kept_
  size_t coming_ ABSL_GUARDED_BY(mutex_) = 0;         ///< spare ones that are being touched
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

void* TakeSlot(size_t bytes, int node) {
  if (bytes == 0) bytes = 1;
  if (StandsAlone(bytes)) return MakeAligned<std::byte>(bytes).release();
  return Heap().Take(bytes, node);
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
bool AddSpareSlab(int node) { return Heap().AddSpare(node); }
bool PlaceSlabs(std::vector<int> system_nodes) { return Heap().Place(std::move(system_nodes)); }
size_t SlabBytes() { return Heap().bytes(); }
size_t SlabBytes(int node) { return Heap().bytes(node); }

}  // namespace kvseek::index
