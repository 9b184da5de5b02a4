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

/// The first `count` rows, which are taken off `rows`.
StridedRows TakeRows(StridedRows& rows, int64_t count) {
  StridedRows first = rows;
  first.tokens = count;
  rows.tokens -= count;
  rows.keys += static_cast<size_t>(count) * rows.key_stride;
  rows.values += static_cast<size_t>(count) * rows.value_stride;
  return first;
}

/// A segment and the memory it was promised.
struct AccountedSegment {
  std::shared_ptr<const index::Segment> segment;
  Reservation memory;
};

}  // namespace

std::shared_ptr<const HeadCache::ChunkList> HeadCache::NoChunks() {
  static const auto none = std::make_shared<const ChunkList>();
  return none;
}

TailChunk::TailChunk(const index::KvShape& shape, Reservation memory)
    : memory_(std::move(memory)),
      keys_(index::MakeAligned<uint16_t>(kTailChunkTokens * static_cast<size_t>(shape.key_dim))),
      values_(
          index::MakeAligned<uint16_t>(kTailChunkTokens * static_cast<size_t>(shape.value_dim))) {}

uint64_t TailChunk::Bytes(const index::KvShape& shape) {
  return kTailChunkTokens * (shape.KeyRowBytes() + shape.ValueRowBytes()) + sizeof(TailChunk);
}

HeadCache::HeadCache(const index::KvShape& shape)
    : shape_(shape), segments_(std::make_shared<const SegmentList>()), chunks_(NoChunks()) {}

const uint16_t* HeadCache::KeyRow(int64_t position) const {
  assert(position >= 0 && position < tokens());
  const auto dim = static_cast<size_t>(shape_.key_dim);
  if (position < SealedTokens()) {
    const index::Segment& segment = *(*segments_)[static_cast<size_t>(position / kSegmentTokens)];
    return segment.keys() + static_cast<size_t>(position % kSegmentTokens) * dim;
  }
  const int64_t offset = position - SealedTokens();
  return tail_[static_cast<size_t>(offset / kTailChunkTokens)].keys +
         static_cast<size_t>(offset % kTailChunkTokens) * dim;
}

const uint16_t* HeadCache::ValueRow(int64_t position) const {
  assert(position >= 0 && position < tokens());
  const auto dim = static_cast<size_t>(shape_.value_dim);
  if (position < SealedTokens()) {
    const index::Segment& segment = *(*segments_)[static_cast<size_t>(position / kSegmentTokens)];
    return segment.values() + static_cast<size_t>(position % kSegmentTokens) * dim;
  }
  const int64_t offset = position - SealedTokens();
  return tail_[static_cast<size_t>(offset / kTailChunkTokens)].values +
         static_cast<size_t>(offset % kTailChunkTokens) * dim;
}

absl::StatusOr<HeadCache> HeadCache::Append(const StridedRows& rows, MemoryGrant& memory,
                                            index::Scratch& scratch) const {
  HeadCache next = *this;
  StridedRows left = rows;
  if (tail_tokens_ + rows.tokens >= kSegmentTokens) {
    auto segments = std::make_shared<SegmentList>(*segments_);
    absl::Span<const index::TailChunkView> tail = Tail();
    int64_t filled = tail_tokens_;
    while (filled + left.tokens >= kSegmentTokens) {
      const StridedRows part = TakeRows(left, kSegmentTokens - filled);
      scratch.Reset();
      auto segment = Seal(tail, part, memory, scratch);
      if (!segment.ok()) return segment.status();
      segments->push_back(*std::move(segment));
      tail = {};
      filled = 0;
    }
    next.segments_ = std::move(segments);
    next.chunks_ = NoChunks();
    next.tail_tokens_ = 0;
  }
  if (absl::Status status = next.AppendToTail(left, memory); !status.ok()) return status;
  next.RefreshTail();
  return next;
}

absl::StatusOr<HeadCache> HeadCache::Truncate(int64_t tokens, MemoryGrant& memory) const {
  if (tokens >= this->tokens()) return *this;
  HeadCache next = *this;
  if (tokens >= SealedTokens()) {
    next.tail_tokens_ = static_cast<int>(tokens - SealedTokens());
    const auto kept = static_cast<std::ptrdiff_t>(ChunksFor(next.tail_tokens_));
    next.chunks_ = std::make_shared<const ChunkList>(chunks_->begin(), chunks_->begin() + kept);
    next.RefreshTail();
    return next;
  }
  const int64_t whole = tokens / kSegmentTokens;
  next.segments_ =
      std::make_shared<const SegmentList>(segments_->begin(), segments_->begin() + whole);
  next.chunks_ = NoChunks();
  next.tail_tokens_ = 0;
  const index::Segment& cut = *(*segments_)[static_cast<size_t>(whole)];
  const StridedRows rest{tokens % kSegmentTokens, cut.keys(), cut.values(),
                         static_cast<size_t>(shape_.key_dim),
                         static_cast<size_t>(shape_.value_dim)};
  if (absl::Status status = next.AppendToTail(rest, memory); !status.ok()) return status;
  next.RefreshTail();
  return next;
}

uint64_t HeadCache::AppendBytes(int64_t tokens) const {
  if (tokens == 0) return 0;
  const int64_t tail = tail_tokens_ + tokens;
  if (tail >= kSegmentTokens) return Bytes(shape_, tail);
  int64_t chunks = ChunksFor(tail) - ChunksFor(tail_tokens_);
  const int filled = tail_tokens_ % kTailChunkTokens;
  if (filled != 0 && chunks_->back()->claimed() != filled) ++chunks;
  return static_cast<uint64_t>(chunks) * TailChunk::Bytes(shape_);
}

uint64_t HeadCache::TruncateBytes(int64_t tokens) const {
  return tokens < SealedTokens() ? Bytes(shape_, tokens % kSegmentTokens) : 0;
}

uint64_t HeadCache::Bytes(const index::KvShape& shape, int64_t tokens) {
  return static_cast<uint64_t>(tokens / kSegmentTokens) * index::Segment::Bytes(shape) +
         static_cast<uint64_t>(ChunksFor(tokens % kSegmentTokens)) * TailChunk::Bytes(shape);
}

absl::StatusOr<std::shared_ptr<const index::Segment>> HeadCache::Seal(
    absl::Span<const index::TailChunkView> tail, const StridedRows& rows, MemoryGrant& memory,
    index::Scratch& scratch) const {
  absl::StatusOr<Reservation> taken = memory.Take(index::Segment::Bytes(shape_));
  if (!taken.ok()) return taken.status();
  auto accounted = std::make_shared<AccountedSegment>();
  accounted->memory = *std::move(taken);
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
  for (const index::TailChunkView& chunk : tail) {
    add({chunk.tokens, chunk.keys, chunk.values, key_dim, value_dim});
  }
  add(rows);
  accounted->segment = draft.Encode(scratch);
  const index::Segment* segment = accounted->segment.get();
  return std::shared_ptr<const index::Segment>(std::move(accounted), segment);
}

absl::Status HeadCache::AppendToTail(StridedRows rows, MemoryGrant& memory) {
  std::shared_ptr<ChunkList> longer;  // made when there is a chunk to be added
  while (rows.tokens > 0) {
    const int filled = tail_tokens_ % kTailChunkTokens;
    const auto count = static_cast<int>(std::min<int64_t>(rows.tokens, kTailChunkTokens - filled));
    TailChunk* chunk = nullptr;
    if (filled != 0) chunk = (longer != nullptr ? *longer : *chunks_).back().get();
    if (chunk == nullptr || !chunk->Claim(filled, count)) {
      absl::StatusOr<std::shared_ptr<TailChunk>> own = MakeChunk(filled + count, memory);
      if (!own.ok()) return own.status();
      if (longer == nullptr) longer = std::make_shared<ChunkList>(*chunks_);
      if (chunk != nullptr) {
        const auto rows_before = static_cast<size_t>(filled);
        std::memcpy((*own)->keys(), chunk->keys(), rows_before * shape_.KeyRowBytes());
        std::memcpy((*own)->values(), chunk->values(), rows_before * shape_.ValueRowBytes());
        longer->pop_back();
      }
      chunk = own->get();
      longer->push_back(*std::move(own));
    }
    const StridedRows part = TakeRows(rows, count);
    Gather(part.keys, part.key_stride, count, shape_.key_dim,
           chunk->keys() + static_cast<size_t>(filled) * static_cast<size_t>(shape_.key_dim));
    Gather(part.values, part.value_stride, count, shape_.value_dim,
           chunk->values() + static_cast<size_t>(filled) * static_cast<size_t>(shape_.value_dim));
    tail_tokens_ += count;
  }
  if (longer != nullptr) chunks_ = std::move(longer);
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<TailChunk>> HeadCache::MakeChunk(int claimed,
                                                                MemoryGrant& memory) const {
  absl::StatusOr<Reservation> taken = memory.Take(TailChunk::Bytes(shape_));
  if (!taken.ok()) return taken.status();
  auto chunk = std::make_shared<TailChunk>(shape_, *std::move(taken));
  const bool first = chunk->Claim(0, claimed);
  assert(first);
  static_cast<void>(first);
  return chunk;
}

void HeadCache::RefreshTail() {
  assert(chunks_->size() <= kChunksMax);
  int left = tail_tokens_;
  for (size_t i = 0; i < chunks_->size(); ++i, left -= kTailChunkTokens) {
    TailChunk& chunk = *(*chunks_)[i];
    tail_[i] = {chunk.keys(), chunk.values(), std::min(left, kTailChunkTokens)};
  }
}

}  // namespace kvseek::service
