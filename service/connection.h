// One connection: reads frames, checks them, hands requests on and writes answers as they come, in
// any order.
//
//   reader    one frame after the other; waits while too much of this connection or of the daemon
//   is
//             under way
//   writer    service/answer_writer.h: whoever made an answer sends it, or queues it here
//   watchdog  ends what takes too long: hello, a frame from its first byte to its last, either way
//
// All three are coroutines on the connection's strand; only RequestsUnderWay and AnswerWriter::Send
// are for the threads that answer as well. What a peer does wrong inside a frame is
// answered and forgotten; what makes the byte stream unreadable is answered with an Error frame of
// request id 0, and the connection ends. When the peer is gone, all its requests are cancelled.
#ifndef KVSEEK_SERVICE_CONNECTION_H_
#define KVSEEK_SERVICE_CONNECTION_H_

#include <array>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "service/answer_writer.h"
#include "service/byte_gate.h"
#include "service/doorbells.h"
#include "service/options.h"
#include "service/requests_under_way.h"
#include "service/server.h"
#include "transport/lookout.h"
#include "transport/stream.h"
#include "transport/stream_reader.h"

namespace kvseek::service {

class Connection;

/// What the server's connections share. Outlives them.
struct ConnectionContext {
  DaemonOptions options;
  ServerIdentity identity;
  Dispatch dispatch;
  ByteGate* gate = nullptr;
  std::shared_ptr<ByteGate> shared_memory{};  ///< bounds all connections' rings and doorbells
  transport::Lookout* lookout = nullptr;
  Doorbells* doorbells = nullptr;           ///< or null
  std::function<void(Connection*)> closed;  ///< called once, on the connection's strand
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  /// `socket`'s executor is the connection's strand.
  Connection(transport::Stream::Socket socket, const ConnectionContext& context);
  ~Connection();

  void Start();
  /// Reads no more; ends when what is under way has been answered. Any thread.
  void Stop();
  /// Cancels what is under way and ends. Any thread.
  void Abort();

 private:
  using Clock = std::chrono::steady_clock;
  template <typename T>
  using Awaitable = boost::asio::awaitable<T>;

  /// Why reading ended: nothing to tell a peer that is gone, or a last Error.
  struct Ending {
    absl::Status notice;
    uint64_t request_id = 0;
    proto::Op op = proto::Op::kHello;
  };

  static Awaitable<void> Read(std::shared_ptr<Connection> self);
  static Awaitable<void> Write(std::shared_ptr<Connection> self);
  static Awaitable<void> Watch(std::shared_ptr<Connection> self);
  static Awaitable<void> HearBells(std::shared_ptr<Connection> self);

  // The reader. Awaitable<bool>: false when the stream has ended.
  Awaitable<Ending> ReadFrames();
  Awaitable<std::optional<Ending>> Greet();
  /// Rings, if there is memory for them; else none.
  std::unique_ptr<transport::SharedRings> MakeRings();
  /// Once the hello's answer has left: hands the rings over, and goes over to them.
  Awaitable<std::optional<Ending>> Share(std::unique_ptr<transport::SharedRings> rings);
  Awaitable<bool> ReadRequest(proto::FrameHeader header);
  Awaitable<bool> ReadBody(const proto::FrameHeader& header, Request& request,
                           std::array<uint8_t, proto::kTrailerBytes>& trailer);
  /// Answers an open_doorbell, hands the memory over and has it served. False: the end.
  Awaitable<bool> OpenDoorbell(proto::FrameHeader header, Request request);
  absl::StatusOr<std::shared_ptr<Doorbell>> MakeDoorbell(const Request& request);
  Awaitable<bool> WaitForRoom(bool is_cancel);
  Awaitable<bool> WaitForBytes(uint64_t bytes);
  Awaitable<void> SayGoodbye(Ending ending);
  /// Fills `hello` if it returns nothing.
  std::optional<Ending> CheckHello(const proto::FrameHeader& header, const std::string& metadata,
                                   proto::HelloRequest& hello) const;
  void Accept(const proto::FrameHeader& header, Request request, uint64_t held_bytes);
  void Cancel(const proto::FrameHeader& header, const std::string& metadata);

  void Answer(AnswerFrame frame);
  /// The books of a request whose answer was given to writer_.Send, which returned `left`.
  void Finish(uint64_t held_bytes, bool left);
  void Close();

  const ConnectionContext& context_;
  transport::Stream stream_;
  transport::StreamReader reader_;
  boost::asio::steady_timer wake_reader_;  ///< only ever wakes by cancel
  boost::asio::steady_timer watchdog_;
  AnswerWriter writer_;
  Clock::time_point read_deadline_ = Clock::time_point::max();

  RequestsUnderWay under_way_;
  std::shared_ptr<Doorbell> doorbell_;  ///< null: none was opened
  uint64_t shared_bytes_ = 0;           ///< of its rings
  size_t outstanding_ = 0;              ///< requests read whose answers have not left yet
  bool checked_ = true;                 ///< payloads, by their trailers; what hello has agreed on
  bool bytes_taken_ = false;            ///< the gate has let the waiting reader through
  bool stopping_ = false;               ///< reads no more, but answers
  bool timed_out_ = false;
  bool closed_ = false;
};

/// Tells a peer that is not served why, and closes. Lasts a second at most.
boost::asio::awaitable<void> Refuse(std::shared_ptr<transport::Stream> stream, absl::Status reason);

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_CONNECTION_H_
