#include "service/session_plan.h"

#include <utility>

#include "proto/head_plan_file.h"

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
                         std::shared_ptr<const proto::HeadPlan> opened, bool live)
    : kv_heads_(kv_heads),
      opened_(std::move(opened)),
      settings_(live || opened_ != nullptr ? static_cast<size_t>(layers) * kv_heads : 0) {
  if (opened_ == nullptr) return;
  for (const proto::PlannedHead& head : opened_->heads()) {
    Set(head.layer(), head.kv_head(),
        {static_cast<proto::IndexKind>(proto::IndexNumber(head)), head.candidates(),
         head.threshold()});
  }
}

SessionPlan::SessionPlan(const SessionPlan& other)
    : kv_heads_(other.kv_heads_), opened_(other.opened_), settings_(other.settings_.size()) {
  for (size_t i = 0; i < settings_.size(); ++i) settings_[i].store(other.settings_[i].load());
}

uint64_t SessionPlan::Bytes(uint32_t layers, uint32_t kv_heads, const proto::HeadPlan* opened,
                            bool live) {
  const uint64_t table =
      live || opened != nullptr ? uint64_t{layers} * kv_heads * sizeof(uint64_t) : 0;
  return sizeof(SessionPlan) + table + (opened == nullptr ? 0 : opened->SpaceUsedLong());
}

proto::HeadPlan SessionPlan::Message() const {
  proto::HeadPlan message;
  int next = 0;  // of opened_'s heads, which ascend like the places
  for (size_t place = 0; place < settings_.size(); ++place) {
    const auto layer = static_cast<uint32_t>(place / kv_heads_);
    const auto kv_head = static_cast<uint32_t>(place % kv_heads_);
    const HeadSetting setting = Get(layer, kv_head);
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
  message.set_version(proto::kHeadPlanVersion);
  if (opened_ != nullptr) message.set_error_target(opened_->error_target());
  return message;
}

}  // namespace kvseek::service
