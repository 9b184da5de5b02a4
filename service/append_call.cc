#include "service/append_call.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/status/statusor.h"
#include "service/session.h"
#include "service/strand.h"

namespace kvseek::service {
namespace {

using index::Scratch;

/// Bytes of a payload whose layers one worker appends: copying them takes about as long as waking
/// another worker does.
constexpr size_t kAppendTogether = size_t{32} << 10;

}  // namespace

void AppendCall::Start(const std::shared_ptr<AppendCall>& call) {
  if (!call->Admit()) return;
  if (absl::Status status = call->Check(); !status.ok()) return call->Finish(std::move(status));
  const CheckedAppend& append = call->layers_->checked;
  const uint32_t layers = append.layers;
  const size_t together = kAppendTogether / std::max<size_t>(1, call->payload().size() / layers);
  StrandJobs jobs;
  for (uint32_t i = 0; i < layers; ++i) {
    const auto work = [i](const std::shared_ptr<AppendCall>& own, Scratch& scratch) {
      own->AppendLayer(i, scratch);
    };
    jobs.Add(append.session->AppendStrand(append.layer + i), MakeJob(call, work));
    if (jobs.size() >= together || i + 1 == layers) jobs.RunOn(call->context().pool);
  }
}

absl::Status AppendCall::Check() {
  Layers& layers = layers_.emplace();
  absl::Status status = ParseMetadata(request().metadata, layers.message);
  if (!status.ok()) return status;
  auto checked = RequestValidator(context().options, context().store)
                     .Check(layers.message, payload(), std::chrono::steady_clock::now());
  if (!checked.ok()) return checked.status();
  layers.checked = *std::move(checked);
  layers.left.store(layers.checked.layers);
  return absl::OkStatus();
}

void AppendCall::AppendLayer(uint32_t i, Scratch& scratch) {
  Layers& layers = *layers_;
  const std::shared_ptr<Session>& session = layers.checked.session;
  const uint32_t layer = layers.checked.layer + i;
  const LayerRows rows = layers.checked.Rows(i);
  const auto held =
      session->Append(layer, rows, context().store.budget(), {context().pool, scratch});
  if (!held.ok()) return Finish(held.status());
  context().counters.CountAppended(static_cast<uint64_t>(rows.tokens));
  context().builder.Consider(session, layer);
  int64_t least = layers.held.load();
  while (*held < least && !layers.held.compare_exchange_weak(least, *held)) {
  }
  if (layers.left.fetch_sub(1) != 1) return;
  proto::AppendResponse response;
  response.set_tokens_held(static_cast<uint64_t>(layers.held.load()));
  Finish(MakeResponse(response));
}

}  // namespace kvseek::service
