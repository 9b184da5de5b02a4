#include "client/decoder/steady_zone.h"

#include <algorithm>
#include <cstddef>

namespace kvseek::client {

PageAllocator::PageAllocator(int32_t pages) {
  free_.reserve(static_cast<size_t>(pages));
  for (int32_t page = pages - 1; page >= 0; --page) free_.push_back(page);
}

int32_t PageAllocator::Take() {
  if (free_.empty()) return -1;
  const int32_t page = free_.back();
  free_.pop_back();
  return page;
}

SteadyZone::SteadyZone(const ZoneShape& shape, PageAllocator& pages)
    : shape_(shape), allocator_(pages), recent_begin_(shape.sink_tokens) {}

SteadyZone::~SteadyZone() {
  for (const int32_t page : pages_) allocator_.Give(page);
}

uint64_t SteadyZone::PagesFor(uint64_t recent_begin, uint64_t tokens) const {
  const uint64_t page = shape_.page_tokens;
  const uint64_t sink = std::min<uint64_t>(tokens, shape_.sink_tokens);
  const uint64_t recent = tokens > recent_begin ? tokens - recent_begin : 0;
  return (sink + page - 1) / page + (recent + page - 1) / page;
}

bool SteadyZone::Grow(uint64_t pages) {
  if (pages > pages_.size() + allocator_.available() || pages > shape_.PagesMax()) return false;
  while (pages_.size() < pages) pages_.push_back(allocator_.Take());
  return true;
}

void SteadyZone::DropRecent(uint64_t pages) {
  const auto first = pages_.begin() + static_cast<ptrdiff_t>(SinkPages());
  const auto last = first + static_cast<ptrdiff_t>(pages);
  for (auto page = first; page != last; ++page) allocator_.Give(*page);
  pages_.erase(first, last);
}

uint64_t SteadyZone::WindowBegin(uint64_t tokens) const {
  const uint64_t window = shape_.recent_tokens;
  return tokens > window ? (tokens - window) / shape_.page_tokens * shape_.page_tokens : 0;
}

void SteadyZone::Slide(uint64_t held) {
  const uint64_t page = shape_.page_tokens;
  const uint64_t begin = std::min(held / page * page, WindowBegin(tokens_));
  if (begin <= recent_begin_) return;
  DropRecent((begin - recent_begin_) / page);
  recent_begin_ = begin;
}

bool SteadyZone::Append(uint32_t count) {
  if (!Grow(PagesFor(recent_begin_, tokens_ + count))) return false;
  tokens_ += count;
  return true;
}

bool SteadyZone::Skip(uint64_t count) {
  const uint64_t tokens = tokens_ + count;
  const uint64_t begin = std::max(recent_begin_, WindowBegin(tokens));
  const uint64_t recent_pages = pages_.size() - std::min<uint64_t>(pages_.size(), SinkPages());
  const uint64_t dropped = std::min((begin - recent_begin_) / shape_.page_tokens, recent_pages);
  const uint64_t needed = PagesFor(begin, tokens);
  if (needed > pages_.size() - dropped + allocator_.available() + dropped ||
      needed > shape_.PagesMax()) {
    return false;
  }
  if (dropped > 0) DropRecent(dropped);
  recent_begin_ = begin;
  tokens_ = tokens;
  return Grow(needed);
}

bool SteadyZone::Truncate(uint64_t tokens) {
  const bool has_left = recent_begin_ > shape_.sink_tokens;
  if (tokens > tokens_ || (has_left && tokens < recent_begin_)) return false;
  tokens_ = tokens;
  for (const uint64_t needed = PagesFor(recent_begin_, tokens_); pages_.size() > needed;
       pages_.pop_back()) {
    allocator_.Give(pages_.back());
  }
  return true;
}

int32_t SteadyZone::Slot(uint64_t position) const {
  const uint64_t page = shape_.page_tokens;
  uint64_t row = position;
  if (position >= shape_.sink_tokens) {
    if (position < recent_begin_) return -1;
    row = shape_.sink_tokens + (position - recent_begin_);
  }
  if (position >= tokens_) return -1;
  return static_cast<int32_t>(static_cast<uint64_t>(pages_[row / page]) * page + row % page);
}

int32_t SteadyZone::rows() const {
  const uint64_t sink = std::min<uint64_t>(tokens_, shape_.sink_tokens);
  return static_cast<int32_t>(sink + (tokens_ > recent_begin_ ? tokens_ - recent_begin_ : 0));
}

}  // namespace kvseek::client
