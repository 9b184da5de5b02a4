#include "client/head_plan_message.h"

#include "proto/head_plan_file.h"

namespace kvseek::client {

proto::HeadPlan ToMessage(const HeadPlan& plan) {
  proto::HeadPlan message;
  message.set_version(proto::kHeadPlanVersion);
  message.set_scan_bits(plan.scan_bits);
  message.set_error_target(plan.error_target);
  for (const PlannedHead& head : plan.heads) {
    proto::PlannedHead& to = *message.add_heads();
    to.set_layer(head.layer);
    to.set_kv_head(head.kv_head);
    to.set_mode(proto::kHeadModeNames[static_cast<size_t>(head.mode)]);
    to.set_index(head.index);
    to.set_candidates(head.candidates);
    to.set_k(head.k);
    to.set_threshold(head.threshold);
  }
  return message;
}

HeadPlan FromMessage(const proto::HeadPlan& message) {
  HeadPlan plan;
  plan.scan_bits = message.scan_bits();
  plan.error_target = message.error_target();
  for (const proto::PlannedHead& head : message.heads()) {
    plan.heads.push_back({head.layer(), head.kv_head(),
                          static_cast<HeadMode>(proto::HeadModeNumber(head)), head.index(),
                          head.candidates(), head.k(), head.threshold()});
  }
  return plan;
}

}  // namespace kvseek::client
