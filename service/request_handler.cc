#include "service/request_handler.h"

#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"
#include "service/append_call.h"
#include "service/call.h"
#include "service/compute_pool.h"
#include "service/field_checks.h"
#include "service/index_builder.h"
#include "service/message_memory.h"
#include "service/query_answers.h"
#include "service/request_audits.h"
#include "service/request_counters.h"
#include "service/request_validation.h"
#include "service/search_call.h"
#include "service/search_executor.h"
#include "service/session.h"
#include "service/session_info.h"
#include "service/session_store.h"
#include "service/statistics.h"

namespace kvseek::service {
namespace {

using index::Scratch;
using Clock = std::chrono::steady_clock;
using CallPtr = std::shared_ptr<Call>;

/// The request's message, once it is sure that no payload came with it.
template <typename Message>
absl::StatusOr<Message> ParseAlone(const Request& request) {
  Message message;
  absl::Status status = ParseMetadata(request.metadata, message);
  status.Update(RequestValidator::CheckNoPayload(request.payload.bytes));
  if (!status.ok()) return status;
  return message;
}

/// Finishes with what work(message) returns, an absl::StatusOr<Response>.
template <typename Message, typename Work>
void Answer(const CallPtr& call, const Work& work) {
  const auto message = ParseAlone<Message>(call->request());
  call->Finish(message.ok() ? work(*message) : message.status());
}

template <typename Message, typename Work>
void AnswerOnPool(const CallPtr& call, Work work) {
  if (!call->Admit()) return;
  call->context().pool.Submit(MakeJob(call, [work = std::move(work)](const CallPtr& own, Scratch&) {
    Answer<Message>(own, work);
  }));
}

}  // namespace

class RequestHandler::Impl {
 public:
  Impl(const DaemonOptions& options, SessionStore& store, ComputePool& pool, IndexBuilder& builder,
       ServerFacts facts)
      : options_(options),
        store_(store),
        pool_(pool),
        builder_(builder),
        facts_(std::move(facts)),
        validator_(options_, store_),
        started_(Clock::now()) {}
  ~Impl() { calls_.Stop(); }

  void Handle(Request request, std::function<void(Response)> done);

 private:
  /// Calls start(call) with the request's call; what it throws is the answer.
  template <typename CallType, typename Start>
  void Begin(Request request, std::function<void(Response)> done, const Start& start) const;
  /// Starts a call that is a Call and no more.
  void StartPlain(const CallPtr& call);

  absl::StatusOr<Response> Open(const proto::OpenSessionRequest& message);
  absl::StatusOr<Response> Fork(const proto::ForkRequest& message);
  absl::StatusOr<Response> Truncate(const proto::TruncateRequest& message);
  absl::StatusOr<Response> Stats(const proto::StatsRequest& message);
  absl::StatusOr<Response> Health(const proto::HealthRequest& message);
  void Close(const CallPtr& call);
  void Fetch(const CallPtr& call);

  const DaemonOptions options_;
  SessionStore& store_;
  ComputePool& pool_;
  IndexBuilder& builder_;
  const ServerFacts facts_;
  const RequestValidator validator_;
  const TimePoint started_;
  RequestCounters counters_;
  RequestAudits audits_{options_, store_.budget()};
  CallsUnderWay calls_;
  const CallContext context_{options_, store_, pool_, builder_, counters_, audits_, calls_};
};

void RequestHandler::Impl::Handle(Request request, std::function<void(Response)> done) {
  using proto::Op;
  counters_.CountRequest(request.op, request.payload.bytes);
  switch (request.op) {
    case Op::kAttend:
    case Op::kTopK:
      return Begin<SearchCall>(std::move(request), std::move(done), SearchCall::Start);
    case Op::kAppend:
      return Begin<AppendCall>(std::move(request), std::move(done), AppendCall::Start);
    default:
      return Begin<Call>(std::move(request), std::move(done),
                         [this](const CallPtr& call) { StartPlain(call); });
  }
}

template <typename CallType, typename Start>
void RequestHandler::Impl::Begin(Request request, std::function<void(Response)> done,
                                 const Start& start) const {
  const auto call = std::make_shared<CallType>(context_, std::move(request), std::move(done));
  try {
    start(call);
  } catch (...) {
    call->Finish(StatusOfException());
  }
}

void RequestHandler::Impl::StartPlain(const CallPtr& call) {
  using proto::Op;
  switch (call->request().op) {
    case Op::kOpenSession:
      return Answer<proto::OpenSessionRequest>(call, [this](auto& m) { return Open(m); });
    case Op::kFetchRows:
      return Fetch(call);
    case Op::kFork:
      return AnswerOnPool<proto::ForkRequest>(call, [this](auto& m) { return Fork(m); });
    case Op::kTruncate:
      return AnswerOnPool<proto::TruncateRequest>(call, [this](auto& m) { return Truncate(m); });
    case Op::kCloseSession:
      return Close(call);
    case Op::kStats:
      return Answer<proto::StatsRequest>(call, [this](auto& m) { return Stats(m); });
    case Op::kHealth:
      return Answer<proto::HealthRequest>(call, [this](auto& m) { return Health(m); });
    case Op::kAppend:  // these have calls of their own kind
    case Op::kAttend:
    case Op::kTopK:
    case Op::kHello:  // and these are the connection's
    case Op::kCancel:
    case Op::kOpenDoorbell:
      break;
  }
  call->Finish(proto::FieldError(
      absl::StatusCode::kInvalidArgument, "op",
      absl::StrCat("operation ", static_cast<int>(call->request().op), " is not served here")));
}

absl::StatusOr<Response> RequestHandler::Impl::Open(const proto::OpenSessionRequest& message) {
  auto settings = validator_.Check(message);
  if (!settings.ok()) return settings.status();
  auto session = store_.Open(*std::move(settings), static_cast<int64_t>(message.tokens_expected()),
                             Clock::now());
  if (!session.ok()) return session.status();
  proto::OpenSessionResponse response;
  *response.mutable_session() = MakeSessionRef(store_.boot_id(), **session);
  response.set_lease_ms(Milliseconds((*session)->settings().lease));
  return MakeResponse(response);
}

absl::StatusOr<Response> RequestHandler::Impl::Fork(const proto::ForkRequest& message) {
  if (absl::Status status = RequestValidator::CheckName(message.name()); !status.ok()) {
    return status;
  }
  const TimePoint now = Clock::now();
  auto parent = FindSession(store_, message, now);
  if (!parent.ok()) return parent.status();
  const auto tokens =
      message.has_tokens() ? std::optional<uint64_t>(message.tokens()) : std::nullopt;
  auto session = store_.Fork(**parent, tokens, RequestValidator::Lease(message.lease_ms()),
                             message.name(), now);
  if (!session.ok()) return session.status();
  proto::ForkResponse response;
  *response.mutable_session() = MakeSessionRef(store_.boot_id(), **session);
  response.set_lease_ms(Milliseconds((*session)->settings().lease));
  return MakeResponse(response);
}

absl::StatusOr<Response> RequestHandler::Impl::Truncate(const proto::TruncateRequest& message) {
  auto session = FindSession(store_, message, Clock::now());
  if (!session.ok()) return session.status();
  if (absl::Status status = (*session)->Truncate(message.tokens(), store_.budget()); !status.ok()) {
    return status;
  }
  return MakeResponse(proto::TruncateResponse());
}

absl::StatusOr<Response> RequestHandler::Impl::Stats(const proto::StatsRequest& message) {
  return MakeResponse(MakeStats(
      message, {options_, store_, pool_, builder_, counters_, audits_, facts_, started_}));
}

absl::StatusOr<Response> RequestHandler::Impl::Health(const proto::HealthRequest& /*message*/) {
  proto::HealthResponse response;
  response.set_serving(!calls_.stopping()->load());
  return MakeResponse(response);
}

void RequestHandler::Impl::Close(const CallPtr& call) {
  const auto message = ParseAlone<proto::CloseSessionRequest>(call->request());
  if (!message.ok()) return call->Finish(message.status());
  auto session = validator_.TakeSession(*message, Clock::now());
  if (!session.ok()) return call->Finish(session.status());
  pool_.Submit([call, closed = *std::move(session)](Scratch&) mutable {
    closed.reset();  // frees its memory, unless somebody still works with it
    call->Finish(MakeResponse(proto::CloseSessionResponse()));
  });
}

void RequestHandler::Impl::Fetch(const CallPtr& call) {
  if (!call->Admit()) return;
  pool_.Submit(MakeJob(call, [this](const CallPtr& own, Scratch& scratch) {
    MessageMemory memory(scratch);
    auto& message = memory.New<proto::FetchRowsRequest>();
    absl::Status status = ParseMetadata(own->request().metadata, message);
    if (!status.ok()) return own->Finish(std::move(status));
    const auto fetch = validator_.Check(message, own->payload(), Clock::now());
    if (!fetch.ok()) return own->Finish(fetch.status());
    own->Finish(FetchRows(*fetch, options_, {pool_, scratch}));
  }));
}

RequestHandler::RequestHandler(const DaemonOptions& options, SessionStore& store, ComputePool& pool,
                               IndexBuilder& builder, ServerFacts facts)
    : impl_(std::make_unique<Impl>(options, store, pool, builder, std::move(facts))) {}

RequestHandler::~RequestHandler() = default;

void RequestHandler::Handle(Request request, std::function<void(Response)> done) {
  impl_->Handle(std::move(request), std::move(done));
}

}  // namespace kvseek::service
