#include "client/channel_link.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/write.hpp>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "proto/status_code.h"

namespace kvseek::client {
namespace {

namespace asio = boost::asio;
using ErrorCode = boost::system::error_code;
using Endpoint = asio::generic::stream_protocol::endpoint;
using proto::FrameHeader;
using proto::Op;

constexpr size_t kBufferBytes = size_t{64} << 10;
constexpr unsigned kSilenceMaxMs =
    10000;  ///< TCP: unacknowledged for so long breaks the connection
constexpr const char* kClientName = "kvseek-cpp " KVSEEK_VERSION;
constexpr const char* kHungUp = "the daemon closed the connection at hello";

absl::Status Unreachable(const std::string& address, const ErrorCode& error) {
  return absl::UnavailableError(absl::StrCat("cannot reach ", address, ": ", error.message()));
}

/// "unix:/path" or "tcp://host:port" to what can be connected to.
asio::awaitable<absl::StatusOr<std::vector<Endpoint>>> Resolve(std::string address,
                                                               asio::any_io_executor executor) {
  std::vector<Endpoint> endpoints;
  if (absl::StartsWith(address, "unix:")) {
    const std::string path = address.substr(5);
    if (!path.empty() && path.size() < sizeof(sockaddr_un::sun_path)) {
      endpoints.emplace_back(asio::local::stream_protocol::endpoint(path));
      co_return endpoints;
    }
  }
  const size_t colon = address.rfind(':');
  if (!absl::StartsWith(address, "tcp://") || colon <= 6 || colon + 1 >= address.size()) {
    co_return proto::FieldError(absl::StatusCode::kInvalidArgument, "address",
                                absl::StrCat("neither unix:/path nor tcp://host:port: ", address));
  }
  std::string host = address.substr(6, colon - 6);
  const std::string port = address.substr(colon + 1);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  asio::ip::tcp::resolver resolver(executor);
  const auto [error, found] = co_await resolver.async_resolve(host, port, kAsTuple);
  if (error) co_return Unreachable(address, error);
  for (const auto& entry : found) endpoints.emplace_back(entry.endpoint());
  co_return endpoints;
}

}  // namespace

bool AsksUnchecked(const ClientOptions& options) {
  return absl::StartsWith(options.address, "unix:");
}

absl::Status Malformed(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("malformed answer: ", what));
}

absl::Status ReadError(const std::string& metadata) {
  proto::Error error;
  if (!error.ParseFromString(metadata)) return Malformed("not an Error");
  return proto::FromError(error);
}

// ---- frames

OutFrame OutFrame::Prepare(Message message, Clock::time_point deadline) {
  OutFrame frame;
  frame.header.op = message.op;
  frame.header.metadata_bytes = static_cast<uint32_t>(message.metadata.size());
  frame.header.payload_bytes = static_cast<uint32_t>(message.payload.size());
  const size_t padding = frame.header.PaddingBytes();
  frame.head.reserve(proto::kHeaderBytes + message.metadata.size() + padding);
  frame.head.assign(proto::kHeaderBytes, '\0');
  frame.head.append(message.metadata);
  frame.head.append(padding, '\0');
  frame.payload = message.payload;
  frame.owned = std::move(message.owned);
  frame.deadline = deadline;
  return frame;
}

void OutFrame::Sum() {
  if (summed || payload.empty()) return;
  trailer = proto::MakeTrailer(payload);
  summed = true;
}

void OutFrame::Seal(bool checked) {
  if (checked) Sum();
  const auto left =
      std::chrono::duration_cast<std::chrono::microseconds>(deadline - Clock::now()).count();
  header.time_left_us =
      static_cast<uint32_t>(std::clamp<int64_t>(left, 1, std::numeric_limits<uint32_t>::max()));
  proto::EncodeHeader(header, reinterpret_cast<uint8_t*>(head.data()));
}

void OutFrame::Detach() {
  if (owned != nullptr || payload.empty()) return;
  owned.reset(new uint8_t[payload.size()]);
  std::memcpy(owned.get(), payload.data(), payload.size());
  payload = {owned.get(), payload.size()};
}

size_t OutFrame::Bytes() const {
  return head.size() + (payload.empty() ? 0 : payload.size() + trailer.size());
}

std::array<asio::const_buffer, 3> OutFrame::Rest() const {
  std::array<asio::const_buffer, 3> parts = {
      asio::const_buffer(head.data(), head.size()),
      asio::const_buffer(payload.data(), payload.size()),
      asio::const_buffer(trailer.data(), payload.empty() ? 0 : trailer.size())};
  size_t skip = sent;
  for (asio::const_buffer& part : parts) {
    const size_t step = std::min(skip, part.size());
    part += step;
    skip -= step;
  }
  return parts;
}

// ---- reading

Link::Link(asio::io_context& io) : socket(io), timer(io), buffer(new uint8_t[kBufferBytes]) {}

Link::Awaitable<bool> Link::Fill(size_t bytes) {
  if (kBufferBytes - begin < bytes || Buffered() == 0) {
    std::memmove(buffer.get(), buffer.get() + begin, Buffered());
    end = Buffered();
    begin = 0;
  }
  while (Buffered() < bytes) {
    const asio::mutable_buffer free(buffer.get() + end, kBufferBytes - end);
    const auto [error, got] = co_await socket.async_read_some(free, kAsTuple);
    if (error) co_return false;
    end += got;
  }
  co_return true;
}

Link::Awaitable<bool> Link::ReadInto(uint8_t* out, size_t bytes) {
  while (bytes != 0) {
    const size_t ready = std::min(bytes, Buffered());
    std::memcpy(out, buffer.get() + begin, ready);
    begin += ready;
    out += ready;
    bytes -= ready;
    if (bytes == 0) break;
    if (bytes < kBufferBytes / 2) {
      if (!co_await Fill(bytes)) co_return false;
      continue;
    }
    const asio::mutable_buffer rest(out, bytes);
    const auto [error, got] = co_await socket.async_read_some(rest, kAsTuple);
    if (error) co_return false;
    out += got;
    bytes -= got;
  }
  co_return true;
}

Link::Awaitable<bool> Link::Discard(size_t bytes) {
  while (bytes != 0) {
    if (Buffered() == 0 && !co_await Fill(1)) co_return false;
    const size_t ready = std::min(bytes, Buffered());
    begin += ready;
    bytes -= ready;
  }
  co_return true;
}

absl::StatusOr<FrameHeader> Link::TakeHeader(const proto::FrameLimits& frame_limits) {
  auto header = proto::DecodeHeader({buffer.get() + begin, proto::kHeaderBytes}, frame_limits);
  begin += proto::kHeaderBytes;
  return header;
}

// ---- connecting

Link::Awaitable<absl::Status> Link::ConnectSocket(const std::string& address) {
  const auto endpoints = co_await Resolve(address, socket.get_executor());
  if (!endpoints.ok()) co_return endpoints.status();
  ErrorCode error = asio::error::host_not_found;
  for (const Endpoint& endpoint : *endpoints) {
    if (broken) co_return absl::CancelledError("closed while connecting");
    ErrorCode ignored;
    socket.close(ignored);
    std::tie(error) = co_await socket.async_connect(endpoint, kAsTuple);
    if (!error) break;
  }
  if (!error) socket.non_blocking(true, error);
  if (error) co_return Unreachable(address, error);
  ErrorCode not_tcp;
  socket.set_option(asio::ip::tcp::no_delay(true), not_tcp);
  if (!not_tcp) {  // a host that vanished must not be waited for as long as TCP would
    setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_USER_TIMEOUT, &kSilenceMaxMs,
               sizeof(kSilenceMaxMs));
  }
  co_return absl::OkStatus();
}

Link::Awaitable<absl::Status> Link::SayHello(const ClientOptions& options, DaemonInfo& info) {
  proto::HelloRequest hello;
  hello.set_version_min(proto::kVersion);
  hello.set_version_max(proto::kVersion);
  if (AsksUnchecked(options)) hello.add_features(proto::kUncheckedPayloads);
  hello.set_token(options.token);
  hello.set_client(kClientName);
  FrameHeader request;
  request.request_id = kHelloId;
  const std::string frame = proto::EncodeFrame(request, hello.SerializeAsString(), {});
  const asio::const_buffer out(frame.data(), frame.size());
  // Should this fail, the daemon may still have said why.
  co_await asio::async_write(socket, out, kAsTuple);

  if (!co_await Fill(proto::kHeaderBytes)) co_return absl::UnavailableError(kHungUp);
  const auto header = TakeHeader({.metadata_bytes_max = kBufferBytes, .payload_bytes_max = 0});
  if (!header.ok()) co_return Malformed(header.status().message());
  std::string metadata(header->metadata_bytes, '\0');
  auto* bytes = reinterpret_cast<uint8_t*>(metadata.data());
  if (!co_await ReadInto(bytes, metadata.size())) co_return absl::UnavailableError(kHungUp);
  if ((header->flags & proto::kFlagError) != 0) co_return ReadError(metadata);
  proto::HelloResponse welcome;
  if (header->op != Op::kHello || header->request_id != kHelloId ||
      (header->flags & proto::kFlagResponse) == 0 || !welcome.ParseFromString(metadata)) {
    co_return Malformed("not an answer to hello");
  }
  if (welcome.version() != proto::kVersion) {
    co_return absl::FailedPreconditionError(
        absl::StrCat("the daemon wants version ", welcome.version()));
  }
  limits = welcome.limits();
  checked = !AsksUnchecked(options) ||
            std::ranges::count(welcome.features(), proto::kUncheckedPayloads) == 0;
  info = {welcome.boot_id(), welcome.server(), welcome.simd_level()};
  co_return absl::OkStatus();
}

Link::Awaitable<absl::Status> Link::Open(const ClientOptions& options, DaemonInfo& info) {
  absl::Status connected = co_await ConnectSocket(options.address);
  if (!connected.ok()) co_return connected;
  co_return co_await SayHello(options, info);
}

}  // namespace kvseek::client
