// The memory of a doorbell, which a daemon and a client's GPU share: where questions and answers
// stand (docs/protocol.md, section 9). Both sides work the same offsets out of the same shape.
//
// There is one slot for each layer. In it the client writes a question and its queries, and then
// its number, which is one more than that of the slot's last question, to `asked`. The daemon
// copies them, answers, and writes states, and then the same number, to the slot's DoorbellAnswer.
// A number is written with release and read with acquire order, so whoever sees it sees what it
// stands for.
//
// A slot has one question at a time. A client that gives one up and asks again may write while the
// daemon still copies: what it then copied is answered under the old number, which nobody waits
// for.
#ifndef KVSEEK_TRANSPORT_DOORBELL_MEMORY_H_
#define KVSEEK_TRANSPORT_DOORBELL_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace kvseek::transport {

inline constexpr uint32_t kDoorbellVersion = 1;  ///< of the layout

struct DoorbellShape {
  uint32_t slots = 0;
  uint32_t items_max = 0;    ///< of a question: sessions
  uint32_t tokens_max = 0;   ///< query tokens of each
  uint32_t query_heads = 0;  ///< of the KV heads asked for
  uint32_t key_dim = 0;
  uint32_t value_dim = 0;
  uint32_t query_element_bytes = 0;
};

/// Begins a question; its items follow.
struct DoorbellQuestion {
  uint32_t items = 0;   ///< 1..items_max
  uint32_t tokens = 0;  ///< 1..tokens_max
  uint64_t unused = 0;
};

/// One session of a question, and the positions that its query tokens see.
struct DoorbellItem {
  uint64_t session_id = 0;  ///< 0: none, its states are empty
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t unused = 0;
};

struct DoorbellAnswer {
  uint64_t number = 0;     ///< of the question; written last
  uint64_t daemon_ns = 0;  ///< the daemon's own time: from the question copied to the states there
  uint32_t status = 0;     ///< 0, or an error's code (proto/status_code.h): there are no states
  uint32_t unused = 0;
};

static_assert(sizeof(DoorbellQuestion) == 16 && sizeof(DoorbellItem) == 32 &&
              sizeof(DoorbellAnswer) == 24 && std::is_trivially_copyable_v<DoorbellAnswer>);

/// Offsets in bytes. Parts stand at multiples of 64.
class DoorbellLayout {
 public:
  /// REQUIRES: as many slots, items, ... as a daemon's limits let through: sums are below 2^63.
  constexpr explicit DoorbellLayout(const DoorbellShape& shape) : shape_(shape) {
    const uint64_t heads = uint64_t{shape.items_max} * shape.tokens_max * shape.query_heads;
    uint64_t end = AlignUp(sizeof(DoorbellAnswer));
    question_ = Take(sizeof(DoorbellQuestion) + shape.items_max * sizeof(DoorbellItem), end);
    queries_ = Take(heads * shape.key_dim * shape.query_element_bytes, end);
    lses_ = Take(heads * sizeof(float), end);
    outs_ = Take(heads * shape.value_dim * sizeof(uint16_t), end);
    slot_bytes_ = end;
    slots_ = AlignUp(shape.slots * sizeof(uint64_t));
  }

  const DoorbellShape& shape() const { return shape_; }
  /// The number of the slot's last question, uint64. Those of all slots stand side by side.
  constexpr uint64_t asked(uint32_t slot) const { return slot * sizeof(uint64_t); }
  constexpr uint64_t answer(uint32_t slot) const { return slots_ + slot * slot_bytes_; }
  constexpr uint64_t question(uint32_t slot) const { return answer(slot) + question_; }
  /// (items, tokens, query_heads, key_dim) of the question, without gaps.
  constexpr uint64_t queries(uint32_t slot) const { return answer(slot) + queries_; }
  /// (items, tokens, query_heads) fp32, of the question's items and tokens, and
  constexpr uint64_t lses(uint32_t slot) const { return answer(slot) + lses_; }
  /// (items, tokens, query_heads, value_dim) fp16.
  constexpr uint64_t outs(uint32_t slot) const { return answer(slot) + outs_; }
  /// Of all slots, whole pages.
  constexpr uint64_t bytes() const {
    return (slots_ + shape_.slots * slot_bytes_ + kPage - 1) / kPage * kPage;
  }

 private:
  static constexpr uint64_t kPage = 4096;
  static constexpr uint64_t AlignUp(uint64_t bytes) { return (bytes + 63) / 64 * 64; }
  static constexpr uint64_t Take(uint64_t bytes, uint64_t& end) {
    const uint64_t begin = end;
    end += AlignUp(bytes);
    return begin;
  }

  DoorbellShape shape_;
  uint64_t question_ = 0;  ///< from the slot's beginning
  uint64_t queries_ = 0;
  uint64_t lses_ = 0;
  uint64_t outs_ = 0;
  uint64_t slot_bytes_ = 0;
  uint64_t slots_ = 0;
};

}  // namespace kvseek::transport

#endif  // KVSEEK_TRANSPORT_DOORBELL_MEMORY_H_
