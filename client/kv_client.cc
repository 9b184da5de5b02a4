#include "client/kv_client.h"

#include <future>
#include <type_traits>
#include <utility>

#include "client/channel.h"
#include "client/decode_answers.h"
#include "client/encode_requests.h"
#include "proto/status_code.h"

namespace kvseek {

using client::Answer;
using client::Message;

class KvClient::Impl {
 public:
  explicit Impl(const ClientOptions& options)
      : default_deadline_(options.default_deadline), channel_(options) {}

  client::Channel& channel() { return channel_; }

  /// Sends; `decode` turns an answer into absl::StatusOr<T>.
  template <typename T, typename Decode>
  void Start(absl::StatusOr<Message> message, const CallOptions& call, Decode decode,
             Callback<T> done) {
    auto finish = [decode = std::move(decode),
                   done = std::move(done)](absl::StatusOr<Answer> answer) {
      if (answer.ok()) {
        done(decode(*answer));
      } else {
        done(answer.status());
      }
    };
    if (!message.ok()) return channel_.Fail(message.status(), std::move(finish));
    const auto deadline = client::Clock::now() + call.deadline.value_or(default_deadline_);
    channel_.Start(*std::move(message), deadline, std::move(finish));
  }

  /// Sends and waits.
  template <typename T, typename Decode>
  absl::StatusOr<T> Run(absl::StatusOr<Message> message, const CallOptions& call, Decode decode) {
    return Wait<T>([&](Callback<T> done) {
      Start<T>(std::move(message), call, std::move(decode), std::move(done));
    });
  }

  template <typename T, typename Starter>
  static absl::StatusOr<T> Wait(const Starter& starter) {
    std::promise<absl::StatusOr<T>> answer;
    starter([&](absl::StatusOr<T> got) { answer.set_value(std::move(got)); });
    return answer.get_future().get();
  }

  /// As Run, for answers that carry nothing.
  template <typename Decode>
  absl::Status RunEmpty(Message message, const CallOptions& call, Decode decode) {
    auto decode_bool = [decode](const Answer& answer) -> absl::StatusOr<bool> {
      const absl::Status status = decode(answer);
      if (!status.ok()) return status;
      return true;
    };
    return Run<bool>(std::move(message), call, decode_bool).status();
  }

 private:
  const std::chrono::microseconds default_deadline_;
  client::Channel channel_;
};

absl::StatusOr<std::unique_ptr<KvClient>> KvClient::Connect(const ClientOptions& options) {
  auto impl = std::make_unique<Impl>(options);
  const absl::Status connected = impl->channel().Connect();
  if (!connected.ok()) return connected;
  return std::unique_ptr<KvClient>(new KvClient(std::move(impl)));
}

KvClient::KvClient(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
KvClient::~KvClient() = default;

DaemonInfo KvClient::info() const { return impl_->channel().info(); }

absl::StatusOr<Session> KvClient::Open(const ModelShape& shape, const OpenOptions& options,
                                       const CallOptions& call) {
  return impl_->Run<Session>(
      client::EncodeOpen(shape, options), call,
      [shape](const Answer& answer) { return client::DecodeOpen(shape, answer); });
}

absl::StatusOr<uint64_t> KvClient::Append(const Session& session, uint32_t layer, uint64_t start,
                                          uint32_t tokens, absl::Span<const uint16_t> keys,
                                          absl::Span<const uint16_t> values,
                                          const CallOptions& call, const SampledQueries& queries,
                                          const LandmarkKeys& landmarks) {
  return Impl::Wait<uint64_t>([&](Callback<uint64_t> done) {
    AppendAsync(session, layer, start, tokens, keys, values, call, std::move(done), queries,
                landmarks);
  });
}

absl::StatusOr<SearchResponse> KvClient::Attend(const AttendRequest& request,
                                                const CallOptions& call) {
  return Impl::Wait<SearchResponse>(
      [&](Callback<SearchResponse> done) { AttendAsync(request, call, std::move(done)); });
}

absl::StatusOr<SearchResponse> KvClient::TopK(const TopKRequest& request, const CallOptions& call) {
  return Impl::Wait<SearchResponse>(
      [&](Callback<SearchResponse> done) { TopKAsync(request, call, std::move(done)); });
}

absl::StatusOr<Rows> KvClient::FetchRows(const Session& session, uint32_t layer, uint32_t kv_head,
                                         absl::Span<const int64_t> positions,
                                         const CallOptions& call) {
  return impl_->Run<Rows>(client::EncodeFetchRows(session, layer, kv_head, positions), call,
                          [shape = session.shape, count = positions.size()](const Answer& answer) {
                            return client::DecodeFetchRows(shape, count, answer);
                          });
}

absl::StatusOr<Session> KvClient::Fork(const Session& session, std::optional<uint64_t> tokens,
                                       const OpenOptions& options, const CallOptions& call) {
  return impl_->Run<Session>(
      client::EncodeFork(session, tokens, options), call,
      [shape = session.shape](const Answer& answer) { return client::DecodeFork(shape, answer); });
}

absl::Status KvClient::Truncate(const Session& session, uint64_t tokens, const CallOptions& call) {
  return impl_->RunEmpty(client::EncodeTruncate(session, tokens), call, client::DecodeTruncate);
}

absl::Status KvClient::Close(const Session& session, const CallOptions& call) {
  return impl_->RunEmpty(client::EncodeClose(session), call, client::DecodeClose);
}

absl::StatusOr<DaemonStats> KvClient::Stats(bool with_sessions, const CallOptions& call) {
  return impl_->Run<DaemonStats>(client::EncodeStats(with_sessions), call, client::DecodeStats);
}

absl::StatusOr<HeadPlan> KvClient::PlanOf(const Session& session, const CallOptions& call) {
  return impl_->Run<HeadPlan>(client::EncodePlanOf(session), call, [session](const Answer& answer) {
    return client::DecodePlanOf(session, answer);
  });
}

absl::Status KvClient::Health(const CallOptions& call) {
  return impl_->RunEmpty(client::EncodeHealth(), call, client::DecodeHealth);
}

void KvClient::AppendAsync(const Session& session, uint32_t layer, uint64_t start, uint32_t tokens,
                           absl::Span<const uint16_t> keys, absl::Span<const uint16_t> values,
                           const CallOptions& call, Callback<uint64_t> done,
                           const SampledQueries& queries, const LandmarkKeys& landmarks) {
  const LayerTensors only{keys, values};
  impl_->Start<uint64_t>(
      client::EncodeAppend(session, layer, start, tokens, {&only, 1}, queries, landmarks), call,
      client::DecodeAppend, std::move(done));
}

void KvClient::AppendLayersAsync(const Session& session, uint32_t layer, uint64_t start,
                                 uint32_t tokens, absl::Span<const LayerTensors> layers,
                                 const CallOptions& call, Callback<uint64_t> done) {
  impl_->Start<uint64_t>(client::EncodeAppend(session, layer, start, tokens, layers), call,
                         client::DecodeAppend, std::move(done));
}

struct PreparedSearch::Impl {
  absl::StatusOr<Message> message;
  client::SearchShape shape;
};

PreparedSearch::PreparedSearch(const AttendRequest& request)
    : impl_(std::make_shared<Impl>(Impl{client::EncodeAttend(request), client::ShapeOf(request)})) {
}
PreparedSearch::PreparedSearch(const TopKRequest& request)
    : impl_(std::make_shared<Impl>(Impl{client::EncodeTopK(request), client::ShapeOf(request)})) {}

void KvClient::SendAsync(PreparedSearch search, const CallOptions& call,
                         Callback<SearchResponse> done) {
  absl::StatusOr<Message> message = std::move(search.impl_->message);
  impl_->Start<SearchResponse>(
      std::move(message), call,
      [prepared = std::move(search.impl_)](const Answer& answer) {
        return client::DecodeSearch(prepared->shape, answer);
      },
      std::move(done));
}

void KvClient::AttendAsync(const AttendRequest& request, const CallOptions& call,
                           Callback<SearchResponse> done) {
  SendAsync(PreparedSearch(request), call, std::move(done));
}

void KvClient::TopKAsync(const TopKRequest& request, const CallOptions& call,
                         Callback<SearchResponse> done) {
  SendAsync(PreparedSearch(request), call, std::move(done));
}

void KvClient::Poll() { impl_->channel().Poll(); }

std::chrono::milliseconds RetryAfter(const absl::Status& status) {
  return std::chrono::milliseconds(proto::RetryAfterMs(status));
}

std::string ErrorField(const absl::Status& status) { return proto::ErrorField(status); }

}  // namespace kvseek
