#include "client/decoder/row_cache.h"

#include <algorithm>
#include <cassert>

namespace kvseek::client {

RowCache::RowCache(uint32_t capacity) : capacity_(capacity) {
  entries_.reserve(capacity);
  free_.reserve(capacity);
  for (uint32_t slot = capacity; slot > 0; --slot) free_.push_back(static_cast<int32_t>(slot - 1));
}

uint32_t RowCache::AppendHeld(uint64_t begin, uint64_t end,
                              std::vector<uint32_t>& positions) const {
  const size_t before = positions.size();
  for (const Entry& entry : entries_) {
    if (entry.position >= begin && entry.position < end) positions.push_back(entry.position);
  }
  return static_cast<uint32_t>(positions.size() - before);
}

/// Both lists are ascending: one walk over each.
void RowCache::MarkHits(absl::Span<const int64_t> positions) {
  auto entry = entries_.begin();
  for (const int64_t wanted : positions) {
    while (entry != entries_.end() && entry->position < wanted) ++entry;
    if (entry != entries_.end() && entry->position == wanted) {
      entry->used = answer_;
    } else {
      wanted_.push_back(static_cast<uint32_t>(wanted));
    }
  }
}

/// Frees slots of the entries that were not used for longest, none of them of this answer.
void RowCache::MakeRoom(size_t rows) {
  if (rows <= free_.size()) return;
  const size_t victims = rows - free_.size();
  ages_.clear();
  for (const Entry& entry : entries_) ages_.push_back(entry.used);
  assert(victims <= ages_.size());
  const auto last = ages_.begin() + static_cast<ptrdiff_t>(victims - 1);
  std::nth_element(ages_.begin(), last, ages_.end());
  const uint64_t oldest = *last;  // this old, and older, but no more than needed
  size_t left = victims;
  for (const bool older : {true, false}) {
    std::erase_if(entries_, [&](const Entry& entry) {
      const bool goes = left > 0 && (older ? entry.used < oldest : entry.used == oldest);
      if (!goes) return false;
      assert(entry.used != answer_);
      free_.push_back(entry.slot);
      --left;
      return true;
    });
  }
}

absl::Span<const RowCache::Arrival> RowCache::Admit(
    absl::Span<const absl::Span<const int64_t>> selections, int32_t* slots) {
  ++answer_;
  wanted_.clear();
  for (const auto& positions : selections) MarkHits(positions);
  std::sort(wanted_.begin(), wanted_.end());
  wanted_.erase(std::unique(wanted_.begin(), wanted_.end()), wanted_.end());
  MakeRoom(wanted_.size());

  merged_.clear();
  auto old = entries_.begin();
  for (const uint32_t position : wanted_) {
    for (; old != entries_.end() && old->position < position; ++old) merged_.push_back(*old);
    merged_.push_back({position, free_.back(), answer_, Entry::kNew});
    free_.pop_back();
  }
  merged_.insert(merged_.end(), old, entries_.end());
  entries_.swap(merged_);

  arrivals_.clear();
  uint32_t row = 0;
  for (const auto& positions : selections) {
    auto entry = entries_.begin();
    for (const int64_t position : positions) {
      while (entry->position < position) ++entry;
      *slots++ = entry->slot;
      if (entry->state == Entry::kHeld) continue;
      // A later token's row of the same position is the same row once more.
      if (entry->state == Entry::kNew) arrivals_.push_back({row, entry->slot});
      entry->state = Entry::kPlaced;
      ++row;
    }
  }
  for (Entry& entry : entries_) entry.state = Entry::kHeld;
  return arrivals_;
}

void RowCache::Truncate(uint64_t tokens) {
  std::erase_if(entries_, [&](const Entry& entry) {
    if (entry.position < tokens) return false;
    free_.push_back(entry.slot);
    return true;
  });
}

}  // namespace kvseek::client
