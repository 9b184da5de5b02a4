// Exact reads of a stream.
#ifndef KVSEEK_TRANSPORT_STREAM_READER_H_
#define KVSEEK_TRANSPORT_STREAM_READER_H_

#include <boost/asio/awaitable.hpp>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "transport/stream.h"

namespace kvseek::transport {

/// Reads ahead into a buffer of its own, so that several small frames cost one system call; large
/// reads pass it by. Used by one coroutine. The awaitables say false when the stream has ended.
class StreamReader {
 public:
  static constexpr size_t kBufferBytes = size_t{64} << 10;

  /// `stream` outlives the reader.
  explicit StreamReader(Stream& stream);

  /// From now on takes no byte of the stream before it is asked for: where that costs no system
  /// call, and as long as something else than bytes may follow on the socket.
  void ReadNothingAhead() { ahead_ = false; }

  /// At least so many bytes are in the buffer, which has kBufferBytes.
  boost::asio::awaitable<bool> Fill(size_t bytes);
  boost::asio::awaitable<bool> ReadInto(uint8_t* out, size_t bytes);
  boost::asio::awaitable<bool> Discard(size_t bytes);

  size_t buffered() const { return end_ - begin_; }
  /// Takes bytes out of the buffer, which has so many. Good until the next read.
  const uint8_t* Take(size_t bytes);

 private:
  Stream& stream_;
  const std::unique_ptr<uint8_t[]> buffer_;
  size_t begin_ = 0;
  size_t end_ = 0;
  bool ahead_ = true;
};

}  // namespace kvseek::transport

#endif  // KVSEEK_TRANSPORT_STREAM_READER_H_
