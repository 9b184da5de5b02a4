// Keys and values of one (layer, KV head) of a session.
//
//   positions  0 ........ 1023 | 1024 ...... 2047 | 2048 .. 2111 | 2112 .. 2130
//              segment         | segment          | tail chunk   | tail chunk (partly filled)
//
// A HeadCache is the memory of the tokens and never changes, but for rows that are added behind all
// that anybody knows of. How many of its rows there are, its owner knows (LayerState::tokens): an
// append within the last chunk makes no new HeadCache, any other one makes one that shares all
// whole segments and nearly all chunks with it. So whoever holds one may read it without a lock for
// as long as it likes, and a fork is a copy of a pointer. A chunk that is shared is still appended
// to in place, by the one owner that wins the claim on its next rows; one that loses copies the
// chunk. Rows below an owner's own count are never written again.
//
// Tokens 1024 i .. 1024 i + 1023 become a segment when they are index::kSealDelay tokens old
// (index::SealedTokens). Until then they are part of the tail, and their segment is a pending one.
#ifndef KVSEEK_SERVICE_HEAD_CACHE_H_
#define KVSEEK_SERVICE_HEAD_CACHE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "index/key_index.h"
#include "index/scratch.h"
#include "index/segment.h"
#include "index/slab_memory.h"
#include "service/memory_budget.h"
#include "service/pending_segment.h"

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

/// Memory of 64 tokens after the last segment. Shared by caches; see the claim below. Out of slabs,
/// which stay: the system would clear a malloc'ed chunk's pages anew for each.
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

  uint16_t* keys() { return keys_; }      ///< (64, key_dim)
  uint16_t* values() { return values_; }  ///< (64, value_dim)

 private:
  MemoryBudget::Reservation memory_;
  std::atomic<int> claimed_{0};
  const index::Slot slot_;  ///< both arrays
  uint16_t* const keys_;
  uint16_t* const values_;
};

/// Thread-safe; copies share everything. `held` is always the owner's number of tokens: as many as
/// there were when this cache was made, or more by what AppendInPlace has added since.
class HeadCache {
 public:
  explicit HeadCache(const index::KvShape& shape);

  const index::KvShape& shape() const { return shape_; }
  /// Valid while this object or a copy lives.
  index::KvView View(int64_t held) const;
  /// Row of one position. REQUIRES: 0 <= position < held.
  const uint16_t* KeyRow(int64_t position) const;
  const uint16_t* ValueRow(int64_t position) const;

  /// Adds `rows` in the last chunk. False: they do not fit, end a chunk's use or make a segment
  /// due, or somebody else has claimed the place; nothing has been done then.
  bool AppendInPlace(int64_t held, const StridedRows& rows) const;
  /// Asks for what AppendInPlace needs.
  void PrefetchPlace() const {
    if (last_ != nullptr) __builtin_prefetch(last_, 1);
  }
  /// This cache and `rows` after it. Takes memory from the grant; resource_exhausted leaves nothing
  /// behind. Empties `scratch` and uses it. Has a new pending() where many rows do not make the
  /// segment at once.
  absl::StatusOr<HeadCache> Append(int64_t held, StridedRows rows, MemoryGrant& memory,
                                   index::Scratch& scratch) const;
  /// The first `tokens` tokens, no more than are held. What is left of a segment is copied into
  /// chunks.
  absl::StatusOr<HeadCache> Truncate(int64_t tokens, MemoryGrant& memory) const;

  /// Bytes that Append and Truncate take; a concurrent fork may make Append need one chunk more.
  uint64_t AppendBytes(int64_t held, int64_t tokens) const;
  uint64_t TruncateBytes(int64_t tokens) const;
  /// Whether Append would make a segment itself, which takes long.
  bool AppendMakesSegment(int64_t held, int64_t tokens) const;
  /// Bytes of keys, values and codes of a cache of this size, shared or not. Within kSealDelay
  /// tokens of a segment's end there may be as many chunks more as it was made of.
  static uint64_t Bytes(const index::KvShape& shape, int64_t tokens);
  /// Of what is not counted there, at most; segments' pointers apart.
  static uint64_t BookkeepingBytes();

  /// The next segment, once its tokens are all there; null: they are not.
  const std::shared_ptr<PendingSegment>& pending() const { return parts_->pending; }

 private:
  using SegmentList = std::vector<std::shared_ptr<const index::Segment>>;
  using ChunkList = std::vector<std::shared_ptr<TailChunk>>;

  /// What caches share that have the same: an append of one token copies none of it.
  struct Parts {
    std::shared_ptr<const SegmentList> segments;
    std::shared_ptr<PendingSegment> pending;
    /// The pending one, where its rows are the tail's first 1024; null: chunks have them.
    std::shared_ptr<const index::Segment> front;
    ChunkList chunks;                        ///< after front
    std::vector<index::TailChunkView> tail;  ///< of front and chunks

    int64_t SealedTokens() const {
      return static_cast<int64_t>(segments->size()) * index::kSegmentTokens;
    }
    void ShowFront(const index::KvShape& shape, std::shared_ptr<const index::Segment> segment);
    void AddChunk(std::shared_ptr<TailChunk> chunk);
    /// The pending segment's tokens leave the tail.
    void DropPending();
  };
  class Growth;

  HeadCache(const index::KvShape& shape, Parts parts);
  /// Rows of one position on, as many as stand together there.
  StridedRows RowsFrom(int64_t position, int64_t end) const;

  index::KvShape shape_;
  std::shared_ptr<const Parts> parts_;
  TailChunk* last_;  ///< of parts_->chunks; null: there is none
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_HEAD_CACHE_H_
