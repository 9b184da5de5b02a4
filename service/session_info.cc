#include "service/session_info.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "service/layer_cache.h"
#include "service/live_planner.h"
#include "service/session_plan.h"

namespace kvseek::service {
namespace {

/// How far one kind of built index has come in a session, over all layers and KV heads.
proto::BuiltIndexInfo DescribeBuilt(const Session& session, proto::IndexKind kind,
                                    index::BuiltKind built) {
  int64_t covered = std::numeric_limits<int64_t>::max();
  uint64_t bytes = 0;
  for (uint32_t layer = 0; layer < session.settings().layers; ++layer) {
    const std::shared_ptr<const LayerState> state = session.State(layer);
    for (size_t head = 0; head < state->kv_heads(); ++head) {
      const index::BuiltIndex* const found = state->Built(head, built);
      covered = std::min(covered, found == nullptr ? 0 : found->covered());
      bytes += found == nullptr ? 0 : found->Bytes();
    }
  }
  proto::BuiltIndexInfo info;
  info.set_index(kind);
  info.set_tokens_covered(static_cast<uint64_t>(covered));
  info.set_bytes(bytes);
  return info;
}

void DescribeLandmark(const Session& session, proto::SessionInfo& info) {
  const index::LandmarkOptions& options = session.settings().landmark;
  proto::LandmarkOptions& landmark = *info.mutable_landmark();
  landmark.set_block(static_cast<uint32_t>(options.block));
  switch (options.summary) {
    case index::LandmarkSummary::kBounds:
      landmark.set_summary(proto::LANDMARK_BOUNDS);
      break;
    case index::LandmarkSummary::kMean:
      landmark.set_summary(proto::LANDMARK_MEAN);
      break;
    case index::LandmarkSummary::kGiven:
      landmark.set_summary(proto::LANDMARK_GIVEN);
      break;
  }
  int64_t given = std::numeric_limits<int64_t>::max();
  for (uint32_t layer = 0; layer < session.settings().layers; ++layer) {
    const std::shared_ptr<const LayerState> state = session.State(layer);
    given = std::min(given, state->Landmarks(state->tokens));
  }
  info.set_landmarks_given(static_cast<uint64_t>(given));
}

}  // namespace

uint64_t Milliseconds(std::chrono::steady_clock::duration duration) {
  using std::chrono::milliseconds;
  return static_cast<uint64_t>(
      std::max<milliseconds::rep>(0, std::chrono::duration_cast<milliseconds>(duration).count()));
}

proto::SessionRef MakeSessionRef(uint64_t boot_id, const Session& session) {
  proto::SessionRef ref;
  ref.set_boot_id(boot_id);
  ref.set_session_id(session.id());
  return ref;
}

proto::SessionInfo DescribeSession(uint64_t boot_id, const Session& session, bool with_plan,
                                   TimePoint now) {
  const SessionSettings& settings = session.settings();
  proto::SessionInfo info;
  *info.mutable_session() = MakeSessionRef(boot_id, session);
  info.set_name(settings.name);
  proto::ModelShape& shape = *info.mutable_shape();
  shape.set_layers(settings.layers);
  shape.set_kv_heads(settings.kv_heads);
  shape.set_query_heads(settings.query_heads);
  shape.set_key_dim(static_cast<uint32_t>(settings.kv.key_dim));
  shape.set_value_dim(static_cast<uint32_t>(settings.kv.value_dim));
  shape.set_dtype(static_cast<proto::DType>(settings.kv.dtype));
  shape.set_softmax_scale(settings.kv.softmax_scale);
  std::vector<int64_t> tokens;
  for (uint32_t layer = 0; layer < settings.layers; ++layer) {
    tokens.push_back(session.State(layer)->tokens);
    info.add_tokens(static_cast<uint64_t>(tokens.back()));
  }
  info.set_bytes(session.Bytes());
  info.set_idle_ms(Milliseconds(now - session.last_used()));
  info.set_lease_ms(Milliseconds(settings.lease));
  info.set_scan_bits(static_cast<uint32_t>(settings.kv.scan_bits));
  for (const proto::IndexKind kind :
       {proto::INDEX_LANDMARK, proto::INDEX_CLUSTER, proto::INDEX_GRAPH, proto::INDEX_PRODUCT}) {
    const index::BuiltKind built = *BuiltKindOf(kind);
    if (settings.Builds(built)) *info.add_built() = DescribeBuilt(session, kind, built);
  }
  if (settings.Builds(index::BuiltKind::kLandmark)) DescribeLandmark(session, info);
  info.set_error_target(settings.error_target);
  info.set_model(settings.model);
  if (session.planner() != nullptr) info.set_planner_audits(session.planner()->audits());
  if (with_plan && session.plan()->exists()) {
    proto::HeadPlan& plan = *info.mutable_plan() = session.plan()->Message(tokens);
    plan.set_scan_bits(info.scan_bits());
    if (settings.error_target > 0.0F) plan.set_error_target(double{settings.error_target});
  }
  return info;
}

}  // namespace kvseek::service
