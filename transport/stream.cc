#include "transport/stream.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <boost/asio/error.hpp>
#include <boost/asio/post.hpp>
#include <cerrno>
#include <utility>
#include <vector>

namespace kvseek::transport {
namespace {

namespace asio = boost::asio;

constexpr size_t kPartsMax = 64;  ///< of one WriteSome
constexpr size_t kTurnsMax = 64;  ///< pieces read before others have their turn
/// The peer copies what has been written while more is: a frame's way through a ring takes little
/// longer than one copy of it.
constexpr size_t kPublishBytes = size_t{64} << 10;
constexpr size_t kTurnBytes = size_t{64} << 10;  ///< a piece so large counts as one more

}  // namespace

// ---- waiting

Stream::Resume Stream::Waiter::Take() {
  if (!waiting_.load() || !waiting_.exchange(false)) return nullptr;
  return std::exchange(resume_, nullptr);
}

void Stream::Waiter::Wake() {
  const Resume resume = Take();
  if (resume) resume(/*here=*/false);
}

Stream::Awaitable<void> Stream::Waiter::Wait(Stream& stream) {
  const auto begin = [this, &stream](auto continuation) {
    const auto held = std::make_shared<decltype(continuation)>(std::move(continuation));
    resume_ = [held, executor = stream.executor_](bool here) {
      if (here) {
        std::move (*held)();
      } else {
        asio::post(executor, std::move(*held));
      }
    };
    waiting_.store(true);
    // In one order with Lookout::End and EndRings: either sees the other.
    if (!stream.lookout_->looking() || stream.ended_.load()) stream.WakeReady();
  };
  return asio::async_initiate<const asio::use_awaitable_t<>&, void()>(begin, asio::use_awaitable);
}

template <typename Ring>
void Stream::LookAt(Waiter& waiter, Ring& ring, std::vector<Resume>& found) {
  if (!waiter.waiting()) return;
  if (!lookout_->looking()) ring.AskForBell();
  if (!ring.Ready() && !ended_.load()) return;
  Resume resume = waiter.Take();
  if (resume) found.push_back(std::move(resume));
}

void Stream::Look(std::vector<Resume>& found) {
  LookAt(reader_, rings_->in(), found);
  LookAt(writer_, rings_->out(), found);
}

void Stream::WakeReady() {
  std::vector<Resume> found;
  Look(found);
  for (const Resume& resume : found) resume(/*here=*/false);
}

void Stream::RingBell() {
  // If the socket takes no more, there are bells enough in it.
  const char bell = 0;
  send(socket_.native_handle(), &bell, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
}

Stream::Awaitable<void> Stream::HearBells() {
  std::array<char, 64> bells{};
  ErrorCode error;
  while (!error) {
    std::tie(error, std::ignore) = co_await socket_.async_read_some(asio::buffer(bells), kAsTuple);
    WakeReady();
  }
  EndRings();
}

void Stream::EndRings() {
  ended_.store(true);
  reader_.Wake();
  writer_.Wake();
}

// ---- life

Stream::Stream(Socket socket) : executor_(socket.get_executor()), socket_(std::move(socket)) {}

Stream::~Stream() {
  if (shared()) lookout_->Remove(this);
}

bool Stream::IsUnix() const {
  ErrorCode error;
  const auto endpoint = socket_.local_endpoint(error);
  return !error && endpoint.protocol().family() == AF_UNIX;
}

void Stream::Share(std::unique_ptr<SharedRings> rings, Lookout& lookout) {
  rings_ = std::move(rings);
  lookout_ = &lookout;
  lookout_->Add(this);
}

void Stream::ShutdownReceive() {
  if (shared()) {
    deaf_ = true;
    reader_.Wake();
    return;
  }
  ErrorCode ignored;
  socket_.shutdown(asio::socket_base::shutdown_receive, ignored);
}

void Stream::ShutdownSend() {
  ErrorCode ignored;
  socket_.shutdown(asio::socket_base::shutdown_send, ignored);
}

void Stream::Close() {
  ErrorCode ignored;
  socket_.close(ignored);
  if (shared()) EndRings();
}

bool Stream::corrupt() const { return shared() && rings_->in().corrupt(); }

// ---- bytes

size_t Stream::ReadReady(asio::mutable_buffer out) {
  if (!shared() || deaf_ || turns_ >= kTurnsMax) return 0;
  const size_t got = rings_->in().Read(out.data(), out.size());
  if (got != 0 && rings_->in().Free(/*all=*/false)) RingBell();
  turns_ += 1 + got / kTurnBytes;
  return got;
}

Stream::Awaitable<size_t> Stream::ReadSome(asio::mutable_buffer out) {
  if (!shared()) {
    const auto [error, got] = co_await socket_.async_read_some(out, kAsTuple);
    co_return error ? 0 : got;
  }
  if (turns_ >= kTurnsMax) {
    turns_ = 0;
    co_await asio::post(executor_, asio::use_awaitable);
  }
  for (;;) {
    const bool ended = ended_.load();
    const size_t got = ReadReady(out);
    if (got != 0 || ended || deaf_ || corrupt()) co_return got;
    if (rings_->in().Free(/*all=*/true)) RingBell();
    turns_ = 0;
    co_await reader_.Wait(*this);
  }
}

size_t Stream::WriteSome(absl::Span<const asio::const_buffer> parts, ErrorCode& error) {
  size_t sent = 0;
  if (shared()) {
    if (ended_.load()) {
      error = asio::error::connection_reset;
      return 0;
    }
    RingWriter& ring = rings_->out();
    size_t published = 0;
    for (asio::const_buffer part : parts) {
      while (part.size() != 0) {
        const size_t step = ring.Write(part.data(), std::min(part.size(), kPublishBytes));
        if (step == 0) break;
        part += step;
        sent += step;
        if (sent - published < kPublishBytes) continue;
        published = sent;
        if (ring.Publish()) RingBell();
      }
      if (part.size() != 0) break;
    }
    if (ring.corrupt()) error = asio::error::invalid_argument;
    if (sent != published && ring.Publish()) RingBell();
    return sent;
  }
  std::array<iovec, kPartsMax> vectors{};
  const size_t count = std::min(parts.size(), vectors.size());
  for (size_t i = 0; i < count; ++i) {
    vectors[i] = {.iov_base = const_cast<void*>(parts[i].data()), .iov_len = parts[i].size()};
  }
  msghdr message{};
  message.msg_iov = vectors.data();
  message.msg_iovlen = count;
  const ssize_t got = sendmsg(socket_.native_handle(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (got >= 0) return static_cast<size_t>(got);
  if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
    error = ErrorCode(errno, boost::system::system_category());
  }
  return 0;
}

Stream::Awaitable<Stream::ErrorCode> Stream::Write(std::vector<asio::const_buffer> parts) {
  size_t first = 0;
  for (;;) {
    while (first < parts.size() && parts[first].size() == 0) ++first;
    if (first == parts.size()) co_return ErrorCode();
    ErrorCode error;
    size_t sent = WriteSome(absl::MakeConstSpan(parts).subspan(first), error);
    if (error) co_return error;
    if (sent == 0 && !co_await WaitWritable()) co_return asio::error::connection_reset;
    for (size_t i = first; sent != 0; ++i) {
      const size_t step = std::min(sent, parts[i].size());
      parts[i] += step;
      sent -= step;
    }
  }
}

Stream::Awaitable<bool> Stream::WaitWritable() {
  if (!shared()) {
    const auto [error] = co_await socket_.async_wait(Socket::wait_write, kAsTuple);
    co_return !error;
  }
  co_await writer_.Wait(*this);
  co_return !ended_.load();
}

}  // namespace kvseek::transport
