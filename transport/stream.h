// The byte stream between a client and a daemon: a unix socket, TCP, or two rings in shared memory
// beside a unix socket.
//
// With rings (Share) all bytes go through the memory, and the socket is for two things: its end is
// the peer's end, at once and however it came, and a byte on it is the bell that wakes a side that
// sleeps. Whoever has to wait for a ring is found by a thread that looks (transport/lookout.h) or,
// where none does, asks for the bell.
#ifndef KVSEEK_TRANSPORT_STREAM_H_
#define KVSEEK_TRANSPORT_STREAM_H_

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/system/error_code.hpp>
#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "transport/lookout.h"
#include "transport/shared_rings.h"

namespace kvseek::transport {

/// Errors come back as values.
inline constexpr auto kAsTuple = boost::asio::as_tuple(boost::asio::use_awaitable);

/// One reader and one writer at a time. Both, and all else, in the executor; only WriteSome may be
/// called by any thread, and Close is then for the caller to keep away from it.
class Stream {
 public:
  using Socket = boost::asio::generic::stream_protocol::socket;
  using ErrorCode = boost::system::error_code;
  template <typename T>
  using Awaitable = boost::asio::awaitable<T>;

  /// Takes a socket: accepted, or yet to be connected.
  explicit Stream(Socket socket);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  const boost::asio::any_io_executor& executor() const { return executor_; }
  /// For connecting, options and the hello; once shared, hands off.
  Socket& socket() { return socket_; }
  bool IsUnix() const;
  bool is_open() const { return socket_.is_open(); }

  /// Goes over to rings; the socket is connected, and nothing is being read or written.
  /// HearBells has to run from then on. `lookout` outlives the stream.
  void Share(std::unique_ptr<SharedRings> rings, Lookout& lookout);
  bool shared() const { return rings_ != nullptr; }
  /// Waits for bells and for the peer's end, and returns at the stream's end. The stream must be
  /// there until then.
  Awaitable<void> HearBells();
  /// Whether the peer's counters made no sense: the stream has ended for it.
  bool corrupt() const;

  /// Waits for bytes and takes some; 0: the stream has ended. Not of 0 bytes.
  Awaitable<size_t> ReadSome(boost::asio::mutable_buffer out);
  /// Takes what is there already; of sockets, nothing.
  size_t ReadReady(boost::asio::mutable_buffer out);
  /// Sends what fits now, and returns how much: 0 without an error if nothing did.
  size_t WriteSome(absl::Span<const boost::asio::const_buffer> parts, ErrorCode& error);
  /// Sends all.
  Awaitable<ErrorCode> Write(std::vector<boost::asio::const_buffer> parts);
  /// Until WriteSome may send more; false: never again.
  Awaitable<bool> WaitWritable();

  /// Reads no more: whoever waits to is told the stream's end.
  void ShutdownReceive();
  /// The peer reads what has been sent, and then the end.
  void ShutdownSend();
  /// Ends everything that waits. The memory stays as long as the stream.
  void Close();

 private:
  friend class Lookout;

  /// Goes on with a coroutine: here, or in its executor.
  using Resume = std::function<void(bool here)>;

  /// A coroutine that waits for a ring.
  class Waiter {
   public:
    bool waiting() const { return waiting_.load(); }
    Awaitable<void> Wait(Stream& stream);
    /// Who is to be resumed, once; empty: nobody waits. Any thread.
    Resume Take();
    void Wake();

   private:
    Resume resume_;
    std::atomic<bool> waiting_{false};
  };

  /// Adds those who wait for what is there now; where nobody looks, asks for the bell of the
  /// others. Any thread.
  void Look(std::vector<Resume>& found);
  template <typename Ring>
  void LookAt(Waiter& waiter, Ring& ring, std::vector<Resume>& found);
  void WakeReady();
  void RingBell();
  void EndRings();

  const boost::asio::any_io_executor executor_;
  Socket socket_;
  std::unique_ptr<SharedRings> rings_;
  Lookout* lookout_ = nullptr;
  Waiter reader_;
  Waiter writer_;
  std::atomic<bool> ended_{
      false};          ///< the peer has gone, or Close: what is in the ring still counts
  bool deaf_ = false;  ///< ShutdownReceive
  size_t turns_ = 0;   ///< reads since others had theirs
};

}  // namespace kvseek::transport

#endif  // KVSEEK_TRANSPORT_STREAM_H_
