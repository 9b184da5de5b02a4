// One stream of a channel: connecting and hello, frames on their way out. The one header of this
// folder that includes Asio; only the channel includes it, and only whoever drives the channel uses
// it.
#ifndef KVSEEK_CLIENT_CHANNEL_LINK_H_
#define KVSEEK_CLIENT_CHANNEL_LINK_H_

#include <array>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "client/channel.h"
#include "client/kv_client.h"
#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "transport/lookout.h"
#include "transport/stream.h"
#include "transport/stream_reader.h"

namespace kvseek::client {

using transport::kAsTuple;
inline constexpr uint64_t kHelloId = 1;  ///< request id of a hello; calls have larger ones

/// A request's frame on its way out.
struct OutFrame {
  proto::FrameHeader header;
  std::string head;  ///< header, metadata, padding
  Message message;   ///< its metadata has gone into `head`
  std::array<uint8_t, proto::kTrailerBytes> trailer{};
  bool summed = false;  ///< `trailer` holds the checksum
  Clock::time_point deadline;
  size_t sent = 0;

  /// All that needs neither request id nor link, so that callers do it on their own threads.
  static OutFrame Prepare(Message message, Clock::time_point deadline);
  /// Writes the checksum, unless it is there. For callers too, if they know that it is needed.
  void Sum();
  /// Writes the header, with the time left until the deadline as of now, and for a `checked` link
  /// the checksum.
  void Seal(bool checked);
  /// Copies a payload that is the caller's.
  void Detach();
  size_t Bytes() const;
  /// What is left to be sent.
  std::vector<boost::asio::const_buffer> Rest() const;
};

struct Link {
  template <typename T>
  using Awaitable = boost::asio::awaitable<T>;

  /// `lookout` outlives the link.
  Link(boost::asio::io_context& io, transport::Lookout& lookout);

  /// Connects and says hello; fills `limits` and `info`. The caller watches the time, and closes
  /// the stream to end it. If the stream is shared then, its bells are to be heard.
  Awaitable<absl::Status> Open(const ClientOptions& options, DaemonInfo& info);
  /// Takes a header out of the reader's buffer, which holds one.
  absl::StatusOr<proto::FrameHeader> TakeHeader(const proto::FrameLimits& limits);

  transport::Lookout& lookout;
  transport::Stream stream;
  transport::StreamReader reader;
  boost::asio::steady_timer timer;  ///< of connecting and hello
  std::deque<OutFrame> queue;
  proto::Limits limits;  ///< the daemon's
  bool up = false;       ///< hello has been answered
  bool checked = true;   ///< payloads, by their trailers; what hello has agreed on
  bool broken = false;
  bool waiting = false;  ///< until the stream takes more, or it is closed

 private:
  Awaitable<absl::Status> ConnectSocket(const std::string& address);
  Awaitable<absl::Status> SayHello(const ClientOptions& options, DaemonInfo& info);
  /// The memory that follows the hello's answer.
  Awaitable<absl::Status> Share(const proto::SharedMemory& sizes);
};

/// Whether hello asks for frames without checksums: not on TCP.
bool AsksUnchecked(const ClientOptions& options);

/// data_loss: the daemon does not keep to the protocol.
absl::Status Malformed(absl::string_view what);
/// The status in an Error's bytes.
absl::Status ReadError(const std::string& metadata);

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_CHANNEL_LINK_H_
