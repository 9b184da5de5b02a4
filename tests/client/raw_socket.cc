#include "tests/client/raw_socket.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

namespace kvseek::test {
namespace {

constexpr timeval kPatience{.tv_sec = 10, .tv_usec = 0};

sockaddr_un UnixAddress(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.c_str(), std::min(path.size(), sizeof(address.sun_path) - 1));
  return address;
}

}  // namespace

TempDir::TempDir() {
  path_ = (std::filesystem::temp_directory_path() / "kvseek.XXXXXX").string();
  if (mkdtemp(path_.data()) == nullptr) std::abort();
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

proto::Error RawFrame::Error() const {
  proto::Error error;
  if (!IsError() || !error.ParseFromString(metadata)) error.Clear();
  return error;
}

RawSocket::RawSocket(int descriptor) : descriptor_(descriptor) {
  setsockopt(descriptor_, SOL_SOCKET, SO_RCVTIMEO, &kPatience, sizeof(kPatience));
  setsockopt(descriptor_, SOL_SOCKET, SO_SNDTIMEO, &kPatience, sizeof(kPatience));
}

RawSocket::RawSocket(RawSocket&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)),
      asks_shared_(other.asks_shared_),
      rings_(std::move(other.rings_)) {}

RawSocket& RawSocket::operator=(RawSocket&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(asks_shared_, other.asks_shared_);
  std::swap(rings_, other.rings_);
  return *this;
}

void RawSocket::Close() {
  if (descriptor_ >= 0) close(std::exchange(descriptor_, -1));
}

RawSocket RawSocket::Connect(const std::string& address) {
  if (address.rfind("unix:", 0) == 0 || address.rfind("shm:", 0) == 0) {
    RawSocket raw(socket(AF_UNIX, SOCK_STREAM, 0));
    raw.asks_shared_ = address[0] == 's';
    const sockaddr_un to = UnixAddress(address.substr(address.find(':') + 1));
    if (connect(raw.descriptor_, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) != 0) {
      raw.Close();
    }
    return raw;
  }
  RawSocket raw(socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  to.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
  if (connect(raw.descriptor_, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) != 0) {
    raw.Close();
  }
  return raw;
}

bool RawSocket::Share(std::unique_ptr<transport::SharedRings> rings) {
  if (!rings->SendTo(descriptor_).ok()) return false;
  rings_ = std::move(rings);
  return true;
}

bool RawSocket::SocketIsAlive() const {
  std::array<char, 64> bells{};
  const ssize_t got = recv(descriptor_, bells.data(), bells.size(), MSG_DONTWAIT);
  return got > 0 || (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK));
}

bool RawSocket::Send(const std::string& bytes) {
  size_t sent = 0;
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(kPatience.tv_sec);
  while (rings_ != nullptr && sent < bytes.size()) {
    const size_t step = rings_->out().Write(bytes.data() + sent, bytes.size() - sent);
    sent += step;
    if (rings_->out().Publish()) send(descriptor_, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    const bool alive = SocketIsAlive() && std::chrono::steady_clock::now() < give_up;
    if (step == 0 && !alive) return false;
    if (step == 0) usleep(50);
  }
  while (sent < bytes.size()) {
    const ssize_t step = send(descriptor_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (step <= 0) return false;
    sent += static_cast<size_t>(step);
  }
  return true;
}

std::string MakeFrame(proto::Op op, uint64_t request_id, const std::string& metadata,
                      const std::string& payload, uint32_t time_left_us, uint16_t flags) {
  proto::FrameHeader header;
  header.op = op;
  header.flags = flags;
  header.request_id = request_id;
  header.time_left_us = time_left_us;
  return proto::EncodeFrame(header, metadata,
                            {reinterpret_cast<const uint8_t*>(payload.data()), payload.size()});
}

bool RawSocket::SendFrame(proto::Op op, uint64_t request_id, const std::string& metadata,
                          const std::string& payload, uint32_t time_left_us, uint16_t flags) {
  return Send(MakeFrame(op, request_id, metadata, payload, time_left_us, flags));
}

bool RawSocket::SendHello(const std::string& token) {
  proto::HelloRequest hello;
  hello.set_version_min(1);
  hello.set_version_max(proto::kVersion);
  hello.set_token(token);
  return SendFrame(proto::Op::kHello, 1, hello.SerializeAsString());
}

bool RawSocket::GreetShared(const proto::HelloRequest& hello) {
  if (!SendFrame(proto::Op::kHello, 1, hello.SerializeAsString())) return false;
  const std::optional<RawFrame> answer = ReadFrame();
  proto::HelloResponse welcome;
  if (!answer.has_value() || answer->IsError() || !welcome.ParseFromString(answer->metadata) ||
      !welcome.has_shared_memory()) {
    return false;
  }
  pollfd wait{.fd = descriptor_, .events = POLLIN, .revents = 0};
  if (poll(&wait, 1, 10'000) <= 0) return false;
  auto rings = transport::SharedRings::ReceiveFrom(
      descriptor_, {.request_bytes = welcome.shared_memory().request_ring_bytes(),
                    .answer_bytes = welcome.shared_memory().answer_ring_bytes()});
  if (!rings.ok()) return false;
  rings_ = *std::move(rings);
  return true;
}

bool RawSocket::Greet(const std::string& token) {
  if (asks_shared_) {
    proto::HelloRequest hello;
    hello.set_version_min(1);
    hello.set_version_max(proto::kVersion);
    hello.set_token(token);
    hello.add_features(proto::kSharedMemory);
    return GreetShared(hello);
  }
  if (!SendHello(token)) return false;
  const std::optional<RawFrame> answer = ReadFrame();
  return answer.has_value() && !answer->IsError() && answer->header.op == proto::Op::kHello;
}

bool RawSocket::ReadBytes(void* out, size_t bytes) {
  auto* to = static_cast<char*>(out);
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(kPatience.tv_sec);
  while (rings_ != nullptr && bytes != 0) {
    const bool alive = SocketIsAlive() && std::chrono::steady_clock::now() < give_up;
    const size_t step = rings_->in().Read(to, bytes);
    to += step;
    bytes -= step;
    if (rings_->in().Free(true)) send(descriptor_, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (step == 0 && !alive) return false;
    if (step == 0) usleep(50);
  }
  while (bytes != 0) {
    const ssize_t step = recv(descriptor_, to, bytes, 0);
    if (step <= 0) return false;
    to += step;
    bytes -= static_cast<size_t>(step);
  }
  return true;
}

std::optional<RawFrame> RawSocket::ReadFrame(bool checked) {
  std::array<uint8_t, proto::kHeaderBytes> head{};
  if (!ReadBytes(head.data(), head.size())) return std::nullopt;
  const auto header = proto::DecodeHeader(head, {});
  if (!header.ok()) return std::nullopt;
  RawFrame frame;
  frame.header = *header;
  frame.metadata.resize(header->metadata_bytes);
  if (!ReadBytes(frame.metadata.data(), frame.metadata.size())) return std::nullopt;
  if (header->payload_bytes == 0) return frame;
  std::string padding(header->PaddingBytes(), '\0');
  frame.payload.resize(header->payload_bytes);
  if (!ReadBytes(padding.data(), padding.size()) ||
      !ReadBytes(frame.payload.data(), frame.payload.size()) ||
      !ReadBytes(frame.trailer.data(), frame.trailer.size())) {
    return std::nullopt;
  }
  const auto* payload = reinterpret_cast<const uint8_t*>(frame.payload.data());
  if (checked && rings_ == nullptr &&
      !proto::VerifyPayload({payload, frame.payload.size()}, frame.trailer).ok()) {
    return std::nullopt;
  }
  return frame;
}

bool RawSocket::Ended(std::chrono::milliseconds patience) {
  const auto give_up = std::chrono::steady_clock::now() + patience;
  while (rings_ != nullptr && SocketIsAlive() && !rings_->in().Ready()) {
    if (std::chrono::steady_clock::now() > give_up) return false;
    usleep(50);
  }
  if (rings_ != nullptr) return !rings_->in().Ready();
  pollfd wait{.fd = descriptor_, .events = POLLIN, .revents = 0};
  if (poll(&wait, 1, static_cast<int>(patience.count())) <= 0) return false;
  char byte = 0;
  return recv(descriptor_, &byte, 1, 0) <= 0;
}

FakeServer::FakeServer(const std::string& path, Script script) {
  listener_ = socket(AF_UNIX, SOCK_STREAM, 0);
  const sockaddr_un at = UnixAddress(path);
  if (bind(listener_, reinterpret_cast<const sockaddr*>(&at), sizeof(at)) != 0 ||
      listen(listener_, 16) != 0) {
    std::abort();
  }
  thread_ = std::thread([this, script = std::move(script)] {
    for (;;) {
      const int accepted = accept(listener_, nullptr, nullptr);
      if (accepted < 0) return;
      RawSocket connection(accepted);
      script(connection);
    }
  });
}

FakeServer::~FakeServer() {
  shutdown(listener_, SHUT_RDWR);
  thread_.join();
  close(listener_);
}

bool FakeServer::Welcome(RawSocket& socket, uint32_t payload_bytes_max,
                         const std::string& feature) {
  const std::optional<RawFrame> hello = socket.ReadFrame();
  if (!hello.has_value() || hello->header.op != proto::Op::kHello) return false;
  proto::HelloResponse welcome;
  welcome.set_version(proto::kVersion);
  welcome.set_boot_id(7);
  welcome.set_server("fake");
  if (!feature.empty()) welcome.add_features(feature);
  if (feature == proto::kSharedMemory) {
    welcome.mutable_shared_memory()->set_request_ring_bytes(4096);
    welcome.mutable_shared_memory()->set_answer_ring_bytes(4096);
  }
  welcome.mutable_limits()->set_payload_bytes_max(payload_bytes_max);
  welcome.mutable_limits()->set_metadata_bytes_max(1U << 20);
  return socket.SendFrame(proto::Op::kHello, hello->header.request_id, welcome.SerializeAsString(),
                          "", 0, proto::kFlagResponse);
}

}  // namespace kvseek::test
