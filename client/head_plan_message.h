// Head plans as they travel and as they stand in a file: client/head_plan.h to and from
// proto/head_plan.proto.
#ifndef KVSEEK_CLIENT_HEAD_PLAN_MESSAGE_H_
#define KVSEEK_CLIENT_HEAD_PLAN_MESSAGE_H_

#include "client/head_plan.h"
#include "proto/head_plan.pb.h"

namespace kvseek::client {

/// Checks nothing.
proto::HeadPlan ToMessage(const HeadPlan& plan);
/// REQUIRES: proto::CheckHeadPlan.
HeadPlan FromMessage(const proto::HeadPlan& message);

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_HEAD_PLAN_MESSAGE_H_
