// One connection to a daemon, shared by any number of calls at once.
//
// One thread at a time drives it (client/channel_driver.h): a thread of its own, or a caller. A
// caller's Start writes the frame itself if nobody else is at it; its Poll reads answers and runs
// callbacks. Requests carry an id, so answers
// may come in any order; requests of one thread are sent in theirs. A call ends at its deadline at
// the latest: the daemon is then told to give it up, and an answer that still comes is dropped.
// When the connection breaks, all that is under way fails with unavailable, and the next call
// connects again.
#ifndef KVSEEK_CLIENT_CHANNEL_H_
#define KVSEEK_CLIENT_CHANNEL_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/kv_client.h"
#include "proto/frame.h"

namespace kvseek::client {

using Clock = std::chrono::steady_clock;

/// A request without its deadline.
struct Message {
  proto::Op op = proto::Op::kHealth;
  std::string metadata;  ///< serialised
  /// The caller's memory, or `owned`. While there are `parts`, only its size counts.
  absl::Span<const uint8_t> payload;
  std::unique_ptr<uint8_t[]> owned;

  struct Part {
    absl::Span<const uint8_t> bytes;  ///< the caller's memory, not empty
    size_t offset = 0;
  };
  /// What the payload is made of, zeros between them. With `owned` Start copies them there;
  /// without, they are sent from where they are, unless there is a checksum to be made.
  std::vector<Part> parts;
  /// Makes `payload` of the parts, in `owned`.
  void BringTogether();
  /// Zeros what is no part's in `owned`, which is made if it is not there.
  void MakeOwned();
};

/// At a multiple of 64 bytes, as parts stand within payloads; not initialised.
std::shared_ptr<uint8_t[]> AllocatePayload(size_t bytes);

/// The answer to one, its payload's checksum verified where the connection has checksums.
struct Answer {
  std::string metadata;
  std::shared_ptr<uint8_t[]> payload;  ///< of AllocatePayload
  size_t payload_bytes = 0;
  uint64_t bytes_sent = 0;
  uint64_t bytes_received = 0;
};

/// Thread-safe.
class Channel {
 public:
  using Done = std::function<void(absl::StatusOr<Answer>)>;

  /// Does not connect yet.
  explicit Channel(const ClientOptions& options);
  /// Fails what is under way with cancelled and waits for the callbacks. Not from a callback.
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  /// Connects and says hello, within connect_timeout: deadline_exceeded past it, unavailable if the
  /// daemon cannot be reached, else what the daemon says. Not from a callback.
  absl::Status Connect();

  /// Sends `message` and calls `done` exactly once, on the channel's thread or in a Poll, never in
  /// here. The caller's memory behind it is read from now on and must stay valid until then.
  void Start(Message message, Clock::time_point deadline, Done done);
  /// Calls `done` with an error, on the channel's thread or in a Poll.
  void Fail(absl::Status status, Done done);
  /// As KvClient::Poll.
  void Poll();

  /// What the last hello was answered with.
  DaemonInfo info() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_CHANNEL_H_
