#include "service/search_call.h"

#include <chrono>

#include "absl/status/status.h"
#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "service/message_memory.h"
#include "service/query_answers.h"
#include "service/request_validation.h"
#include "service/session.h"
#include "service/traffic_queries.h"

namespace kvseek::service {
namespace {

using index::Scratch;
using Clock = std::chrono::steady_clock;

/// Searches with no more payload are checked by the thread that read them, in whose caches all that
/// is needed for that still is; a worker's are full of other things.
constexpr size_t kCheckedAtOnce = size_t{64} << 10;

template <typename Message>
absl::StatusOr<CheckedSearch> CheckMetadata(const Call& call, const SearchValidator& validator,
                                            Scratch& scratch) {
  MessageMemory memory(scratch);
  auto& message = memory.New<Message>();
  absl::Status status = ParseMetadata(call.request().metadata, message);
  if (!status.ok()) return status;
  return validator.Check(message, call.payload(), Clock::now());
}

absl::StatusOr<CheckedSearch> CheckRequest(const Call& call, Scratch& scratch) {
  const SearchValidator validator(call.context().options, call.context().store);
  const Request& request = call.request();
  if (request.op == proto::Op::kTopK) {
    return CheckMetadata<proto::TopKRequest>(call, validator, scratch);
  }
  if (request.attend != nullptr) {
    return validator.Check(*request.attend, call.payload(), Clock::now());
  }
  return CheckMetadata<proto::AttendRequest>(call, validator, scratch);
}

}  // namespace

void SearchCall::Start(const std::shared_ptr<SearchCall>& call) {
  if (!call->Admit()) return;
  ComputePool& pool = call->context().pool;
  if (call->payload().size() > kCheckedAtOnce) {
    pool.Submit(MakeJob(call, CheckAndRun));
    return;
  }
  const index::SearchMemory memory = index::TakeSearchMemory();
  if (call->Check(*memory)) pool.Submit(MakeJob(call, Run));
}

void SearchCall::CheckAndRun(const std::shared_ptr<SearchCall>& call, Scratch& scratch) {
  if (call->Check(scratch)) Run(call, scratch);
}

bool SearchCall::Check(Scratch& scratch) {
  auto checked = CheckRequest(*this, scratch);
  absl::Status status = checked.status();
  if (status.ok()) status = CheckAnswerFits(*checked, context().options);
  if (!status.ok()) {
    Finish(std::move(status));
    return false;
  }
  Searches& searches = searches_.emplace(*std::move(checked));
  AddReuse(searches.search, context().store.budget(), absl::MakeSpan(searches.tasks));
  return true;
}

void SearchCall::Run(const std::shared_ptr<SearchCall>& call, Scratch& scratch) {
  RunSearches(
      call->context().pool, call->searches_->tasks, call->give_up(),
      [call](const auto& results, Scratch& own) { Answer(call, results, own); }, scratch);
}

void SearchCall::Answer(const std::shared_ptr<SearchCall>& call,
                        const absl::StatusOr<absl::Span<const index::SearchResult>>& results,
                        Scratch& scratch) {
  if (!results.ok()) return call->Finish(results.status());
  const CallContext& context = call->context();
  context.counters.CountSearches(*results);
  const CheckedSearch& search = call->searches_->search;
  try {
    std::optional<TimePoint> arrived;
    if (call->request().attend == nullptr) arrived = call->arrived();
    auto answer = MakeAnswer(search, *results, arrived, context.options, {context.pool, scratch});
    Learn(call);  // before the step after this one can
    call->Finish(std::move(answer));
    context.audits.Offer(search);
  } catch (...) {
    call->Finish(StatusOfException());
  }
}

void SearchCall::Learn(const std::shared_ptr<SearchCall>& call) {
  const CallContext& context = call->context();
  for (const CheckedItem& item : call->searches_->search.items) {
    auto taken = CollectQueries(item, context.store.budget());
    if (!taken.has_value()) continue;
    const auto batch = std::make_shared<const TrafficQueries::Batch>(*std::move(taken));
    // Appends of the layer come first that came first; the call keeps the handler until then.
    item.session->AppendStrand(item.layer_number)
        .Submit(context.pool,
                [call, batch, session = item.session, layer = item.layer_number](Scratch&) {
                  const CallContext& own = call->context();
                  try {
                    const SampledQueries queries{batch->positions, batch->rows.data()};
                    if (!session->Learn(layer, queries, own.store.budget()).ok()) return;
                    own.counters.CountSampled(batch->positions.size());
                    own.builder.Consider(session, layer);
                  } catch (...) {  // no memory: traffic goes on
                  }
                });
  }
}

}  // namespace kvseek::service
