#include "client/channel.h"

#include <algorithm>
#include <array>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/post.hpp>
#include <cstring>
#include <exception>
#include <future>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "client/channel_driver.h"
#include "client/channel_link.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"

namespace kvseek::client {
namespace {

namespace asio = boost::asio;
using ErrorCode = boost::system::error_code;
using proto::FrameHeader;
using proto::Op;
template <typename T>
using Awaitable = asio::awaitable<T>;

constexpr uint32_t kMetadataBytesMax = 64U << 20;  ///< of answers

}  // namespace

class Channel::Impl {
 public:
  explicit Impl(const ClientOptions& options)
      : options_(options), driver_(options.spin), io_(driver_.io()), timer_(io_) {
    driver_.Begin();
  }

  ~Impl() {
    driver_.End([this] {
      closed_ = true;
      if (link_ != nullptr) Break(link_, Closed());
      timer_.cancel();
    });
  }

  absl::Status Connect() {
    std::promise<absl::Status> connected;
    asio::post(io_, [&] {
      if (link_ != nullptr && link_->up) {
        connected.set_value(absl::OkStatus());
        return;
      }
      connect_waiters_.push_back([&](const absl::Status& status) { connected.set_value(status); });
      if (link_ == nullptr) Dial();
    });
    return connected.get_future().get();
  }

  void Start(Message message, Clock::time_point deadline, Done done) {
    if (message.owned != nullptr) message.BringTogether();
    Call call{OutFrame::Prepare(std::move(message), deadline), std::move(done)};
    if (!AsksUnchecked(options_)) call.frame.Sum();
    {
      const std::lock_guard lock(inbox_mutex_);
      inbox_.push_back(std::move(call));
    }
    driver_.Drive([this] { TakeCalls(); });
  }

  void Poll() { driver_.Poll(); }

  void Fail(absl::Status status, Done done) {
    asio::post(io_, [status = std::move(status), done = std::move(done)]() mutable {
      done(std::move(status));
    });
  }

  DaemonInfo info() const {
    const std::lock_guard lock(mutex_);
    return info_;
  }

 private:
  struct Pending {
    Done done;
    Op op;
    Clock::time_point deadline;
    uint64_t bytes_sent;
  };

  struct Call {
    OutFrame frame;
    Done done;
  };

  // ---- all below: in the seat

  static absl::Status Closed() { return absl::CancelledError("the client was closed"); }

  /// Runs no callback, since callers of Start do not expect any.
  void TakeCalls() {
    {
      const std::lock_guard lock(inbox_mutex_);
      taken_.swap(inbox_);
    }
    for (Call& call : taken_) Begin(std::move(call.frame), std::move(call.done));
    taken_.clear();
  }

  void Begin(OutFrame frame, Done done) {
    if (closed_) return Fail(Closed(), std::move(done));
    if (frame.deadline <= Clock::now()) {
      return Fail(absl::DeadlineExceededError("the deadline had passed before the call"),
                  std::move(done));
    }
    if (pending_.size() >= options_.inflight_requests_max) {
      return Fail(proto::FieldError(absl::StatusCode::kResourceExhausted, "inflight_requests_max",
                                    "so many calls are under way"),
                  std::move(done));
    }
    if (link_ == nullptr) Dial();
    if (link_->up) {
      const absl::Status fits = CheckLimits(*link_, frame.header);
      if (!fits.ok()) return Fail(fits, std::move(done));
    }
    const uint64_t id = next_id_++;
    frame.header.request_id = id;
    pending_.emplace(id, Pending{std::move(done), frame.header.op, frame.deadline, frame.Bytes()});
    deadlines_.emplace(frame.deadline, id);
    link_->queue.push_back(std::move(frame));
    ArmTimer();
    if (link_->up) Pump(link_);
  }

  /// A frame over the daemon's limits would cost the connection, and with it all other calls.
  static absl::Status CheckLimits(const Link& link, const FrameHeader& header) {
    const auto over = [](absl::string_view field, uint32_t bytes, uint32_t max) {
      return proto::FieldError(absl::StatusCode::kResourceExhausted, field,
                               absl::StrCat(bytes, " bytes, the daemon takes ", max));
    };
    if (header.payload_bytes > link.limits.payload_bytes_max()) {
      return over("payload_bytes", header.payload_bytes, link.limits.payload_bytes_max());
    }
    if (header.metadata_bytes > link.limits.metadata_bytes_max()) {
      return over("metadata_bytes", header.metadata_bytes, link.limits.metadata_bytes_max());
    }
    return absl::OkStatus();
  }

  void Complete(uint64_t id, absl::StatusOr<Answer> answer) {
    const auto found = pending_.find(id);
    if (found == pending_.end()) return;
    Pending pending = std::move(found->second);
    pending_.erase(found);
    deadlines_.erase({pending.deadline, id});
    if (answer.ok()) answer->bytes_sent = pending.bytes_sent;
    pending.done(std::move(answer));
  }

  // By value: it may drop the last other reference.
  // NOLINTNEXTLINE(performance-unnecessary-value-param)
  void Break(std::shared_ptr<Link> link, const absl::Status& status) {
    if (link->broken) return;
    link->broken = true;
    link->stream.Close();
    link->timer.cancel();
    link->queue.clear();
    link_.reset();
    deadlines_.clear();
    auto pending = std::exchange(pending_, {});
    auto waiters = std::exchange(connect_waiters_, {});
    for (auto& [id, call] : pending) call.done(status);
    for (const auto& waiter : waiters) waiter(status);
  }

  // ---- deadlines

  void ArmTimer() {
    if (deadlines_.empty() || deadlines_.begin()->first >= armed_) return;
    armed_ = deadlines_.begin()->first;
    timer_.expires_at(armed_);
    timer_.async_wait([this](const ErrorCode& stopped) {
      if (stopped) return;  // armed anew
      armed_ = Clock::time_point::max();
      const Clock::time_point now = Clock::now();
      while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
        Expire(deadlines_.begin()->second);
      }
      ArmTimer();
    });
  }

  void Expire(uint64_t id) {
    const std::shared_ptr<Link> link = link_;
    if (link != nullptr) {
      const auto is_it = [id](const OutFrame& frame) { return frame.header.request_id == id; };
      const auto queued = std::find_if(link->queue.begin(), link->queue.end(), is_it);
      if (queued != link->queue.end() && queued->sent == 0) {
        link->queue.erase(queued);
      } else {
        // The caller's memory goes away with the call; half a frame still has to be made whole.
        if (queued != link->queue.end()) queued->Detach();
        Message cancel;
        cancel.op = Op::kCancel;
        proto::CancelRequest request;
        request.set_request_id(id);
        cancel.metadata = request.SerializeAsString();
        OutFrame frame =
            OutFrame::Prepare(std::move(cancel), Clock::now() + options_.default_deadline);
        frame.header.request_id = next_id_++;
        link->queue.push_back(std::move(frame));
      }
    }
    Complete(id, absl::DeadlineExceededError("no answer by the deadline"));
    if (link != nullptr && link->up && !link->broken) Pump(link);
  }

  // ---- writing

  // By value: it may drop the last other reference.
  // NOLINTNEXTLINE(performance-unnecessary-value-param)
  void Pump(std::shared_ptr<Link> link) {
    while (!link->queue.empty() && !link->waiting && !link->broken) {
      OutFrame& frame = link->queue.front();
      if (frame.sent == 0) frame.Seal(link->checked);
      ErrorCode error;
      const size_t sent = link->stream.WriteSome(frame.Rest(), error);
      frame.sent += sent;
      if (error) {
        link->waiting = true;
        // Not here: it runs callbacks.
        asio::post(io_, [this, link, what = error.message()] {
          Break(link, absl::UnavailableError(absl::StrCat("the connection broke: ", what)));
        });
      } else if (frame.sent == frame.Bytes()) {
        link->queue.pop_front();
      } else if (sent == 0) {
        link->waiting = true;
        asio::co_spawn(io_, PumpLater(link), asio::detached);
      }
    }
  }

  Awaitable<void> PumpLater(std::shared_ptr<Link> link) {
    const bool writable = co_await link->stream.WaitWritable();
    link->waiting = false;
    if (writable && !link->broken) Pump(link);
  }

  // ---- connecting

  void Dial() {
    link_ = std::make_shared<Link>(io_, driver_.lookout());
    link_->timer.expires_after(options_.connect_timeout);
    link_->timer.async_wait([this, link = link_](const ErrorCode& stopped) {
      if (stopped || link->up) return;
      Break(link, absl::DeadlineExceededError(
                      absl::StrCat("no connection to ", options_.address, " within ",
                                   options_.connect_timeout.count(), " ms")));
    });
    asio::co_spawn(io_, Run(link_), asio::detached);
  }

  Awaitable<void> Run(std::shared_ptr<Link> link) {
    absl::Status status;
    try {
      DaemonInfo info;
      status = co_await link->Open(options_, info);
      if (status.ok() && !link->broken) {
        SetInfo(std::move(info));
        if (link->stream.shared()) asio::co_spawn(io_, HearBells(link), asio::detached);
        GoUp(link);
        status = co_await ReadAnswers(link);
        if (link->stream.corrupt()) status = Malformed("the ring's counters make no sense");
      }
    } catch (const std::exception& error) {  // Asio's, or out of memory
      status = absl::UnavailableError(absl::StrCat("the connection broke: ", error.what()));
    }
    Break(link, status);
  }

  static Awaitable<void> HearBells(std::shared_ptr<Link> link) {
    co_await link->stream.HearBells();
  }

  void SetInfo(DaemonInfo info) {
    const std::lock_guard lock(mutex_);
    info_ = std::move(info);
  }

  void GoUp(const std::shared_ptr<Link>& link) {
    link->up = true;
    link->timer.cancel();
    for (const auto& waiter : std::exchange(connect_waiters_, {})) waiter(absl::OkStatus());
    // Calls that waited for the connection may turn out to be too large for this daemon.
    std::vector<std::pair<uint64_t, absl::Status>> refused;
    for (const OutFrame& frame : link->queue) {
      const absl::Status fits = CheckLimits(*link, frame.header);
      if (!fits.ok()) refused.emplace_back(frame.header.request_id, fits);
    }
    for (const auto& [id, fits] : refused) {
      std::erase_if(link->queue,
                    [id = id](const OutFrame& frame) { return frame.header.request_id == id; });
      Complete(id, fits);
    }
    Pump(link);
  }

  // ---- reading

  /// Returns when the connection is of no more use.
  Awaitable<absl::Status> ReadAnswers(std::shared_ptr<Link> link) {
    constexpr uint32_t kAny = std::numeric_limits<uint32_t>::max();
    const proto::FrameLimits limits{.metadata_bytes_max = kMetadataBytesMax,
                                    .payload_bytes_max = kAny};
    const absl::Status gone = absl::UnavailableError("the daemon closed the connection");
    for (;;) {
      if (!co_await link->reader.Fill(proto::kHeaderBytes)) co_return gone;
      const auto header = link->TakeHeader(limits);
      if (!header.ok()) co_return Malformed(header.status().message());
      const bool last_words = header->request_id == 0;
      if (!last_words && !pending_.contains(header->request_id)) {  // late, or to a cancel
        if (!co_await link->reader.Discard(header->BodyBytes())) co_return gone;
        continue;
      }
      if (header->payload_bytes > options_.payload_bytes_max) {
        if (!co_await link->reader.Discard(header->BodyBytes())) co_return gone;
        Complete(header->request_id,
                 proto::FieldError(absl::StatusCode::kResourceExhausted, "payload_bytes_max",
                                   absl::StrCat("the answer has ", header->payload_bytes)));
        continue;
      }
      Answer answer;
      std::array<uint8_t, proto::kTrailerBytes> trailer{};
      if (!co_await ReadBody(*link, *header, answer, trailer)) co_return gone;
      if (last_words) {
        co_return absl::UnavailableError(absl::StrCat("the daemon ended the connection: ",
                                                      ReadError(answer.metadata).message()));
      }
      Judge(*link, *header, std::move(answer), trailer);
    }
  }

  Awaitable<bool> ReadBody(Link& link, const FrameHeader& header, Answer& answer,
                           std::array<uint8_t, proto::kTrailerBytes>& trailer) {
    answer.bytes_received = proto::kHeaderBytes + header.BodyBytes();
    answer.metadata.resize(header.metadata_bytes);
    auto* metadata = reinterpret_cast<uint8_t*>(answer.metadata.data());
    if (!co_await link.reader.ReadInto(metadata, answer.metadata.size())) co_return false;
    if (header.payload_bytes == 0) co_return true;
    if (!co_await link.reader.Discard(header.PaddingBytes())) co_return false;
    answer.payload_bytes = header.payload_bytes;
    answer.payload = AllocatePayload(answer.payload_bytes);
    if (!co_await link.reader.ReadInto(answer.payload.get(), answer.payload_bytes)) co_return false;
    co_return co_await link.reader.ReadInto(trailer.data(), trailer.size());
  }

  void Judge(const Link& link, const FrameHeader& header, Answer answer,
             const std::array<uint8_t, proto::kTrailerBytes>& trailer) {
    const uint64_t id = header.request_id;
    const auto pending = pending_.find(id);
    if (pending == pending_.end()) return;  // its deadline passed meanwhile
    if ((header.flags & proto::kFlagResponse) == 0 || header.op != pending->second.op) {
      return Complete(id, Malformed("not of the request's operation"));
    }
    if (link.checked && header.payload_bytes != 0) {
      const absl::Status intact =
          proto::VerifyPayload({answer.payload.get(), answer.payload_bytes}, trailer);
      if (!intact.ok()) return Complete(id, intact);
    }
    if ((header.flags & proto::kFlagError) != 0) return Complete(id, ReadError(answer.metadata));
    Complete(id, std::move(answer));
  }

  const ClientOptions options_;
  ChannelDriver driver_;
  asio::io_context& io_;  ///< the driver's
  std::mutex inbox_mutex_;
  std::vector<Call> inbox_ ABSL_GUARDED_BY(inbox_mutex_);  ///< in order
  std::vector<Call> taken_;                                ///< out of the inbox

  std::shared_ptr<Link> link_;  ///< null while there is no connection
  std::vector<std::function<void(const absl::Status&)>> connect_waiters_;
  std::map<uint64_t, Pending> pending_;
  std::set<std::pair<Clock::time_point, uint64_t>> deadlines_;  ///< of pending_
  asio::steady_timer timer_;
  Clock::time_point armed_ = Clock::time_point::max();  ///< when timer_ fires
  uint64_t next_id_ = kHelloId + 1;
  bool closed_ = false;

  mutable std::mutex mutex_;
  DaemonInfo info_ ABSL_GUARDED_BY(mutex_);
};

std::shared_ptr<uint8_t[]> AllocatePayload(size_t bytes) {
  constexpr std::align_val_t kAlignment{proto::kPayloadAlignment};
  auto* const memory = static_cast<uint8_t*>(::operator new[](bytes, kAlignment));
  return {memory, [](uint8_t* payload) { ::operator delete[](payload, kAlignment); }};
}

void Message::MakeOwned() {
  if (owned != nullptr) return;
  owned.reset(new uint8_t[payload.size()]);
  payload = {owned.get(), payload.size()};
  size_t end = 0;
  for (const Part& part : parts) {
    std::memset(owned.get() + end, 0, part.offset - end);
    end = part.offset + part.bytes.size();
  }
}

void Message::BringTogether() {
  if (parts.empty()) return;
  MakeOwned();
  for (const Part& part : parts) {
    std::copy(part.bytes.begin(), part.bytes.end(), owned.get() + part.offset);
  }
  parts.clear();
}

Channel::Channel(const ClientOptions& options) : impl_(std::make_unique<Impl>(options)) {}
Channel::~Channel() = default;
absl::Status Channel::Connect() { return impl_->Connect(); }
void Channel::Start(Message message, Clock::time_point deadline, Done done) {
  impl_->Start(std::move(message), deadline, std::move(done));
}
void Channel::Fail(absl::Status status, Done done) {
  impl_->Fail(std::move(status), std::move(done));
}
void Channel::Poll() { impl_->Poll(); }
DaemonInfo Channel::info() const { return impl_->info(); }

}  // namespace kvseek::client
