// Which rows of one (sequence, layer, KV head) are in the GPU's memory, and where.
//
// Consecutive steps ask for much the same rows: of the best 256 keys, 44-70 % are among the next
// step's (measured on Qwen2.5-Coder-1.5B). Rows that were returned once therefore stay until others
// need their place; requests say which are held, so that only the others travel. Replacement: least
// recently used. Only bookkeeping: no GPU here. Not thread-safe.
#ifndef KVSEEK_CLIENT_DECODER_ROW_CACHE_H_
#define KVSEEK_CLIENT_DECODER_ROW_CACHE_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace kvseek::client {

class RowCache {
 public:
  /// Slots 0 .. capacity - 1.
  explicit RowCache(uint32_t capacity);

  /// Appends the positions that are held within [begin, end), ascending, and returns how many.
  uint32_t AppendHeld(uint64_t begin, uint64_t end, std::vector<uint32_t>& positions) const;

  /// A row that arrived and the slot it goes to.
  struct Arrival {
    uint32_t row = 0;  ///< number among the rows of the answer
    int32_t slot = 0;
  };
  /// Takes in one answer. `selections`: for each query token the positions of its keys, ascending;
  /// all together no more distinct ones than the capacity. The answer's rows are those of positions
  /// that were not held when it was asked for, token by token. Writes to `slots`, for each position
  /// of each token in order, where its row is to be found once the arrivals are in place. Returns
  /// the arrivals; a row that arrived twice is placed once.
  absl::Span<const Arrival> Admit(absl::Span<const absl::Span<const int64_t>> selections,
                                  int32_t* slots);

  /// Forgets rows of positions from `tokens` on.
  void Truncate(uint64_t tokens);
  uint32_t size() const { return static_cast<uint32_t>(entries_.size()); }

 private:
  struct Entry {
    enum State : uint8_t { kHeld, kNew, kPlaced };
    uint32_t position = 0;
    int32_t slot = 0;
    uint64_t used = 0;  ///< the answer that last asked for it
    State state = kHeld;
  };

  void MarkHits(absl::Span<const int64_t> positions);
  void MakeRoom(size_t rows);

  uint32_t capacity_;
  uint64_t answer_ = 0;
  std::vector<Entry> entries_;  ///< by position
  std::vector<int32_t> free_;
  std::vector<Arrival> arrivals_;
  std::vector<uint32_t> wanted_;
  std::vector<uint64_t> ages_;
  std::vector<Entry> merged_;
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_ROW_CACHE_H_
