#include "service/connection.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <boost/asio/buffer.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <cstring>
#include <exception>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "proto/status_code.h"
#include "service/listener.h"
#include "service/request_validation.h"

namespace kvseek::service {
namespace {

namespace asio = boost::asio;
using ErrorCode = boost::system::error_code;
using proto::FieldError;
using proto::FrameHeader;
using proto::Op;
using std::chrono::milliseconds;
using transport::kAsTuple;
using transport::Stream;

constexpr milliseconds kGoodbye{1000};  ///< a peer may take so long to read a last Error
constexpr proto::FrameLimits kHelloLimits{.metadata_bytes_max = 16 << 10, .payload_bytes_max = 0};

/// Takes the same time whatever the first difference is.
bool SameSecret(const std::string& given, const std::string& expected) {
  volatile unsigned difference = given.size() == expected.size() ? 0U : 1U;
  for (size_t i = 0; i < given.size(); ++i) {
    const char other = expected.empty() ? '\0' : expected[i % expected.size()];
    difference = difference | static_cast<unsigned char>(given[i] ^ other);
  }
  return difference == 0U;
}

}  // namespace

Connection::Connection(Stream::Socket socket, const ConnectionContext& context)
    : context_(context),
      stream_(std::move(socket)),
      reader_(stream_),
      wake_reader_(stream_.executor(), asio::steady_timer::time_point::max()),
      watchdog_(stream_.executor()),
      writer_(stream_, context_.options.frame_timeout) {
  TuneSocket(stream_.socket());
  read_deadline_ = Clock::now() + context_.options.hello_timeout;
}

Connection::~Connection() { context_.shared_memory->Release(shared_bytes_); }

void Connection::Start() {
  asio::co_spawn(stream_.executor(), Read(shared_from_this()), asio::detached);
  asio::co_spawn(stream_.executor(), Write(shared_from_this()), asio::detached);
  asio::co_spawn(stream_.executor(), Watch(shared_from_this()), asio::detached);
}

void Connection::Stop() {
  asio::dispatch(stream_.executor(), [self = shared_from_this()] {
    self->stopping_ = true;
    self->stream_.ShutdownReceive();
    self->wake_reader_.cancel();
  });
}

void Connection::Abort() {
  asio::dispatch(stream_.executor(), [self = shared_from_this()] { self->Close(); });
}

void Connection::Close() {
  if (closed_) return;
  closed_ = true;
  under_way_.CancelAll();
  if (doorbell_ != nullptr) doorbell_->Close();
  writer_.Close();
  wake_reader_.cancel();
  watchdog_.cancel();
  context_.closed(this);
}

// ---- answers

void Connection::Answer(AnswerFrame frame) {
  ++outstanding_;
  writer_.Push(std::move(frame));
}

void Connection::Finish(uint64_t held_bytes, bool left) {
  context_.gate->Release(held_bytes);
  if (left) {
    --outstanding_;
    wake_reader_.cancel();
  } else {
    writer_.Wake();
  }
}

Connection::Awaitable<void> Connection::Write(std::shared_ptr<Connection> self) {
  Connection& c = *self;
  while (!c.closed_) {
    const AnswerWriter::Written written = co_await c.writer_.WriteNext();
    c.outstanding_ -= written.frames;
    c.wake_reader_.cancel();
    if (written.error && !c.closed_) {
      spdlog::debug("connection ended while writing: {}", written.error.message());
      c.Close();
    }
  }
}

// ---- time

Connection::Awaitable<void> Connection::Watch(std::shared_ptr<Connection> self) {
  Connection& c = *self;
  const milliseconds shortest =
      std::min(c.context_.options.hello_timeout, c.context_.options.frame_timeout);
  const milliseconds tick = std::clamp(shortest / 4, milliseconds(1), milliseconds(1000));
  while (!c.closed_) {
    c.watchdog_.expires_after(tick);
    co_await c.watchdog_.async_wait(kAsTuple);
    if (c.closed_) break;
    const Clock::time_point now = Clock::now();
    if (c.writer_.Overdue(now)) {
      spdlog::info("connection closed: the peer did not read an answer in time");
      c.Close();
    } else if (now > c.read_deadline_) {
      if (c.timed_out_) {  // was told, and has not gone
        c.Close();
        break;
      }
      c.timed_out_ = true;
      c.read_deadline_ = now + kGoodbye;
      c.stream_.ShutdownReceive();
    }
  }
}

// ---- requests

Connection::Awaitable<bool> Connection::WaitForRoom(bool is_cancel) {
  // A cancel may pass a full house, or it would come too late; but not without end.
  const size_t max = size_t{context_.options.inflight_requests_max} * (is_cancel ? 2 : 1);
  while (!closed_ && !stopping_ &&
         (outstanding_ >= max || writer_.queued_bytes() > context_.options.payload_bytes_max)) {
    read_deadline_ = Clock::time_point::max();
    co_await wake_reader_.async_wait(kAsTuple);
  }
  co_return !closed_ && !stopping_;
}

Connection::Awaitable<bool> Connection::WaitForBytes(uint64_t bytes) {
  if (bytes == 0 || context_.gate->TryTake(bytes)) co_return true;
  bytes_taken_ = false;
  read_deadline_ = Clock::time_point::max();
  auto let_in = [self = shared_from_this(), work = asio::make_work_guard(stream_.executor())] {
    asio::dispatch(self->stream_.executor(), [self] {
      self->bytes_taken_ = true;
      self->wake_reader_.cancel();
    });
  };
  context_.gate->Take(bytes, let_in);
  while (!bytes_taken_) co_await wake_reader_.async_wait(kAsTuple);
  if (!closed_ && !stopping_) co_return true;
  context_.gate->Release(bytes);
  co_return false;
}

Connection::Awaitable<bool> Connection::ReadBody(
    const FrameHeader& header, Request& request,
    std::array<uint8_t, proto::kTrailerBytes>& trailer) {
  request.metadata.resize(header.metadata_bytes);
  auto* metadata = reinterpret_cast<uint8_t*>(request.metadata.data());
  if (!co_await reader_.ReadInto(metadata, request.metadata.size())) co_return false;
  if (header.payload_bytes == 0) co_return true;
  if (!co_await reader_.Discard(header.PaddingBytes())) co_return false;
  request.payload = MakePayload(header.payload_bytes);
  if (!co_await reader_.ReadInto(request.payload.data.get(), header.payload_bytes)) co_return false;
  co_return co_await reader_.ReadInto(trailer.data(), trailer.size());
}

Connection::Awaitable<bool> Connection::ReadRequest(FrameHeader header) {
  const Clock::time_point arrived = Clock::now();
  const bool is_cancel = header.op == Op::kCancel;
  if (!co_await WaitForRoom(is_cancel)) co_return false;
  read_deadline_ = Clock::now() + context_.options.frame_timeout;
  absl::Status refused;
  if (!proto::IsKnownOp(static_cast<uint8_t>(header.op))) {
    refused = FieldError(absl::StatusCode::kInvalidArgument, "op", "not an operation");
  } else if (header.op == Op::kHello) {
    refused = FieldError(absl::StatusCode::kInvalidArgument, "op", "hello was said already");
  } else if ((header.flags & proto::kFlagResponse) != 0) {
    refused = FieldError(absl::StatusCode::kInvalidArgument, "flags", "not a request");
  } else if (under_way_.Contains(header.request_id)) {
    refused = FieldError(absl::StatusCode::kInvalidArgument, "request_id", "is under way already");
  }
  if (!refused.ok()) {
    if (!co_await reader_.Discard(header.BodyBytes())) co_return false;
    Answer(AnswerFrame::MakeError(header.op, header.request_id, refused));
    co_return true;
  }
  const uint64_t held = is_cancel ? 0 : uint64_t{header.metadata_bytes} + header.payload_bytes;
  if (!co_await WaitForBytes(held)) co_return false;
  absl::Cleanup release = [this, held] { context_.gate->Release(held); };
  read_deadline_ = Clock::now() + context_.options.frame_timeout;
  Request request;
  request.op = header.op;
  std::array<uint8_t, proto::kTrailerBytes> trailer{};
  if (!co_await ReadBody(header, request, trailer)) co_return false;
  if (checked_ && header.payload_bytes != 0) {
    const absl::Status intact =
        proto::VerifyPayload({request.payload.data.get(), request.payload.bytes}, trailer);
    if (!intact.ok()) {
      Answer(AnswerFrame::MakeError(header.op, header.request_id, intact));
      co_return true;
    }
  }
  const auto time_left = header.time_left_us == 0
                             ? std::chrono::microseconds(context_.options.deadline_default)
                             : std::chrono::microseconds(header.time_left_us);
  request.deadline = arrived + time_left;
  if (is_cancel) {
    Cancel(header, request.metadata);
    co_return true;
  }
  if (header.op == Op::kOpenDoorbell && context_.doorbells != nullptr) {
    co_return co_await OpenDoorbell(header, std::move(request));
  }
  std::move(release).Cancel();
  Accept(header, std::move(request), held);
  co_return true;
}

absl::StatusOr<std::shared_ptr<Doorbell>> Connection::MakeDoorbell(const Request& request) {
  const auto refuse = [](absl::string_view message) {
    return FieldError(absl::StatusCode::kFailedPrecondition, "op", message);
  };
  if (!stream_.IsUnix() || stream_.shared()) return refuse("needs frames on a unix socket");
  if (doorbell_ != nullptr) return refuse("the connection has a doorbell already");
  if (outstanding_ != 0) return refuse("other requests are under way on the connection");
  if (request.payload.bytes != 0) {
    return FieldError(absl::StatusCode::kInvalidArgument, "payload", "there must be none");
  }
  proto::OpenDoorbellRequest message;
  absl::Status status = ParseMetadata(request.metadata, message);
  if (!status.ok()) return status;
  return context_.doorbells->Open(message, context_.shared_memory);
}

Connection::Awaitable<bool> Connection::OpenDoorbell(FrameHeader header, Request request) {
  auto doorbell = MakeDoorbell(request);
  if (!doorbell.ok()) {
    Answer(AnswerFrame::MakeError(header.op, header.request_id, doorbell.status()));
    co_return true;
  }
  doorbell_ = *std::move(doorbell);
  proto::OpenDoorbellResponse message;
  message.set_version(transport::kDoorbellVersion);
  message.set_memory_bytes(doorbell_->memory_bytes());
  Response response;
  response.metadata = message.SerializeAsString();
  Answer(AnswerFrame::Make(header.op, header.request_id, std::move(response), checked_));
  while (!closed_ && !writer_.Idle()) co_await wake_reader_.async_wait(kAsTuple);
  if (closed_ || !doorbell_->SendTo(stream_.socket().native_handle()).ok()) co_return false;
  context_.doorbells->Serve(doorbell_);
  co_return true;
}

void Connection::Cancel(const FrameHeader& header, const std::string& metadata) {
  proto::CancelRequest message;
  if (!message.ParseFromString(metadata)) {
    Answer(AnswerFrame::MakeError(
        header.op, header.request_id,
        FieldError(absl::StatusCode::kInvalidArgument, "metadata", "not a CancelRequest")));
    return;
  }
  under_way_.Cancel(message.request_id());
  Answer(AnswerFrame::Make(header.op, header.request_id, {}, checked_));
}

void Connection::Accept(const FrameHeader& header, Request request, uint64_t held_bytes) {
  request.cancelled = under_way_.Add(header.request_id);
  ++outstanding_;
  // The guard keeps the io threads, and with them what the connection is made of, until the answer
  // has come. It is dropped after the connection, and both on an io thread: the worker that calls
  // has nothing left of either.
  context_.dispatch(
      std::move(request),
      [work = asio::make_work_guard(stream_.executor()), self = shared_from_this(), op = header.op,
       id = header.request_id, held_bytes](Response response) mutable {
        self->under_way_.Remove(id);
        const bool left =
            self->writer_.Send(AnswerFrame::Make(op, id, std::move(response), self->checked_));
        const auto executor = self->stream_.executor();
        asio::dispatch(executor, [work = std::move(work), self = std::move(self), held_bytes,
                                  left] { self->Finish(held_bytes, left); });
      });
}

// ---- the connection's life

std::optional<Connection::Ending> Connection::CheckHello(const FrameHeader& header,
                                                         const std::string& metadata,
                                                         proto::HelloRequest& hello) const {
  const auto refuse = [&header](absl::StatusCode code, absl::string_view field,
                                absl::string_view message) {
    return Ending{FieldError(code, field, message), header.request_id, header.op};
  };
  if (header.op != Op::kHello || (header.flags & proto::kFlagResponse) != 0) {
    return refuse(absl::StatusCode::kFailedPrecondition, "op", "the first request must be hello");
  }
  if (!hello.ParseFromString(metadata)) {
    return refuse(absl::StatusCode::kInvalidArgument, "metadata", "not a HelloRequest");
  }
  if (hello.version_min() > proto::kVersion || hello.version_max() < proto::kVersion) {
    return refuse(absl::StatusCode::kFailedPrecondition, "version_max",
                  absl::StrCat("this daemon speaks version ", int{proto::kVersion}));
  }
  if (!context_.options.token.empty() && !SameSecret(hello.token(), context_.options.token)) {
    return refuse(absl::StatusCode::kUnauthenticated, "token", "is not the daemon's");
  }
  return std::nullopt;
}

Connection::Awaitable<std::optional<Connection::Ending>> Connection::Greet() {
  if (!co_await reader_.Fill(proto::kHeaderBytes)) co_return Ending{};
  const auto header =
      proto::DecodeHeader({reader_.Take(proto::kHeaderBytes), proto::kHeaderBytes}, kHelloLimits);
  if (!header.ok()) co_return Ending{header.status()};
  std::string metadata(header->metadata_bytes, '\0');
  auto* bytes = reinterpret_cast<uint8_t*>(metadata.data());
  if (!co_await reader_.ReadInto(bytes, metadata.size())) co_return Ending{};
  proto::HelloRequest hello;
  std::optional<Ending> refused = CheckHello(*header, metadata, hello);
  if (refused.has_value()) co_return refused;

  const DaemonOptions& options = context_.options;
  proto::HelloResponse welcome;
  welcome.set_version(proto::kVersion);
  welcome.set_boot_id(context_.identity.boot_id);
  welcome.set_server(context_.identity.server);
  welcome.set_simd_level(context_.identity.simd_level);
  proto::Limits& limits = *welcome.mutable_limits();
  limits.set_metadata_bytes_max(options.metadata_bytes_max);
  limits.set_payload_bytes_max(options.payload_bytes_max);
  limits.set_batch_items_max(options.batch_items_max);
  limits.set_inflight_requests_max(options.inflight_requests_max);
  limits.set_lease_ms_max(static_cast<uint64_t>(options.lease_max.count()));
  const auto asks_for = [&](const char* feature) {
    return stream_.IsUnix() && std::ranges::count(hello.features(), feature) != 0;
  };
  std::unique_ptr<transport::SharedRings> rings;
  if (asks_for(proto::kSharedMemory)) rings = MakeRings();
  if (rings != nullptr) {
    welcome.add_features(proto::kSharedMemory);
    welcome.mutable_shared_memory()->set_request_ring_bytes(options.shared_ring_bytes);
    welcome.mutable_shared_memory()->set_answer_ring_bytes(options.shared_ring_bytes);
  }
  checked_ = rings == nullptr && !asks_for(proto::kUncheckedPayloads);
  if (!checked_) welcome.add_features(proto::kUncheckedPayloads);
  Response response;
  response.metadata = welcome.SerializeAsString();
  Answer(AnswerFrame::Make(Op::kHello, header->request_id, std::move(response), checked_));
  if (rings != nullptr) co_return co_await Share(std::move(rings));
  co_return std::nullopt;
}

std::unique_ptr<transport::SharedRings> Connection::MakeRings() {
  const uint64_t each = context_.options.shared_ring_bytes;
  const transport::RingSizes sizes{.request_bytes = each, .answer_bytes = each};
  if (sizes.MemoryBytes() > context_.options.shared_memory_bytes_max ||
      !context_.shared_memory->TryTake(sizes.MemoryBytes())) {
    spdlog::warn("no shared memory for a connection: the others have all of it");
    return nullptr;
  }
  shared_bytes_ = sizes.MemoryBytes();
  auto rings = transport::SharedRings::Create(sizes);
  if (rings.ok()) return *std::move(rings);
  spdlog::warn("no shared memory for a connection: {}", rings.status().ToString());
  return nullptr;
}

Connection::Awaitable<std::optional<Connection::Ending>> Connection::Share(
    std::unique_ptr<transport::SharedRings> rings) {
  while (!closed_ && !writer_.Idle()) co_await wake_reader_.async_wait(kAsTuple);
  if (closed_ || reader_.buffered() != 0 || !rings->SendTo(stream_.socket().native_handle()).ok()) {
    co_return Ending{};
  }
  stream_.Share(std::move(rings), *context_.lookout);
  reader_.ReadNothingAhead();
  asio::co_spawn(stream_.executor(), HearBells(shared_from_this()), asio::detached);
  co_return std::nullopt;
}

Connection::Awaitable<void> Connection::HearBells(std::shared_ptr<Connection> self) {
  co_await self->stream_.HearBells();
}

Connection::Awaitable<Connection::Ending> Connection::ReadFrames() {
  std::optional<Ending> refused = co_await Greet();
  if (refused.has_value()) co_return *refused;
  const proto::FrameLimits limits{.metadata_bytes_max = context_.options.metadata_bytes_max,
                                  .payload_bytes_max = context_.options.payload_bytes_max};
  while (!stopping_ && !closed_) {
    read_deadline_ = Clock::time_point::max();
    if (reader_.buffered() == 0 && !co_await reader_.Fill(1)) co_return Ending{};
    read_deadline_ = Clock::now() + context_.options.frame_timeout;
    if (!co_await reader_.Fill(proto::kHeaderBytes)) co_return Ending{};
    const auto header =
        proto::DecodeHeader({reader_.Take(proto::kHeaderBytes), proto::kHeaderBytes}, limits);
    if (!header.ok()) co_return Ending{header.status()};
    if (header->request_id == 0) {
      co_return Ending{
          FieldError(absl::StatusCode::kInvalidArgument, "request_id", "must not be 0")};
    }
    if (!co_await ReadRequest(*header)) co_return Ending{};
  }
  co_return Ending{};
}

Connection::Awaitable<void> Connection::SayGoodbye(Ending ending) {
  spdlog::info("connection refused: {}", ending.notice.ToString());
  Answer(AnswerFrame::MakeError(ending.op, ending.request_id, ending.notice));
  writer_.TakeNoMore();  // what is under way is not waited for
  while (!closed_ && !writer_.Idle()) co_await wake_reader_.async_wait(kAsTuple);
  if (closed_) co_return;
  // Closing with bytes unread would make the system drop what the peer has not read yet.
  read_deadline_ = Clock::now() + kGoodbye;
  timed_out_ = true;
  stream_.ShutdownSend();
  bool more = true;
  while (more) more = co_await reader_.Discard(1);
}

Connection::Awaitable<void> Connection::Read(std::shared_ptr<Connection> self) {
  Connection& c = *self;
  Ending ending;
  try {
    ending = co_await c.ReadFrames();
  } catch (const std::exception& error) {  // out of memory, as a rule
    spdlog::error("connection ended: {}", error.what());
    ending.notice = absl::ResourceExhaustedError(error.what());
  }
  if (c.timed_out_ && !c.stopping_ && ending.notice.ok()) {
    ending.notice = absl::DeadlineExceededError("the frame did not arrive in time");
  }
  if (c.stream_.corrupt() && ending.notice.ok()) {
    ending.notice = absl::DataLossError("the ring's counters make no sense");
  }
  c.read_deadline_ = Clock::time_point::max();
  if (c.stopping_) {
    while (!c.closed_ && c.outstanding_ != 0) co_await c.wake_reader_.async_wait(kAsTuple);
  } else {
    c.under_way_.CancelAll();
    if (!ending.notice.ok() && !c.closed_) co_await c.SayGoodbye(std::move(ending));
  }
  c.Close();
}

asio::awaitable<void> Refuse(std::shared_ptr<Stream> stream, absl::Status reason) {
  FrameHeader header;
  header.flags = proto::kFlagResponse | proto::kFlagError;
  const std::string frame =
      proto::EncodeFrame(header, proto::ToError(reason).SerializeAsString(), {});
  asio::steady_timer timer(stream->executor(), kGoodbye);
  timer.async_wait([stream](const ErrorCode& stopped) {
    if (!stopped) stream->Close();
  });
  std::vector<asio::const_buffer> out(1, asio::const_buffer(frame.data(), frame.size()));
  const ErrorCode error = co_await stream->Write(std::move(out));
  size_t got = error ? 0 : 1;
  if (!error) stream->ShutdownSend();
  std::array<uint8_t, 4096> rest{};
  while (got != 0) got = co_await stream->ReadSome(asio::buffer(rest));
}

}  // namespace kvseek::service
