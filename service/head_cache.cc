#include "service/head_cache.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <utility>

namespace kvseek::service {
namespace {

using index::kSegmentTokens;
using index::kTailChunkTokens;
using Reservation = MemoryBudget::Reservation;

constexpr int64_t ChunksFor(int64_t tokens) {
  return (tokens + kTailChunkTokens - 1) / kTailChunkTokens;
}

/// Copies `count` rows of `dim` elements that stand `stride` apart.
void Gather(const uint16_t* rows, size_t stride, int64_t count, int dim, uint16_t* out) {
  const auto width = static_cast<size_t>(dim);
  if (stride == width) {
    std::memcpy(out, rows, static_cast<size_t>(count) * width * sizeof(uint16_t));
    return;
  }
  for (int64_t t = 0; t < count; ++t, rows += stride, out += width) {
    std::memcpy(out, rows, width * sizeof(uint16_t));
  }
}

/// Copies rows to a chunk's rows `filled` and following, which the caller has claimed.
void CopyRows(const index::KvShape& shape, const StridedRows& rows, TailChunk& chunk, int filled) {
  const auto at = static_cast<size_t>(filled);
  Gather(rows.keys, rows.key_stride, rows.tokens, shape.key_dim,
         chunk.keys() + at * static_cast<size_t>(shape.key_dim));
  Gather(rows.values, rows.value_stride, rows.tokens, shape.value_dim,
         chunk.values() + at * static_cast<size_t>(shape.value_dim));
}

/// The first `count` rows, which are taken off `rows`.
StridedRows TakeRows(StridedRows& rows, int64_t count) {
  StridedRows first = rows;
  first.tokens = count;
  rows.tokens -= count;
  rows.keys += static_cast<size_t>(count) * rows.key_stride;
  rows.values += static_cast<size_t>(count) * rows.value_stride;
  return first;
}

constexpr int64_t kSealAt = kSegmentTokens + index::kSealDelay;  ///< tokens of a tail
/// Rows of one append that complete a segment: more, and it is made of them at once.
constexpr int64_t kRowsAfterwards = 64;
constexpr size_t kChunksOfSegment = kSegmentTokens / kTailChunkTokens;
// Segments end, and become due, where chunks end.
static_assert(kSegmentTokens % kTailChunkTokens == 0 && kSealAt % kTailChunkTokens == 0);

}  // namespace

// ---- chunks

TailChunk::TailChunk(const index::KvShape& shape, Reservation memory)
    : memory_(std::move(memory)),
      slot_(index::MakeSlot(kTailChunkTokens * (shape.KeyRowBytes() + shape.ValueRowBytes()),
                            shape.node)),
      keys_(reinterpret_cast<uint16_t*>(slot_.get())),
      values_(keys_ + kTailChunkTokens * static_cast<size_t>(shape.key_dim)) {}

uint64_t TailChunk::Bytes(const index::KvShape& shape) {
  return kTailChunkTokens * (shape.KeyRowBytes() + shape.ValueRowBytes()) + sizeof(TailChunk);
}

// ---- parts

void HeadCache::Parts::ShowFront(const index::KvShape& shape,
                                 std::shared_ptr<const index::Segment> segment) {
  chunks.clear();
  tail.clear();
  for (size_t i = 0; i < kChunksOfSegment; ++i) {
    const size_t row = i * kTailChunkTokens;
    tail.push_back({segment->keys() + row * static_cast<size_t>(shape.key_dim),
                    segment->values() + row * static_cast<size_t>(shape.value_dim)});
  }
  front = std::move(segment);
}

void HeadCache::Parts::AddChunk(std::shared_ptr<TailChunk> chunk) {
  tail.push_back({chunk->keys(), chunk->values()});
  chunks.push_back(std::move(chunk));
}

void HeadCache::Parts::DropPending() {
  constexpr auto kGone = static_cast<std::ptrdiff_t>(kChunksOfSegment);
  if (front == nullptr) chunks.erase(chunks.begin(), chunks.begin() + kGone);
  tail.erase(tail.begin(), tail.begin() + kGone);
  front = nullptr;
  pending = nullptr;
}

// ---- growing

/// A cache that is being made; what it has in common with others is shared, not changed.
class HeadCache::Growth {
 public:
  Growth(const index::KvShape& shape, Parts parts, int64_t held, MemoryGrant& memory)
      : shape_(shape),
        parts_(std::move(parts)),
        tail_tokens_(held - parts_.SealedTokens()),
        memory_(memory) {}

  /// Adds rows and seals what is due.
  absl::Status Add(StridedRows rows, index::Scratch& scratch) {
    absl::Status status;
    for (;;) {
      const int64_t end = tail_tokens_ + rows.tokens;
      if (parts_.pending != nullptr && end >= kSealAt) {
        Seal(scratch);
      } else if (parts_.pending == nullptr && end >= kSegmentTokens) {
        status = Complete(TakeRows(rows, kSegmentTokens - tail_tokens_), scratch);
      } else {
        return AddToChunks(rows);
      }
      if (!status.ok()) return status;
    }
  }
  /// Adds rows behind others, no more than kSealAt tokens of the tail in all.
  absl::Status AddToChunks(StridedRows rows);

  Parts Finish() { return std::move(parts_); }

 private:
  void Seal(index::Scratch& scratch);
  /// Adds the last rows of the next segment, which is then pending.
  absl::Status Complete(const StridedRows& rows, index::Scratch& scratch);
  /// A segment of the tail and `rows`.
  std::shared_ptr<const index::Segment> Build(const StridedRows& rows,
                                              index::Scratch& scratch) const;
  /// A chunk whose first `claimed` rows are claimed.
  absl::StatusOr<std::shared_ptr<TailChunk>> MakeChunk(int claimed);

  const index::KvShape& shape_;
  Parts parts_;
  int64_t tail_tokens_;
  MemoryGrant& memory_;
};

void HeadCache::Growth::Seal(index::Scratch& scratch) {
  auto segments = std::make_shared<SegmentList>();
  segments->reserve(parts_.segments->size() + 1);
  *segments = *parts_.segments;
  segments->push_back(parts_.pending->Make(scratch));
  parts_.segments = std::move(segments);
  parts_.DropPending();
  tail_tokens_ -= kSegmentTokens;
}

absl::Status HeadCache::Growth::Complete(const StridedRows& rows, index::Scratch& scratch) {
  absl::StatusOr<Reservation> memory = memory_.Take(index::Segment::Bytes(shape_));
  if (!memory.ok()) return memory.status();
  if (rows.tokens > kRowsAfterwards) {
    auto segment = WithMemory(Build(rows, scratch), *std::move(memory));
    parts_.pending = std::make_shared<PendingSegment>(segment);
    parts_.ShowFront(shape_, std::move(segment));
    tail_tokens_ = kSegmentTokens;
    return absl::OkStatus();
  }
  if (absl::Status status = AddToChunks(rows); !status.ok()) return status;
  parts_.pending = std::make_shared<PendingSegment>(shape_, parts_.chunks, *std::move(memory));
  return absl::OkStatus();
}

std::shared_ptr<const index::Segment> HeadCache::Growth::Build(const StridedRows& rows,
                                                               index::Scratch& scratch) const {
  index::Segment::Draft draft(shape_);
  const auto key_dim = static_cast<size_t>(shape_.key_dim);
  const auto value_dim = static_cast<size_t>(shape_.value_dim);
  uint16_t* keys = draft.keys();
  uint16_t* values = draft.values();
  const auto add = [&](const StridedRows& some) {
    Gather(some.keys, some.key_stride, some.tokens, shape_.key_dim, keys);
    Gather(some.values, some.value_stride, some.tokens, shape_.value_dim, values);
    keys += static_cast<size_t>(some.tokens) * key_dim;
    values += static_cast<size_t>(some.tokens) * value_dim;
  };
  int64_t left = tail_tokens_;
  for (const index::TailChunkView& chunk : parts_.tail) {
    add({std::min<int64_t>(left, kTailChunkTokens), chunk.keys, chunk.values, key_dim, value_dim});
    left -= kTailChunkTokens;
  }
  add(rows);
  scratch.Reset();
  return draft.Encode(scratch);
}

absl::Status HeadCache::Growth::AddToChunks(StridedRows rows) {
  while (rows.tokens > 0) {
    const auto filled = static_cast<int>(tail_tokens_ % kTailChunkTokens);
    const auto count = static_cast<int>(std::min<int64_t>(rows.tokens, kTailChunkTokens - filled));
    TailChunk* chunk = filled != 0 ? parts_.chunks.back().get() : nullptr;
    if (chunk == nullptr || !chunk->Claim(filled, count)) {
      absl::StatusOr<std::shared_ptr<TailChunk>> own = MakeChunk(filled + count);
      if (!own.ok()) return own.status();
      if (chunk != nullptr) {
        const auto rows_before = static_cast<size_t>(filled);
        std::memcpy((*own)->keys(), chunk->keys(), rows_before * shape_.KeyRowBytes());
        std::memcpy((*own)->values(), chunk->values(), rows_before * shape_.ValueRowBytes());
        parts_.chunks.pop_back();
        parts_.tail.pop_back();
      }
      chunk = own->get();
      parts_.AddChunk(*std::move(own));
    }
    CopyRows(shape_, TakeRows(rows, count), *chunk, filled);
    tail_tokens_ += count;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<TailChunk>> HeadCache::Growth::MakeChunk(int claimed) {
  absl::StatusOr<Reservation> taken = memory_.Take(TailChunk::Bytes(shape_));
  if (!taken.ok()) return taken.status();
  auto chunk = std::make_shared<TailChunk>(shape_, *std::move(taken));
  const bool first = chunk->Claim(0, claimed);
  assert(first);
  static_cast<void>(first);
  return chunk;
}

// ---- the cache

HeadCache::HeadCache(const index::KvShape& shape)
    : HeadCache(shape, {std::make_shared<const SegmentList>(), nullptr, nullptr, {}, {}}) {}

HeadCache::HeadCache(const index::KvShape& shape, Parts parts)
    : shape_(shape),
      parts_(std::make_shared<const Parts>(std::move(parts))),
      last_(parts_->chunks.empty() ? nullptr : parts_->chunks.back().get()) {}

index::KvView HeadCache::View(int64_t held) const {
  return {shape_, *parts_->segments, parts_->tail, held - parts_->SealedTokens()};
}

StridedRows HeadCache::RowsFrom(int64_t position, int64_t end) const {
  const int64_t sealed = parts_->SealedTokens();
  const auto key_dim = static_cast<size_t>(shape_.key_dim);
  const auto value_dim = static_cast<size_t>(shape_.value_dim);
  const int64_t unit = position < sealed ? kSegmentTokens : kTailChunkTokens;
  const auto row = static_cast<size_t>(position % unit);
  StridedRows rows{std::min(end, position - position % unit + unit) - position, nullptr, nullptr,
                   key_dim, value_dim};
  if (position < sealed) {
    const index::Segment& segment = *(*parts_->segments)[static_cast<size_t>(position / unit)];
    rows.keys = segment.keys();
    rows.values = segment.values();
  } else {
    const index::TailChunkView& chunk =
        parts_->tail[static_cast<size_t>((position - sealed) / unit)];
    rows.keys = chunk.keys;
    rows.values = chunk.values;
  }
  rows.keys += row * key_dim;
  rows.values += row * value_dim;
  return rows;
}

const uint16_t* HeadCache::KeyRow(int64_t position) const {
  return RowsFrom(position, position + 1).keys;
}

const uint16_t* HeadCache::ValueRow(int64_t position) const {
  return RowsFrom(position, position + 1).values;
}

bool HeadCache::AppendInPlace(int64_t held, const StridedRows& rows) const {
  const auto filled = static_cast<int>(held % kTailChunkTokens);
  const int64_t end = held + rows.tokens;
  if (filled == 0 || filled + rows.tokens > kTailChunkTokens) return false;
  if (end % kSegmentTokens == 0) return false;
  if (end % kSegmentTokens == index::kSealDelay && parts_->pending != nullptr) return false;
  if (!last_->Claim(filled, static_cast<int>(rows.tokens))) return false;
  CopyRows(shape_, rows, *last_, filled);
  return true;
}

absl::StatusOr<HeadCache> HeadCache::Append(int64_t held, StridedRows rows, MemoryGrant& memory,
                                            index::Scratch& scratch) const {
  Growth growth(shape_, *parts_, held, memory);
  if (absl::Status status = growth.Add(rows, scratch); !status.ok()) return status;
  return HeadCache(shape_, growth.Finish());
}

absl::StatusOr<HeadCache> HeadCache::Truncate(int64_t tokens, MemoryGrant& memory) const {
  const int64_t sealed = index::SealedTokens(tokens);
  const int64_t left = tokens - sealed;
  Parts parts;
  int64_t at = sealed;  // up to where `parts` has them
  if (sealed == parts_->SealedTokens()) {
    if (parts_->front == nullptr || left >= kSegmentTokens) {
      parts = *parts_;
      const auto kept = static_cast<size_t>(ChunksFor(left));
      parts.tail.resize(kept);
      parts.chunks.resize(kept - (parts.front == nullptr ? 0 : kChunksOfSegment));
      if (left < kSegmentTokens) parts.pending = nullptr;
      return HeadCache(shape_, std::move(parts));
    }
    parts.segments = parts_->segments;
  } else {
    const auto kept = static_cast<std::ptrdiff_t>(sealed / kSegmentTokens);
    const auto begin = parts_->segments->begin();
    parts.segments = std::make_shared<const SegmentList>(begin, begin + kept);
    if (left >= kSegmentTokens) {
      parts.pending = std::make_shared<PendingSegment>(*(begin + kept));
      parts.ShowFront(shape_, *(begin + kept));
      at += kSegmentTokens;
    }
  }
  Growth growth(shape_, std::move(parts), at, memory);
  while (at < tokens) {
    const StridedRows rows = RowsFrom(at, tokens);
    if (absl::Status status = growth.AddToChunks(rows); !status.ok()) return status;
    at += rows.tokens;
  }
  return HeadCache(shape_, growth.Finish());
}

uint64_t HeadCache::AppendBytes(int64_t held, int64_t tokens) const {
  if (tokens == 0) return 0;
  const int64_t end = held + tokens;
  const int64_t first = held / kSegmentTokens;  // segment that may be completed
  const int64_t completed = end / kSegmentTokens - first;
  const uint64_t segments = static_cast<uint64_t>(completed) * index::Segment::Bytes(shape_);
  const bool built = completed > 0 && (first + 1) * kSegmentTokens - held > kRowsAfterwards;
  int64_t chunks = ChunksFor(end % kSegmentTokens);
  if (!built) {
    const int64_t until = completed == 0 ? end : (first + 1) * kSegmentTokens;
    chunks = ChunksFor(until) - ChunksFor(held) + (completed == 0 ? 0 : chunks);
    const auto filled = static_cast<int>(held % kTailChunkTokens);
    if (filled != 0 && parts_->chunks.back()->claimed() != filled) ++chunks;
  }
  return segments + static_cast<uint64_t>(chunks) * TailChunk::Bytes(shape_);
}

bool HeadCache::AppendMakesSegment(int64_t held, int64_t tokens) const {
  const int64_t end = held - parts_->SealedTokens() + tokens;
  if (parts_->pending != nullptr) return end >= kSealAt && !parts_->pending->made();
  return end >= kSealAt ||
         (end >= kSegmentTokens && kSegmentTokens - held % kSegmentTokens > kRowsAfterwards);
}

uint64_t HeadCache::TruncateBytes(int64_t tokens) const {
  const int64_t sealed = index::SealedTokens(tokens);
  const int64_t left = tokens - sealed;
  const bool shortens = sealed < parts_->SealedTokens();
  if (!shortens && (parts_->front == nullptr || left >= kSegmentTokens)) return 0;
  return static_cast<uint64_t>(ChunksFor(left % kSegmentTokens)) * TailChunk::Bytes(shape_);
}

uint64_t HeadCache::Bytes(const index::KvShape& shape, int64_t tokens) {
  return static_cast<uint64_t>(tokens / kSegmentTokens) * index::Segment::Bytes(shape) +
         static_cast<uint64_t>(ChunksFor(tokens % kSegmentTokens)) * TailChunk::Bytes(shape);
}

uint64_t HeadCache::BookkeepingBytes() {
  constexpr uint64_t kChunks = kSealAt / kTailChunkTokens;
  return sizeof(HeadCache) + sizeof(Parts) + sizeof(PendingSegment) +
         kChunks * (sizeof(index::TailChunkView) + 2 * sizeof(std::shared_ptr<TailChunk>));
}

}  // namespace kvseek::service
