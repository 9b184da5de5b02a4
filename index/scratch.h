// Aligned memory: arrays that live as long as their owner, a worker's scratch for one piece of
// work, and a search's own. Arrays of what is trivial are taken from a scratch as they are; lists
// that grow are std::pmr::vectors over it.
#ifndef KVSEEK_INDEX_SCRATCH_H_
#define KVSEEK_INDEX_SCRATCH_H_

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <memory_resource>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvseek::index {

inline constexpr size_t kCacheLine = 64;

struct AlignedFree {
  void operator()(void* pointer) const { std::free(pointer); }
};

/// An uninitialised array of trivial elements, aligned to a cache line.
template <typename T>
using AlignedArray = std::unique_ptr<T[], AlignedFree>;

template <typename T>
AlignedArray<T> MakeAligned(size_t count) {
  static_assert(std::is_trivially_copyable_v<T>);
  const size_t bytes = (count * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
  void* pointer = std::aligned_alloc(kCacheLine, bytes == 0 ? kCacheLine : bytes);
  if (pointer == nullptr) throw std::bad_alloc();
  return AlignedArray<T>(static_cast<T*>(pointer));
}

/// Memory for one piece of work, handed out in order and taken back all at once. Blocks are kept,
/// so that a warm scratch allocates nothing. Not thread-safe: each worker has its own.
///
/// What a list over it outgrows is lost until Reset, which must not come before the list is gone.
class Scratch final : public std::pmr::memory_resource {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  /// `count` uninitialised elements, aligned to a cache line, valid until Reset.
  template <typename T>
  T* Take(size_t count) {
    static_assert(std::is_trivially_copyable_v<T>);
    return static_cast<T*>(allocate(count * sizeof(T), kCacheLine));
  }

  /// Takes everything back.
  void Reset() {
    block_ = 0;
    used_ = 0;
  }

  /// Of the blocks that it keeps.
  size_t Bytes() const {
    size_t bytes = 0;
    for (const Block& block : blocks_) bytes += block.bytes;
    return bytes;
  }

 private:
  // A request's lists need the first only.
  static constexpr size_t kFirstBlockBytes = size_t{16} << 10;
  static constexpr size_t kBlockBytes = size_t{1} << 20;

  struct Block {
    AlignedArray<std::byte> data;
    size_t bytes = 0;
  };

  /// Any alignment up to a cache line.
  void* do_allocate(size_t bytes, size_t /*alignment*/) override {
    bytes = (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
    while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].bytes) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      const size_t least = blocks_.empty() ? kFirstBlockBytes : kBlockBytes;
      const size_t block_bytes = bytes > least ? bytes : least;
      blocks_.push_back({MakeAligned<std::byte>(block_bytes), block_bytes});
    }
    void* pointer = blocks_[block_].data.get() + used_;
    used_ += bytes;
    return pointer;
  }
  void do_deallocate(void*, size_t, size_t) override {}
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override {
    return this == &other;
  }

  std::vector<Block> blocks_;
  size_t block_ = 0;
  size_t used_ = 0;
};

/// Gives a scratch back to those that are kept. Thread-safe.
struct KeepScratch {
  void operator()(Scratch* scratch) const noexcept;
};

/// A scratch that one search has, or one request. It is one that an earlier one left, if there is
/// one: large arrays that come and go with each search would be returned to the system and faulted
/// in again. The process keeps kSpareScratches of at most kSpareBytes each.
using SearchMemory = std::unique_ptr<Scratch, KeepScratch>;

inline constexpr size_t kSpareScratches = 64;
inline constexpr size_t kSpareBytes = size_t{4} << 20;

/// Thread-safe.
SearchMemory TakeSearchMemory();

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_SCRATCH_H_
