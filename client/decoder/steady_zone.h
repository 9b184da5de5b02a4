// Which tokens of a sequence are in the GPU's pages, and where.
//
// A sequence's steady zone is its sink (the first tokens) and its recent tokens. Rows stand in
// pages in the order of their positions: the sink's pages, then the recent ones. Tokens enter at
// the end and leave, a page at a time, when they are older than the recent window and a daemon
// holds them. The same pages serve all layers, each of which has a pool of its own. Only
// bookkeeping: no GPU here. Not thread-safe.
#ifndef KVSEEK_CLIENT_DECODER_STEADY_ZONE_H_
#define KVSEEK_CLIENT_DECODER_STEADY_ZONE_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace kvseek::client {

struct ZoneShape {
  uint32_t page_tokens = 16;
  uint32_t sink_tokens = 16;     ///< a multiple of page_tokens
  uint32_t recent_tokens = 512;  ///< a multiple of page_tokens
  uint32_t slack_tokens = 256;   ///< beyond recent_tokens, for tokens that no daemon holds yet

  /// Pages that one sequence takes at most.
  uint32_t PagesMax() const {
    const uint32_t recent = recent_tokens + slack_tokens + page_tokens - 1;
    return sink_tokens / page_tokens + recent / page_tokens + 1;
  }
};

/// The numbers of free pages of a pool.
class PageAllocator {
 public:
  explicit PageAllocator(int32_t pages);
  /// -1 if there is none.
  int32_t Take();
  void Give(int32_t page) { free_.push_back(page); }
  size_t available() const { return free_.size(); }

 private:
  std::vector<int32_t> free_;
};

class SteadyZone {
 public:
  /// `pages` must outlive the zone.
  SteadyZone(const ZoneShape& shape, PageAllocator& pages);
  ~SteadyZone();
  SteadyZone(const SteadyZone&) = delete;
  SteadyZone& operator=(const SteadyZone&) = delete;

  /// Tokens of the sequence so far.
  uint64_t tokens() const { return tokens_; }
  /// Positions [far_begin, far_end) are not in the zone: a daemon answers for them.
  uint64_t far_begin() const { return shape_.sink_tokens; }
  uint64_t far_end() const { return recent_begin_; }

  /// Drops pages of tokens that are all older than the recent window and below `held`, of which a
  /// daemon holds everything.
  void Slide(uint64_t held);
  /// Takes in the next `count` tokens. False, with nothing changed, if there is no room (the
  /// daemons are behind).
  bool Append(uint32_t count);
  /// Takes in the next `count` tokens of a prompt, which daemons hold already: only what belongs to
  /// the zone gets a place. False, with nothing changed, if pages ran out.
  bool Skip(uint64_t count);
  /// Keeps the first `tokens` tokens: no more than tokens(). False, with nothing changed, if that
  /// would need tokens that have left the zone.
  bool Truncate(uint64_t tokens);

  /// Where a position is, as page * page_tokens + place in the page; -1 if it is not in the zone.
  int32_t Slot(uint64_t position) const;
  /// Pages in the order of their tokens' positions, and the rows in them.
  absl::Span<const int32_t> pages() const { return pages_; }
  int32_t rows() const;

 private:
  uint64_t SinkPages() const { return shape_.sink_tokens / shape_.page_tokens; }
  /// Pages that hold a zone of `tokens` tokens whose recent part starts at `recent_begin`.
  uint64_t PagesFor(uint64_t recent_begin, uint64_t tokens) const;
  /// Where the recent window of `tokens` tokens starts, at the border of a page.
  uint64_t WindowBegin(uint64_t tokens) const;
  bool Grow(uint64_t pages);
  /// Gives back the first `pages` pages behind the sink's.
  void DropRecent(uint64_t pages);

  const ZoneShape shape_;
  PageAllocator& allocator_;
  std::vector<int32_t> pages_;
  uint64_t tokens_ = 0;
  uint64_t recent_begin_;  ///< of the pages behind the sink's; a multiple of page_tokens
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_STEADY_ZONE_H_
