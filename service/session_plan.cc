#include "service/session_plan.h"

#include <utility>

#include "proto/head_plan_file.h"
#include "service/live_planner.h"

namespace kvseek::service {

std::optional<index::BuiltKind> BuiltKindOf(proto::IndexKind kind) {
  switch (kind) {
    case proto::INDEX_LANDMARK:
      return index::BuiltKind::kLandmark;
    case proto::INDEX_CLUSTER:
      return index::BuiltKind::kCluster;
    case proto::INDEX_GRAPH:
      return index::BuiltKind::kGraph;
    case proto::INDEX_PRODUCT:
      return index::BuiltKind::kProduct;
    default:
      return std::nullopt;
  }
}

SessionPlan::SessionPlan(uint32_t layers, uint32_t kv_heads,
                         std::shared_ptr<const proto::HeadPlan> opened,
                         std::shared_ptr<const LivePlanner> live)
    : layers_(layers), kv_heads_(kv_heads), opened_(std::move(opened)), live_(std::move(live)) {
  if (opened_ == nullptr) return;
  settings_.resize(static_cast<size_t>(layers) * kv_heads);
  for (const proto::PlannedHead& head : opened_->heads()) {
    settings_[static_cast<size_t>(head.layer()) * kv_heads + head.kv_head()] = {
        static_cast<proto::IndexKind>(proto::IndexNumber(head)), head.candidates(),
        head.threshold()};
  }
}

uint64_t SessionPlan::Bytes(uint32_t layers, uint32_t kv_heads, const proto::HeadPlan* opened) {
  if (opened == nullptr) return sizeof(SessionPlan);
  return sizeof(SessionPlan) + uint64_t{layers} * kv_heads * sizeof(HeadSetting) +
         opened->SpaceUsedLong();
}

HeadSetting SessionPlan::Get(uint32_t layer, uint32_t kv_head, int64_t range) const {
  const HeadSetting learned = live_ == nullptr ? HeadSetting() : live_->Get(layer, kv_head, range);
  if (learned != HeadSetting() || settings_.empty()) return learned;
  return settings_[static_cast<size_t>(layer) * kv_heads_ + kv_head];
}

proto::HeadPlan SessionPlan::Message(absl::Span<const int64_t> ranges) const {
  proto::HeadPlan message;
  int next = 0;  // of opened_'s heads, which ascend
  for (uint32_t layer = 0; layer < layers_; ++layer) {
    for (uint32_t kv_head = 0; kv_head < kv_heads_; ++kv_head) {
      const HeadSetting setting = Get(layer, kv_head, ranges[layer]);
      const bool planned = opened_ != nullptr && next < opened_->heads_size() &&
                           opened_->heads(next).layer() == layer &&
                           opened_->heads(next).kv_head() == kv_head;
      if (!planned && setting == HeadSetting()) continue;
      proto::PlannedHead& head = *message.add_heads();
      head.set_layer(layer);
      head.set_kv_head(kv_head);
      head.set_mode(proto::kHeadModeNames[0]);
      if (planned) head = opened_->heads(next++);
      head.set_index(proto::kIndexNames[static_cast<size_t>(setting.index)]);
      head.set_candidates(setting.candidates);
      head.set_threshold(setting.threshold);
    }
  }
  message.set_version(proto::kHeadPlanVersion);
  if (opened_ != nullptr) message.set_error_target(opened_->error_target());
  return message;
}

}  // namespace kvseek::service
