// One client's doorbell: the slots of its memory (transport/doorbell_memory.h), looked at and
// answered. Each question that is found becomes an Attend of the request handler, with all of its
// checks, deadlines and counts; the worker that has the answer writes it to the slot.
//
// The client may write anything anywhere at any time. So questions are copied before anybody looks
// at what they say, answers are written and never read, and what is wrong with a question is a
// status in its slot. A slot has one request under way; a question that comes meanwhile cancels it
// and waits until it has ended.
//
// Belongs to its connection, to the thread that looks (service/doorbells.h) and to answers under
// way; the memory stays until the last of them lets go.
#ifndef KVSEEK_SERVICE_DOORBELL_H_
#define KVSEEK_SERVICE_DOORBELL_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "proto/kvseek.pb.h"
#include "service/request_handler.h"
#include "service/session_store.h"
#include "transport/doorbell_memory.h"
#include "transport/sealed_memory.h"

namespace kvseek::service {

/// As RequestHandler::Handle, which it is but in tests.
using AskHandler = std::function<void(Request, std::function<void(Response)>)>;

/// What all doorbells of a daemon have counted.
struct DoorbellCounts {
  std::atomic<uint64_t> open{0};
  std::atomic<uint64_t> questions{0};
  std::atomic<uint64_t> errors{0};     ///< answered with a status
  std::atomic<uint64_t> overtaken{0};  ///< cancelled, since the slot was rung again meanwhile
};

/// What a doorbell is opened with, checked.
struct DoorbellSettings {
  transport::DoorbellShape shape;
  proto::OpenDoorbellRequest request;  ///< options, types, heads
  std::chrono::microseconds deadline{0};
};

class Doorbell : public std::enable_shared_from_this<Doorbell> {
 public:
  /// `memory` has the bytes of the layout. `store` outlives the calls of Look; `freed` is called
  /// when the memory is unmapped.
  Doorbell(DoorbellSettings settings, transport::SealedMemory memory, SessionStore& store,
           std::shared_ptr<DoorbellCounts> counts, std::function<void()> freed);
  ~Doorbell();
  Doorbell(const Doorbell&) = delete;
  Doorbell& operator=(const Doorbell&) = delete;

  /// Hands the memory to the client, once.
  absl::Status SendTo(int socket) { return memory_.SendTo(socket); }
  uint64_t memory_bytes() const { return memory_.bytes(); }

  /// Looks at every slot once and asks for what is new. True: there was something. One thread.
  bool Look(const AskHandler& ask);

  /// The client is gone: what is under way is cancelled, and nobody need look any more. Any thread.
  void Close();
  bool closed() const { return closed_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;

  struct Slot {
    uint64_t seen = 0;  ///< number of the last question taken
    /// A question is under way, and all below is read by whoever works on it.
    std::atomic<bool> busy{false};
    std::shared_ptr<std::atomic<bool>> cancelled = std::make_shared<std::atomic<bool>>(false);
    transport::DoorbellQuestion question;
    std::vector<transport::DoorbellItem> items;
    proto::AttendRequest message;  ///< of the items that have a session
    Clock::time_point arrived;
  };

  std::atomic_ref<uint64_t> Asked(uint32_t s) const;
  /// Takes the slot's question, and asks for its answer; not if it changes meanwhile.
  void Take(uint32_t s, uint64_t number, const AskHandler& ask);
  absl::Status CopyQuestion(uint32_t s, Slot& slot);
  absl::Status CheckSessions(const Slot& slot);
  Payload CopyQueries(uint32_t s, const Slot& slot) const;
  void FillMessage(Slot& slot) const;
  /// Any thread: writes the answer, and lets the slot's next question be taken.
  void Answer(uint32_t s, uint64_t number, const absl::Status& status, const Response* response);
  absl::Status WriteStates(uint32_t s, const Slot& slot, const Response* response) const;
  uint64_t TokenHeads(const Slot& slot) const {
    return uint64_t{slot.question.tokens} * layout_.shape().query_heads;
  }

  const DoorbellSettings settings_;
  const transport::DoorbellLayout layout_;
  transport::SealedMemory memory_;
  SessionStore& store_;
  const std::shared_ptr<DoorbellCounts> counts_;
  const std::function<void()> freed_;
  std::vector<Slot> slots_;
  absl::flat_hash_set<uint64_t> fitting_;  ///< sessions whose shape has been seen to be this one
  std::atomic<bool> closed_{false};
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_DOORBELL_H_
