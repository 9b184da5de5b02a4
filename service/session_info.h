// What an answer says of a session: its handle, and in Stats its shape, size, indexes and plan.
#ifndef KVSEEK_SERVICE_SESSION_INFO_H_
#define KVSEEK_SERVICE_SESSION_INFO_H_

#include <chrono>
#include <cstdint>

#include "proto/kvseek.pb.h"
#include "service/session.h"

namespace kvseek::service {

/// As messages tell times: whole milliseconds, 0 for what is negative.
uint64_t Milliseconds(std::chrono::steady_clock::duration duration);

/// The handle of a session of the daemon's start `boot_id`.
proto::SessionRef MakeSessionRef(uint64_t boot_id, const Session& session);

/// The session as it is now; its lease is not renewed. `with_plan`: also its head plan, where there
/// is one.
proto::SessionInfo DescribeSession(uint64_t boot_id, const Session& session, bool with_plan,
                                   TimePoint now);

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SESSION_INFO_H_
