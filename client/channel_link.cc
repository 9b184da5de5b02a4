#include "client/channel_link.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "proto/status_code.h"
#include "transport/address.h"

namespace kvseek::client {
namespace {

namespace asio = boost::asio;
using ErrorCode = boost::system::error_code;
using Endpoint = asio::generic::stream_protocol::endpoint;
using proto::FrameHeader;
using proto::Op;
using transport::Address;
using Socket = transport::Stream::Socket;

constexpr uint32_t kWelcomeBytesMax = 64U << 10;
constexpr unsigned kSilenceMaxMs =
    10000;  ///< TCP: unacknowledged for so long breaks the connection
constexpr const char* kClientName = "kvseek-cpp " KVSEEK_VERSION;
constexpr const char* kHungUp = "the daemon closed the connection at hello";

absl::Status Unreachable(const std::string& address, const ErrorCode& error) {
  return absl::UnavailableError(absl::StrCat("cannot reach ", address, ": ", error.message()));
}

/// To what can be connected to.
asio::awaitable<absl::StatusOr<std::vector<Endpoint>>> Resolve(std::string text,
                                                               asio::any_io_executor executor) {
  const absl::StatusOr<Address> address = Address::Parse(text);
  if (!address.ok()) {
    co_return proto::FieldError(absl::StatusCode::kInvalidArgument, "address",
                                address.status().message());
  }
  std::vector<Endpoint> endpoints;
  if (address->kind != Address::Kind::kTcp) {
    endpoints.emplace_back(asio::local::stream_protocol::endpoint(address->path));
    co_return endpoints;
  }
  asio::ip::tcp::resolver resolver(executor);
  const auto [error, found] =
      co_await resolver.async_resolve(address->host, address->port, kAsTuple);
  if (error) co_return Unreachable(text, error);
  for (const auto& entry : found) endpoints.emplace_back(entry.endpoint());
  co_return endpoints;
}

bool AsksShared(const ClientOptions& options) { return absl::StartsWith(options.address, "shm:"); }

}  // namespace

bool AsksUnchecked(const ClientOptions& options) {
  return absl::StartsWith(options.address, "unix:") || AsksShared(options);
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
  frame.message = std::move(message);
  frame.deadline = deadline;
  return frame;
}

void OutFrame::Sum() {
  if (summed || message.payload.empty()) return;
  message.BringTogether();
  trailer = proto::MakeTrailer(message.payload);
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
  if (message.owned != nullptr || message.payload.empty()) return;
  if (message.parts.empty()) message.parts.push_back({message.payload, 0});
  message.BringTogether();
}

size_t OutFrame::Bytes() const {
  const size_t payload_bytes = message.payload.size();
  return head.size() + (payload_bytes == 0 ? 0 : payload_bytes + trailer.size());
}

std::vector<asio::const_buffer> OutFrame::Rest() const {
  static constexpr std::array<uint8_t, proto::kPayloadAlignment> kZeros{};
  std::vector<asio::const_buffer> all;
  all.reserve(2 * message.parts.size() + 3);
  all.emplace_back(head.data(), head.size());
  size_t end = 0;
  for (const Message::Part& part : message.parts) {
    if (part.offset != end) all.emplace_back(kZeros.data(), part.offset - end);
    all.emplace_back(part.bytes.data(), part.bytes.size());
    end = part.offset + part.bytes.size();
  }
  if (message.parts.empty()) all.emplace_back(message.payload.data(), message.payload.size());
  if (!message.payload.empty()) all.emplace_back(trailer.data(), trailer.size());
  size_t skip = sent;
  const auto rest = std::find_if(all.begin(), all.end(), [&skip](asio::const_buffer& part) {
    const size_t step = std::min(skip, part.size());
    part += step;
    skip -= step;
    return part.size() != 0;
  });
  all.erase(all.begin(), rest);
  return all;
}

// ---- connecting

Link::Link(asio::io_context& io, transport::Lookout& watch)
    : lookout(watch), stream(transport::Stream::Socket(io)), reader(stream), timer(io) {}

absl::StatusOr<FrameHeader> Link::TakeHeader(const proto::FrameLimits& frame_limits) {
  return proto::DecodeHeader({reader.Take(proto::kHeaderBytes), proto::kHeaderBytes}, frame_limits);
}

Link::Awaitable<absl::Status> Link::ConnectSocket(const std::string& address) {
  const auto endpoints = co_await Resolve(address, stream.executor());
  if (!endpoints.ok()) co_return endpoints.status();
  transport::Stream::Socket& socket = stream.socket();
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
  if (AsksShared(options)) {
    hello.add_features(proto::kSharedMemory);
    reader.ReadNothingAhead();  // the memory's descriptor follows the answer
  }
  hello.set_token(options.token);
  hello.set_client(kClientName);
  FrameHeader request;
  request.request_id = kHelloId;
  const std::string frame = proto::EncodeFrame(request, hello.SerializeAsString(), {});
  std::vector<asio::const_buffer> out(1, asio::const_buffer(frame.data(), frame.size()));
  // Should this fail, the daemon may still have said why.
  co_await stream.Write(std::move(out));

  if (!co_await reader.Fill(proto::kHeaderBytes)) co_return absl::UnavailableError(kHungUp);
  const auto header = TakeHeader({.metadata_bytes_max = kWelcomeBytesMax, .payload_bytes_max = 0});
  if (!header.ok()) co_return Malformed(header.status().message());
  std::string metadata(header->metadata_bytes, '\0');
  auto* bytes = reinterpret_cast<uint8_t*>(metadata.data());
  if (!co_await reader.ReadInto(bytes, metadata.size())) co_return absl::UnavailableError(kHungUp);
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
  if (!AsksShared(options)) co_return absl::OkStatus();
  if (std::ranges::count(welcome.features(), proto::kSharedMemory) == 0) {
    co_return absl::UnavailableError(
        absl::StrCat(options.address, ": the daemon does not grant shared memory"));
  }
  co_return co_await Share(welcome.shared_memory());
}

Link::Awaitable<absl::Status> Link::Share(const proto::SharedMemory& sizes) {
  const auto [error] = co_await stream.socket().async_wait(Socket::wait_read, kAsTuple);
  if (error) co_return absl::UnavailableError(kHungUp);
  auto rings = transport::SharedRings::ReceiveFrom(
      stream.socket().native_handle(),
      {.request_bytes = sizes.request_ring_bytes(), .answer_bytes = sizes.answer_ring_bytes()});
  if (!rings.ok()) co_return rings.status();
  stream.Share(*std::move(rings), lookout);
  co_return absl::OkStatus();
}

Link::Awaitable<absl::Status> Link::Open(const ClientOptions& options, DaemonInfo& info) {
  absl::Status connected = co_await ConnectSocket(options.address);
  if (!connected.ok()) co_return connected;
  co_return co_await SayHello(options, info);
}

}  // namespace kvseek::client
