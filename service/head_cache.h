// Keys and values of one (layer, KV head) of a session.
//
//   positions  0 ........ 1023 | 1024 ...... 2047 | 2048 .. 2111 | 2112 .. 2130
//              segment         | segment          | tail chunk   | tail chunk (partly filled)
//
// A HeadCache is a value: it never changes, and appending or truncating makes another one that
// shares all whole segments and nearly all chunks with it. So whoever holds one may read it without
// a lock for as long as it likes, and a fork is a copy of pointers. A chunk that is shared is still
// appended to in place, by the one cache that wins the claim on its next rows; a cache that loses
// copies the chunk. Rows below a cache's own count are never written again.
#ifndef KVSEEK_SERVICE_HEAD_CACHE_H_
#define KVSEEK_SERVICE_HEAD_CACHE_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "index/key_index.h"
#include "index/scratch.h"
#include "index/segment.h"
#include "service/memory_budget.h"

namespace kvseek::service {

/// Rows to be appended, of one KV head: row t stands at keys + t * key_stride (strides in
/// elements).
struct StridedRows {
  int64_t tokens = 0;
  const uint16_t* keys = nullptr;
  const uint16_t* values = nullptr;
  size_t key_stride = 0;
  size_t value_stride = 0;
};

/// Memory of 64 tokens after the last segment. Shared by caches; see the claim below.
class TailChunk {
 public:
  TailChunk(const index::KvShape& shape, MemoryBudget::Reservation memory);
  /// Bytes that a chunk reserves.
  static uint64_t Bytes(const index::KvShape& shape);

  /// Wins rows [held, held + count) for the caller alone, if nobody has claimed a row past `held`
  /// yet.
  bool Claim(int held, int count) {
    return claimed_.compare_exchange_strong(held, held + count, std::memory_order_relaxed);
  }
  int claimed() const { return claimed_.load(std::memory_order_relaxed); }

  uint16_t* keys() { return keys_.get(); }      ///< (64, key_dim)
  uint16_t* values() { return values_.get(); }  ///< (64, value_dim)

 private:
  MemoryBudget::Reservation memory_;
  std::atomic<int> claimed_{0};
  index::AlignedArray<uint16_t> keys_;
  index::AlignedArray<uint16_t> values_;
};

/// Immutable, so thread-safe; copies share everything.
class HeadCache {
 public:
  explicit HeadCache(const index::KvShape& shape);

  int64_t tokens() const { return SealedTokens() + tail_tokens_; }
  const index::KvShape& shape() const { return shape_; }
  /// Valid while this object lives and is not assigned to.
  index::KvView View() const { return {shape_, *segments_, Tail()}; }
  /// Row of one position. REQUIRES: 0 <= position < tokens().
  const uint16_t* KeyRow(int64_t position) const;
  const uint16_t* ValueRow(int64_t position) const;

  /// This cache and `rows` after it; seals what makes whole segments. Takes memory from the grant;
  /// resource_exhausted leaves nothing behind. Empties `scratch` and uses it.
  absl::StatusOr<HeadCache> Append(const StridedRows& rows, MemoryGrant& memory,
                                   index::Scratch& scratch) const;
  /// The first `tokens` tokens of this cache. What is left of a segment is copied into chunks.
  absl::StatusOr<HeadCache> Truncate(int64_t tokens, MemoryGrant& memory) const;

  /// Bytes that Append and Truncate take; a concurrent fork may make Append need one chunk more.
  uint64_t AppendBytes(int64_t tokens) const;
  uint64_t TruncateBytes(int64_t tokens) const;
  /// Bytes of keys, values and codes of a cache of this size, shared or not.
  static uint64_t Bytes(const index::KvShape& shape, int64_t tokens);

 private:
  using SegmentList = std::vector<std::shared_ptr<const index::Segment>>;
  using ChunkList = std::vector<std::shared_ptr<TailChunk>>;
  static constexpr size_t kChunksMax = index::kSegmentTokens / index::kTailChunkTokens;

  static std::shared_ptr<const ChunkList> NoChunks();
  absl::Span<const index::TailChunkView> Tail() const { return {tail_.data(), chunks_->size()}; }
  int64_t SealedTokens() const {
    return static_cast<int64_t>(segments_->size()) * index::kSegmentTokens;
  }
  /// A segment of a tail and the rows after it, 1024 tokens together.
  absl::StatusOr<std::shared_ptr<const index::Segment>> Seal(
      absl::Span<const index::TailChunkView> tail, const StridedRows& rows, MemoryGrant& memory,
      index::Scratch& scratch) const;
  /// Copies `rows` to the end of the tail of this object, which nobody else sees yet.
  absl::Status AppendToTail(StridedRows rows, MemoryGrant& memory);
  /// A chunk whose first `claimed` rows are claimed.
  absl::StatusOr<std::shared_ptr<TailChunk>> MakeChunk(int claimed, MemoryGrant& memory) const;
  void RefreshTail();

  // Lists are shared by all caches that have the same: an append of one token copies none.
  index::KvShape shape_;
  std::shared_ptr<const SegmentList> segments_;
  std::shared_ptr<const ChunkList> chunks_;
  std::array<index::TailChunkView, kChunksMax> tail_;  ///< of chunks_
  int tail_tokens_ = 0;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_HEAD_CACHE_H_
