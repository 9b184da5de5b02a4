#include "service/request_handler.h"

#include <algorithm>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"
#include "service/compute_pool.h"
#include "service/field_checks.h"
#include "service/index_builder.h"
#include "service/message_memory.h"
#include "service/query_answers.h"
#include "service/query_operations.h"
#include "service/request_audits.h"
#include "service/request_counters.h"
#include "service/request_validation.h"
#include "service/search_executor.h"
#include "service/search_validation.h"
#include "service/session.h"
#include "service/session_info.h"
#include "service/session_store.h"
#include "service/statistics.h"

namespace kvseek::service {
namespace {

using index::Scratch;
using Clock = std::chrono::steady_clock;

/// Bytes of a payload whose layers one worker appends: copying them takes about as long as waking
/// another worker does.
constexpr size_t kAppendTogether = size_t{32} << 10;

/// Searches with no more payload are checked by the thread that read them, in whose caches all that
/// is needed for that still is; a worker's are full of other things.
constexpr size_t kCheckedAtOnce = size_t{64} << 10;

template <typename Message>
Response MakeResponse(const Message& message) {
  Response response;
  response.metadata = message.SerializeAsString();
  return response;
}

/// Of an Attend or a TopK.
struct Searches {
  explicit Searches(CheckedSearch checked) : search(std::move(checked)), tasks(MakeTasks(search)) {}

  CheckedSearch search;
  std::pmr::vector<SearchTask> tasks;
};

/// Of an Append. Each layer is a job of its own, in its own order; the last one to be done
/// answers.
struct LayersToAppend {
  index::SearchMemory memory = index::TakeSearchMemory();
  MessageMemory messages{*memory};
  proto::AppendRequest& message = messages.New<proto::AppendRequest>();
  CheckedAppend checked;  ///< points into `message`
  std::atomic<size_t> left{0};
  std::atomic<int64_t> held{std::numeric_limits<int64_t>::max()};  ///< by the layer that has least
};

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
        search_validator_(options_, store_),
        started_(Clock::now()) {}
  ~Impl();

  void Handle(Request request, std::function<void(Response)> done);

 private:
  /// A request under way. Whoever works on it holds it; it is answered once, at the latest when the
  /// last one lets go.
  class Call {
   public:
    Call(Impl& impl, Request request, std::function<void(Response)> done);
    ~Call();

    Impl& impl() const { return impl_; }
    const Request& request() const { return request_; }
    TimePoint arrived() const { return arrived_; }
    absl::Span<const uint8_t> payload() const {
      return {request_.payload.data.get(), request_.payload.bytes};
    }
    GiveUp give_up() const { return {request_.deadline, request_.cancelled, impl_.stopping_}; }
    void Hold(ComputePool::Admission admission) { admission_ = std::move(admission); }
    /// An Attend's or a TopK's searches, which the call then holds.
    void Begin(CheckedSearch checked);
    const Searches& searches() const { return *searches_; }
    LayersToAppend& BeginAppend() { return append_.emplace(); }
    LayersToAppend& append() { return *append_; }

    void Finish(absl::StatusOr<Response> outcome);

   private:
    Impl& impl_;
    const TimePoint arrived_ = Clock::now();
    Request request_;
    std::function<void(Response)> done_;
    ComputePool::Admission admission_;
    std::optional<Searches> searches_;
    std::optional<LayersToAppend> append_;
    std::atomic<bool> finished_{false};
  };
  using CallPtr = std::shared_ptr<Call>;

  void Dispatch(const CallPtr& call);
  /// The request's message, once it is sure that no payload came with it.
  template <typename Message>
  static absl::StatusOr<Message> ParseAlone(const Request& request);
  /// Finishes with what work(message) returns, an absl::StatusOr<Response>.
  template <typename Message, typename Work>
  void Answer(const CallPtr& call, const Work& work);
  /// Calls work(scratch) on a worker, unless the request is given up before; work finishes the
  /// call.
  template <typename Work>
  ComputePool::Job MakeJob(CallPtr call, Work work);
  /// Admits the call to the pool's queue; false: it has been refused.
  bool Admit(const CallPtr& call);
  template <typename Message, typename Work>
  void AnswerOnPool(const CallPtr& call, Work work);

  absl::StatusOr<Response> Open(const proto::OpenSessionRequest& message);
  absl::StatusOr<Response> Fork(const proto::ForkRequest& message);
  absl::StatusOr<Response> Truncate(const proto::TruncateRequest& message);
  absl::StatusOr<Response> Stats(const proto::StatsRequest& message);
  absl::StatusOr<Response> Health(const proto::HealthRequest& message);
  void Append(const CallPtr& call);
  /// The append's layer i.
  void AppendLayer(const CallPtr& call, uint32_t i, Scratch& scratch);
  void Close(const CallPtr& call);
  void Fetch(const CallPtr& call);
  template <typename Message>
  absl::StatusOr<CheckedSearch> CheckSearch(const Call& call, Scratch& scratch) const;
  template <typename Message>
  void Search(const CallPtr& call);
  /// Makes a call's searches of its message; false: the call has been finished with an error.
  template <typename Message>
  bool BeginSearches(Call& call, Scratch& scratch);
  /// Runs the searches that have begun.
  void RunBegun(const CallPtr& call, Scratch& scratch);
  void AnswerSearch(const CallPtr& call,
                    const absl::StatusOr<absl::Span<const index::SearchResult>>& results,
                    Scratch& scratch);
  /// Takes queries of an answered search where indexes learn from them.
  void Learn(const CallPtr& call, const CheckedSearch& search);

  const DaemonOptions options_;
  SessionStore& store_;
  ComputePool& pool_;
  IndexBuilder& builder_;
  const ServerFacts facts_;
  const RequestValidator validator_;
  const SearchValidator search_validator_;
  const TimePoint started_;
  RequestCounters counters_;
  RequestAudits audits_{options_, store_.budget()};
  const std::shared_ptr<std::atomic<bool>> stopping_ = std::make_shared<std::atomic<bool>>(false);

  std::mutex mutex_;
  std::condition_variable all_left_;
  uint64_t calls_ ABSL_GUARDED_BY(mutex_) = 0;
};

RequestHandler::Impl::Call::Call(Impl& impl, Request request, std::function<void(Response)> done)
    : impl_(impl), request_(std::move(request)), done_(std::move(done)) {
  const std::lock_guard lock(impl_.mutex_);
  ++impl_.calls_;
}

RequestHandler::Impl::Call::~Call() {
  if (!finished_.load()) Finish(absl::InternalError("the request was lost"));
  // The handler, and with it sessions' memory budget, may go with the last call.
  searches_.reset();
  append_.reset();
  done_ = nullptr;
  const std::lock_guard lock(impl_.mutex_);
  if (--impl_.calls_ == 0) impl_.all_left_.notify_all();
}

void RequestHandler::Impl::Call::Begin(CheckedSearch checked) {
  Searches& searches = searches_.emplace(std::move(checked));
  AddReuse(searches.search, impl_.store_.budget(), absl::MakeSpan(searches.tasks));
}

void RequestHandler::Impl::Call::Finish(absl::StatusOr<Response> outcome) {
  if (finished_.exchange(true)) return;
  { const ComputePool::Admission released = std::move(admission_); }
  Response response;
  if (outcome.ok()) {
    response = *std::move(outcome);
  } else {
    impl_.counters_.CountError(outcome.status().code());
    response.error = true;
    response.metadata = proto::ToError(outcome.status()).SerializeAsString();
  }
  impl_.counters_.CountAnswer(response.payload.bytes);
  done_(std::move(response));
}

RequestHandler::Impl::~Impl() {
  stopping_->store(true);
  std::unique_lock lock(mutex_);
  while (calls_ > 0) all_left_.wait(lock);
}

void RequestHandler::Impl::Handle(Request request, std::function<void(Response)> done) {
  counters_.CountRequest(request.op, request.payload.bytes);
  const auto call = std::make_shared<Call>(*this, std::move(request), std::move(done));
  try {
    Dispatch(call);
  } catch (...) {
    call->Finish(StatusOfException());
  }
}

void RequestHandler::Impl::Dispatch(const CallPtr& call) {
  using proto::Op;
  switch (call->request().op) {
    case Op::kOpenSession:
      return Answer<proto::OpenSessionRequest>(call, [this](auto& m) { return Open(m); });
    case Op::kAppend:
      return Append(call);
    case Op::kAttend:
      return Search<proto::AttendRequest>(call);
    case Op::kTopK:
      return Search<proto::TopKRequest>(call);
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
    case Op::kHello:
    case Op::kCancel:
    case Op::kOpenDoorbell:
      break;
  }
  call->Finish(proto::FieldError(
      absl::StatusCode::kInvalidArgument, "op",
      absl::StrCat("operation ", static_cast<int>(call->request().op), " is not served here")));
}

template <typename Message>
absl::StatusOr<Message> RequestHandler::Impl::ParseAlone(const Request& request) {
  Message message;
  absl::Status status = ParseMetadata(request.metadata, message);
  status.Update(RequestValidator::CheckNoPayload(request.payload.bytes));
  if (!status.ok()) return status;
  return message;
}

template <typename Message, typename Work>
void RequestHandler::Impl::Answer(const CallPtr& call, const Work& work) {
  const auto message = ParseAlone<Message>(call->request());
  call->Finish(message.ok() ? work(*message) : message.status());
}

template <typename Work>
ComputePool::Job RequestHandler::Impl::MakeJob(CallPtr call, Work work) {
  return [call = std::move(call), work = std::move(work)](Scratch& scratch) {
    if (absl::Status status = call->give_up().Check(); !status.ok()) {
      call->Finish(std::move(status));
      return;
    }
    try {
      work(scratch);
    } catch (...) {
      call->Finish(StatusOfException());
    }
  };
}

bool RequestHandler::Impl::Admit(const CallPtr& call) {
  absl::StatusOr<ComputePool::Admission> admission = pool_.Admit();
  if (!admission.ok()) {
    call->Finish(admission.status());
    return false;
  }
  call->Hold(*std::move(admission));
  return true;
}

template <typename Message, typename Work>
void RequestHandler::Impl::AnswerOnPool(const CallPtr& call, Work work) {
  if (!Admit(call)) return;
  pool_.Submit(MakeJob(call, [this, call, work](Scratch&) { Answer<Message>(call, work); }));
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
  response.set_serving(!stopping_->load());
  return MakeResponse(response);
}

void RequestHandler::Impl::Append(const CallPtr& call) {
  if (!Admit(call)) return;
  LayersToAppend& append = call->BeginAppend();
  absl::Status status = ParseMetadata(call->request().metadata, append.message);
  if (!status.ok()) return call->Finish(std::move(status));
  auto checked = validator_.Check(append.message, call->payload(), Clock::now());
  if (!checked.ok()) return call->Finish(checked.status());
  append.checked = *std::move(checked);
  const uint32_t layers = append.checked.layers;
  append.left.store(layers);
  const size_t together = kAppendTogether / std::max<size_t>(1, call->payload().size() / layers);
  StrandJobs jobs;
  for (uint32_t i = 0; i < layers; ++i) {
    jobs.Add(append.checked.session->AppendStrand(append.checked.layer + i),
             MakeJob(call, [this, call, i](Scratch& scratch) { AppendLayer(call, i, scratch); }));
    if (jobs.size() >= together || i + 1 == layers) jobs.RunOn(pool_);
  }
}

void RequestHandler::Impl::AppendLayer(const CallPtr& call, uint32_t i, Scratch& scratch) {
  LayersToAppend& append = call->append();
  const std::shared_ptr<Session>& session = append.checked.session;
  const uint32_t layer = append.checked.layer + i;
  const LayerRows rows = append.checked.Rows(i);
  const auto held = session->Append(layer, rows, store_.budget(), {pool_, scratch});
  if (!held.ok()) return call->Finish(held.status());
  counters_.CountAppended(static_cast<uint64_t>(rows.tokens));
  builder_.Consider(session, layer);
  int64_t least = append.held.load();
  while (*held < least && !append.held.compare_exchange_weak(least, *held)) {
  }
  if (append.left.fetch_sub(1) != 1) return;
  proto::AppendResponse response;
  response.set_tokens_held(static_cast<uint64_t>(append.held.load()));
  call->Finish(MakeResponse(response));
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
  if (!Admit(call)) return;
  pool_.Submit(MakeJob(call, [this, call](Scratch& scratch) {
    MessageMemory memory(scratch);
    auto& message = memory.New<proto::FetchRowsRequest>();
    absl::Status status = ParseMetadata(call->request().metadata, message);
    if (!status.ok()) return call->Finish(std::move(status));
    const auto fetch = validator_.Check(message, call->payload(), Clock::now());
    if (!fetch.ok()) return call->Finish(fetch.status());
    call->Finish(FetchRows(*fetch, options_, {pool_, scratch}));
  }));
}

template <typename Message>
absl::StatusOr<CheckedSearch> RequestHandler::Impl::CheckSearch(const Call& call,
                                                                Scratch& scratch) const {
  if constexpr (std::is_same_v<Message, proto::AttendRequest>) {
    const proto::AttendRequest* const attend = call.request().attend.get();
    if (attend != nullptr) return search_validator_.Check(*attend, call.payload(), Clock::now());
  }
  MessageMemory memory(scratch);
  auto& message = memory.New<Message>();
  absl::Status status = ParseMetadata(call.request().metadata, message);
  if (!status.ok()) return status;
  return search_validator_.Check(message, call.payload(), Clock::now());
}

template <typename Message>
void RequestHandler::Impl::Search(const CallPtr& call) {
  if (!Admit(call)) return;
  if (call->payload().size() > kCheckedAtOnce) {
    pool_.Submit(MakeJob(call, [this, call](Scratch& scratch) {
      if (BeginSearches<Message>(*call, scratch)) RunBegun(call, scratch);
    }));
    return;
  }
  const index::SearchMemory memory = index::TakeSearchMemory();
  if (!BeginSearches<Message>(*call, *memory)) return;
  pool_.Submit(MakeJob(call, [this, call](Scratch& scratch) { RunBegun(call, scratch); }));
}

template <typename Message>
bool RequestHandler::Impl::BeginSearches(Call& call, Scratch& scratch) {
  auto checked = CheckSearch<Message>(call, scratch);
  absl::Status status = checked.status();
  if (status.ok()) status = CheckAnswerFits(*checked, options_);
  if (!status.ok()) {
    call.Finish(std::move(status));
    return false;
  }
  call.Begin(*std::move(checked));
  return true;
}

void RequestHandler::Impl::RunBegun(const CallPtr& call, Scratch& scratch) {
  RunSearches(
      pool_, call->searches().tasks, call->give_up(),
      [call](auto results, Scratch& own) { call->impl().AnswerSearch(call, results, own); },
      scratch);
}

void RequestHandler::Impl::AnswerSearch(
    const CallPtr& call, const absl::StatusOr<absl::Span<const index::SearchResult>>& results,
    Scratch& scratch) {
  if (!results.ok()) return call->Finish(results.status());
  counters_.CountSearches(*results);
  const CheckedSearch& search = call->searches().search;
  try {
    std::optional<TimePoint> arrived;
    if (call->request().attend == nullptr) arrived = call->arrived();
    auto answer = MakeAnswer(search, *results, arrived, options_, {pool_, scratch});
    Learn(call, search);  // before the step after this one can
    call->Finish(std::move(answer));
    audits_.Offer(search);
  } catch (...) {
    call->Finish(StatusOfException());
  }
}

void RequestHandler::Impl::Learn(const CallPtr& call, const CheckedSearch& search) {
  for (const CheckedItem& item : search.items) {
    auto taken = CollectQueries(item, store_.budget());
    if (!taken.has_value()) continue;
    const auto batch = std::make_shared<const TrafficQueries::Batch>(*std::move(taken));
    // Appends of the layer come first that came first; the call keeps the handler until then.
    item.session->AppendStrand(item.layer_number)
        .Submit(pool_,
                [this, call, batch, session = item.session, layer = item.layer_number](Scratch&) {
                  try {
                    const SampledQueries queries{batch->positions, batch->rows.data()};
                    if (!session->Learn(layer, queries, store_.budget()).ok()) return;
                    counters_.CountSampled(batch->positions.size());
                    builder_.Consider(session, layer);
                  } catch (...) {  // no memory: traffic goes on
                  }
                });
  }
}

RequestHandler::RequestHandler(const DaemonOptions& options, SessionStore& store, ComputePool& pool,
                               IndexBuilder& builder, ServerFacts facts)
    : impl_(std::make_unique<Impl>(options, store, pool, builder, std::move(facts))) {}

RequestHandler::~RequestHandler() = default;

void RequestHandler::Handle(Request request, std::function<void(Response)> done) {
  impl_->Handle(std::move(request), std::move(done));
}

}  // namespace kvseek::service
