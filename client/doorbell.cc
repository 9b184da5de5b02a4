#include "client/doorbell.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/encode_requests.h"
#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"
#include "transport/address.h"
#include "transport/pause.h"
#include "transport/sealed_memory.h"

namespace kvseek {
namespace {

using proto::FrameHeader;
using proto::Op;
using transport::DoorbellAnswer;
using transport::DoorbellItem;
using transport::DoorbellLayout;
using transport::DoorbellQuestion;
using Clock = std::chrono::steady_clock;

constexpr uint32_t kAnswerBytesMax = 64U << 10;
constexpr int kLooksAwake = 20000;  ///< Await's, before it lets others run in between

absl::Status Invalid(absl::string_view field, absl::string_view message) {
  return proto::FieldError(absl::StatusCode::kInvalidArgument, field, message);
}

absl::Status Malformed(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("malformed answer: ", what));
}

/// A unix socket that is read and written by one thread, until a deadline.
class Wire {
 public:
  explicit Wire(Clock::time_point deadline) : deadline_(deadline) {}
  ~Wire() {
    if (socket_ >= 0) close(socket_);
  }
  Wire(const Wire&) = delete;
  Wire& operator=(const Wire&) = delete;

  absl::Status Connect(const ClientOptions& daemon) {
    const auto address = transport::Address::Parse(daemon.address);
    if (!address.ok()) return Invalid("address", address.status().message());
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    if (address->kind == transport::Address::Kind::kTcp ||
        address->path.size() >= sizeof(name.sun_path)) {
      return Invalid("address", "a doorbell needs a unix socket of this host");
    }
    std::memcpy(name.sun_path, address->path.data(), address->path.size());
    socket_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (socket_ < 0) return absl::ResourceExhaustedError(std::strerror(errno));
    if (connect(socket_, reinterpret_cast<const sockaddr*>(&name), sizeof(name)) != 0) {
      return absl::UnavailableError(
          absl::StrCat("cannot reach ", daemon.address, ": ", std::strerror(errno)));
    }
    return absl::OkStatus();
  }

  /// Waits for `events`; false: the deadline has passed.
  bool Wait(int16_t events) const {
    for (;;) {
      const auto left =
          std::chrono::duration_cast<std::chrono::milliseconds>(deadline_ - Clock::now()).count();
      if (left < 0) return false;
      pollfd entry{.fd = socket_, .events = events, .revents = 0};
      const int ready = poll(&entry, 1, static_cast<int>(std::min<int64_t>(left + 1, 1000)));
      if (ready > 0) return true;
      if (ready < 0 && errno != EINTR) return true;  // the next call says what is wrong
    }
  }

  absl::Status Send(const std::string& bytes) const {
    for (size_t sent = 0; sent < bytes.size();) {
      const ssize_t some =
          send(socket_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (some > 0) {
        sent += static_cast<size_t>(some);
      } else if (some < 0 && errno != EAGAIN && errno != EINTR) {
        return absl::OkStatus();  // the daemon may have said why before it closed
      } else if (!Wait(POLLOUT)) {
        return absl::DeadlineExceededError("connect_timeout has passed");
      }
    }
    return absl::OkStatus();
  }

  absl::Status Receive(void* out, size_t bytes) const {
    for (size_t got = 0; got < bytes;) {
      const ssize_t some = recv(socket_, static_cast<uint8_t*>(out) + got, bytes - got, 0);
      if (some > 0) {
        got += static_cast<size_t>(some);
      } else if (some == 0 || (errno != EAGAIN && errno != EINTR)) {
        return absl::UnavailableError("the daemon closed the connection");
      } else if (!Wait(POLLIN)) {
        return absl::DeadlineExceededError("connect_timeout has passed");
      }
    }
    return absl::OkStatus();
  }

  /// Sends a request, and takes its answer apart.
  template <typename Answer>
  absl::StatusOr<Answer> Call(Op op, const std::string& metadata) {
    FrameHeader request;
    request.op = op;
    request.request_id = ++last_id_;
    absl::Status status = Send(proto::EncodeFrame(request, metadata, {}));
    std::array<uint8_t, proto::kHeaderBytes> bytes{};
    if (status.ok()) status = Receive(bytes.data(), bytes.size());
    if (!status.ok()) return status;
    const auto header =
        proto::DecodeHeader(bytes, {.metadata_bytes_max = kAnswerBytesMax, .payload_bytes_max = 0});
    if (!header.ok()) return Malformed(header.status().message());
    std::string answer(header->metadata_bytes, '\0');
    status = Receive(answer.data(), answer.size());
    if (!status.ok()) return status;
    if ((header->flags & proto::kFlagError) != 0) {
      proto::Error error;
      if (!error.ParseFromString(answer)) return Malformed("not an Error");
      return proto::FromError(error);
    }
    Answer message;
    if (header->op != op || header->request_id != request.request_id ||
        (header->flags & proto::kFlagResponse) == 0 || !message.ParseFromString(answer)) {
      return Malformed(absl::StrCat("not an answer to ", proto::OpName(op)));
    }
    return message;
  }

  int socket() const { return socket_; }

 private:
  const Clock::time_point deadline_;
  int socket_ = -1;
  uint64_t last_id_ = 0;
};

}  // namespace

class Doorbell::Impl {
 public:
  Impl(std::unique_ptr<Wire> connection, uint64_t boot, transport::SealedMemory shared,
       const DoorbellLayout& offsets)
      : wire(std::move(connection)),
        boot_id(boot),
        memory(std::move(shared)),
        layout(offsets),
        rung(offsets.shape().slots) {}

  template <typename T>
  T* At(uint64_t offset) const {
    return reinterpret_cast<T*>(memory.data() + offset);
  }

  const std::unique_ptr<Wire> wire;
  const uint64_t boot_id;
  const transport::SealedMemory memory;
  const DoorbellLayout layout;
  struct Rung {
    uint64_t number = 0;
    uint64_t heads = 0;  ///< items x tokens x query heads
  };
  std::vector<Rung> rung;  ///< (slots): the last questions of Ring
};

absl::StatusOr<std::unique_ptr<Doorbell>> Doorbell::Open(const ClientOptions& daemon,
                                                         const DoorbellOptions& options) {
  const auto message = client::EncodeOpenDoorbell(options);
  if (!message.ok()) return message.status();
  auto wire = std::make_unique<Wire>(Clock::now() + daemon.connect_timeout);
  absl::Status status = wire->Connect(daemon);
  if (!status.ok()) return status;

  proto::HelloRequest hello;
  hello.set_version_min(proto::kVersion);
  hello.set_version_max(proto::kVersion);
  hello.set_token(daemon.token);
  hello.set_client("kvseek-cpp " KVSEEK_VERSION " doorbell");
  const auto welcome = wire->Call<proto::HelloResponse>(Op::kHello, hello.SerializeAsString());
  if (!welcome.ok()) return welcome.status();
  const auto opened = wire->Call<proto::OpenDoorbellResponse>(Op::kOpenDoorbell, message->metadata);
  if (!opened.ok()) return opened.status();

  const auto heads = static_cast<uint32_t>(options.kv_heads.empty() ? options.shape.kv_heads
                                                                    : options.kv_heads.size());
  const DoorbellLayout layout(
      {.slots = options.shape.layers,
       .items_max = options.items_max,
       .tokens_max = options.tokens_max,
       .query_heads = heads * options.shape.Group(),
       .key_dim = options.shape.key_dim,
       .value_dim = options.shape.value_dim,
       .query_element_bytes = static_cast<uint32_t>(kernels::DTypeBytes(options.query_dtype))});
  if (opened->version() != transport::kDoorbellVersion ||
      opened->memory_bytes() != layout.bytes()) {
    return absl::FailedPreconditionError("the daemon's doorbells are of another layout");
  }
  if (!wire->Wait(POLLIN)) return absl::DeadlineExceededError("connect_timeout has passed");
  auto memory = transport::SealedMemory::ReceiveFrom(wire->socket(), layout.bytes());
  if (!memory.ok()) return memory.status();
  return std::unique_ptr<Doorbell>(new Doorbell(
      std::make_unique<Impl>(std::move(wire), welcome->boot_id(), *std::move(memory), layout)));
}

Doorbell::Doorbell(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Doorbell::~Doorbell() = default;

uint8_t* Doorbell::memory() const { return impl_->memory.data(); }
const DoorbellLayout& Doorbell::layout() const { return impl_->layout; }
uint64_t Doorbell::boot_id() const { return impl_->boot_id; }

bool Doorbell::Connected() const {
  char byte = 0;
  const ssize_t got = recv(impl_->wire->socket(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
  return got < 0 && (errno == EAGAIN || errno == EINTR);
}

absl::StatusOr<uint64_t> Doorbell::Ring(uint32_t slot, uint32_t tokens,
                                        absl::Span<const DoorbellItem> items,
                                        absl::Span<const uint8_t> queries) {
  const transport::DoorbellShape& shape = impl_->layout.shape();
  if (slot >= shape.slots) return Invalid("slot", absl::StrCat(slot, " of ", shape.slots));
  if (items.empty() || items.size() > shape.items_max) return Invalid("items", "1..items_max");
  if (tokens == 0 || tokens > shape.tokens_max) return Invalid("tokens", "not in 1..tokens_max");
  const uint64_t heads = items.size() * tokens * shape.query_heads;
  if (queries.size() != heads * shape.key_dim * shape.query_element_bytes) {
    return Invalid("queries", absl::StrCat(queries.size(), " bytes are not its shape"));
  }
  const DoorbellQuestion question{.items = static_cast<uint32_t>(items.size()), .tokens = tokens};
  auto* const to = impl_->At<uint8_t>(impl_->layout.question(slot));
  std::memcpy(to, &question, sizeof(question));
  std::memcpy(to + sizeof(question), items.data(), items.size() * sizeof(DoorbellItem));
  std::memcpy(impl_->At<uint8_t>(impl_->layout.queries(slot)), queries.data(), queries.size());
  Impl::Rung& rung = impl_->rung[slot];
  rung.heads = heads;
  ++rung.number;
  std::atomic_ref<uint64_t>(*impl_->At<uint64_t>(impl_->layout.asked(slot)))
      .store(rung.number, std::memory_order_release);
  return rung.number;
}

absl::StatusOr<Doorbell::States> Doorbell::Await(uint32_t slot, uint64_t number,
                                                 Clock::time_point deadline) {
  const transport::DoorbellShape& shape = impl_->layout.shape();
  if (slot >= shape.slots) return Invalid("slot", absl::StrCat(slot, " of ", shape.slots));
  auto* const answer = impl_->At<DoorbellAnswer>(impl_->layout.answer(slot));
  for (int i = 0;; ++i) {
    if (std::atomic_ref<uint64_t>(answer->number).load(std::memory_order_acquire) == number) break;
    if (Clock::now() >= deadline) return absl::DeadlineExceededError("the answer did not come");
    if (i < kLooksAwake) {
      transport::Pause();
    } else {
      std::this_thread::yield();
    }
  }
  if (answer->status != 0) {
    proto::Error error;
    error.set_code(answer->status);
    error.set_message("refused by the daemon");
    return proto::FromError(error);
  }
  const uint64_t heads = impl_->rung[slot].heads;
  const auto* const lse = impl_->At<float>(impl_->layout.lses(slot));
  const auto* const out = impl_->At<uint16_t>(impl_->layout.outs(slot));
  States states;
  states.lse.assign(lse, lse + heads);
  states.out.assign(out, out + heads * shape.value_dim);
  states.daemon_ns = answer->daemon_ns;
  return states;
}

}  // namespace kvseek
