// A doorbell: memory that a daemon on this host shares, in which a GPU asks it and is answered
// without any thread of the client. Kernels ring it and wait for answers
// (kernels/cuda/doorbell.h); SparseDecoder does all of that (DecoderOptions::far_path). What is
// here opens it and knows where things stand in its memory; Ring and Await do from the CPU what the
// kernels do, for tests, and for decoders without a GPU.
//
// There is one slot for each layer, with one question at a time. A question has up to items_max
// sessions of the doorbell's shape, with up to tokens_max query tokens each, and is answered as by
// KvClient::Attend with state_dtype kFp16.
//
// Units: bytes, tokens, nanoseconds where a name says so. Errors: those of KvClient::Connect;
// invalid_argument naming a field of DoorbellOptions; resource_exhausted where the daemon has no
// shared memory left, invalid_argument naming "op" where it is too old to know doorbells. Thread
// safety: Ring and Await of one slot by one thread at a time.
#ifndef KVSEEK_CLIENT_DOORBELL_H_
#define KVSEEK_CLIENT_DOORBELL_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/kv_client.h"
#include "transport/doorbell_memory.h"

namespace kvseek {

struct DoorbellOptions {
  ModelShape shape{};                ///< of the sessions; dtype and softmax_scale do not count
  std::vector<uint32_t> kv_heads{};  ///< asked for, ascending; empty: all
  uint32_t items_max = 1;            ///< sessions of a question
  uint32_t tokens_max = 1;           ///< query tokens of each
  DType query_dtype = DType::kBf16;
  SearchOptions search{};                 ///< of every question; not list_read
  std::chrono::microseconds deadline{0};  ///< after it the daemon gives a question up; 0: its own
};

class Doorbell {
 public:
  /// Makes a connection of its own to `daemon`, a "unix:" or "shm:" address, which lasts as long as
  /// the doorbell does. Within connect_timeout.
  static absl::StatusOr<std::unique_ptr<Doorbell>> Open(const ClientOptions& daemon,
                                                        const DoorbellOptions& options);
  /// Closes the connection: the daemon gives up what is under way. No kernel may use the memory.
  ~Doorbell();
  Doorbell(const Doorbell&) = delete;
  Doorbell& operator=(const Doorbell&) = delete;

  /// layout().bytes() bytes at a page boundary.
  uint8_t* memory() const;
  const transport::DoorbellLayout& layout() const;
  /// Of the daemon; sessions of another boot are not there.
  uint64_t boot_id() const;
  /// Whether the daemon's end of the connection is still open. If not, nothing is answered any
  /// more.
  bool Connected() const;

  /// Asks in a slot. Queries (items, tokens, query_heads, key_dim) in query_dtype; those of items
  /// without a session are there, too. Returns the question's number. One that is under way is
  /// given up. invalid_argument: sizes.
  absl::StatusOr<uint64_t> Ring(uint32_t slot, uint32_t tokens,
                                absl::Span<const transport::DoorbellItem> items,
                                absl::Span<const uint8_t> queries);
  struct States {
    std::vector<uint16_t> out;  ///< (items, tokens, query_heads, value_dim) fp16
    std::vector<float> lse;     ///< (items, tokens, query_heads); -infinity: `out` means nothing
    uint64_t daemon_ns = 0;     ///< the daemon's own time
  };
  /// The answer to the slot's last question, which is `number`. deadline_exceeded if it is not
  /// there by then; else the daemon's error, without its message.
  absl::StatusOr<States> Await(uint32_t slot, uint64_t number,
                               std::chrono::steady_clock::time_point deadline);

 private:
  class Impl;
  explicit Doorbell(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvseek

#endif  // KVSEEK_CLIENT_DOORBELL_H_
