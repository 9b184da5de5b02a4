#include "client/head_plan.h"

#include "client/head_plan_message.h"
#include "proto/head_plan_file.h"

namespace kvseek {
namespace {

absl::StatusOr<HeadPlan> FromChecked(const absl::StatusOr<proto::HeadPlan>& message) {
  if (!message.ok()) return message.status();
  return client::FromMessage(*message);
}

/// (layers, kv_heads): `value` of the heads that the plan names, `otherwise` of the others.
template <typename T, typename Value>
absl::StatusOr<std::vector<T>> Table(const HeadPlan& plan, uint32_t layers, uint32_t kv_heads,
                                     T otherwise, const Value& value) {
  absl::Status fits = proto::CheckHeadPlanFits(client::ToMessage(plan), layers, kv_heads);
  if (!fits.ok()) return fits;
  std::vector<T> table(static_cast<size_t>(layers) * kv_heads, otherwise);
  for (const PlannedHead& head : plan.heads) {
    table[static_cast<size_t>(head.layer) * kv_heads + head.kv_head] = value(head);
  }
  return table;
}

}  // namespace

absl::StatusOr<HeadPlan> ParseHeadPlan(absl::string_view json) {
  return FromChecked(proto::ParseHeadPlan(json));
}

absl::StatusOr<HeadPlan> ReadHeadPlan(const std::string& path) {
  return FromChecked(proto::ReadHeadPlan(path));
}

absl::StatusOr<std::string> FormatHeadPlan(const HeadPlan& plan) {
  return proto::FormatHeadPlan(client::ToMessage(plan));
}

absl::Status WriteHeadPlan(const HeadPlan& plan, const std::string& path) {
  return proto::WriteHeadPlan(client::ToMessage(plan), path);
}

HeadPlan PlanOfModes(uint32_t kv_heads, const std::vector<HeadMode>& modes) {
  HeadPlan plan;
  for (uint32_t i = 0; i < modes.size(); ++i) {
    plan.heads.push_back({.layer = i / kv_heads, .kv_head = i % kv_heads, .mode = modes[i]});
  }
  return plan;
}

absl::StatusOr<std::vector<HeadMode>> HeadModesOf(const HeadPlan& plan, uint32_t layers,
                                                  uint32_t kv_heads) {
  return Table(plan, layers, kv_heads, HeadMode::kAuto,
               [](const PlannedHead& head) { return head.mode; });
}

absl::StatusOr<std::vector<uint32_t>> HeadRowsOf(const HeadPlan& plan, uint32_t layers,
                                                 uint32_t kv_heads, uint32_t rows) {
  return Table(plan, layers, kv_heads, rows,
               [rows](const PlannedHead& head) { return head.k > 0 ? head.k : rows; });
}

}  // namespace kvseek
