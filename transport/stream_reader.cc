#include "transport/stream_reader.h"

#include <algorithm>
#include <cassert>
#include <cstring>

namespace kvseek::transport {

namespace asio = boost::asio;

StreamReader::StreamReader(Stream& stream) : stream_(stream), buffer_(new uint8_t[kBufferBytes]) {}

const uint8_t* StreamReader::Take(size_t bytes) {
  assert(bytes <= buffered());
  const uint8_t* const taken = buffer_.get() + begin_;
  begin_ += bytes;
  return taken;
}

asio::awaitable<bool> StreamReader::Fill(size_t bytes) {
  if (kBufferBytes - begin_ < bytes || buffered() == 0) {
    std::memmove(buffer_.get(), buffer_.get() + begin_, buffered());
    end_ = buffered();
    begin_ = 0;
  }
  while (buffered() < bytes) {
    const size_t wanted = ahead_ ? kBufferBytes - end_ : bytes - buffered();
    const size_t got = co_await stream_.ReadSome({buffer_.get() + end_, wanted});
    if (got == 0) co_return false;
    end_ += got;
  }
  co_return true;
}

asio::awaitable<bool> StreamReader::ReadInto(uint8_t* out, size_t bytes) {
  while (bytes != 0) {
    const size_t ready = std::min(bytes, buffered());
    std::memcpy(out, Take(ready), ready);
    out += ready;
    bytes -= ready;
    if (bytes == 0) break;
    if (ahead_ && bytes < kBufferBytes / 2) {
      if (!co_await Fill(bytes)) co_return false;
      continue;
    }
    size_t got = stream_.ReadReady({out, bytes});
    if (got == 0) got = co_await stream_.ReadSome({out, bytes});
    if (got == 0) co_return false;
    out += got;
    bytes -= got;
  }
  co_return true;
}

asio::awaitable<bool> StreamReader::Discard(size_t bytes) {
  while (bytes != 0) {
    if (buffered() == 0 && !co_await Fill(ahead_ ? 1 : std::min(bytes, kBufferBytes))) {
      co_return false;
    }
    const size_t ready = std::min(bytes, buffered());
    begin_ += ready;
    bytes -= ready;
  }
  co_return true;
}

}  // namespace kvseek::transport
