// A daemon's core that audits all of its traffic, and what tests of its planners ask of it.
#ifndef KVSEEK_TESTS_SERVICE_AUDITED_SERVICE_H_
#define KVSEEK_TESTS_SERVICE_AUDITED_SERVICE_H_

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <thread>

#include "tests/service/service_fixture.h"

namespace kvseek::service {

inline DaemonOptions Audited() {
  DaemonOptions options = Service::SmallOptions(2);
  options.audit_share = 1.0;
  options.audit_queue_max = 1000;
  return options;
}

inline std::map<std::string, uint64_t> Counters(Service& service) {
  std::map<std::string, uint64_t> counters;
  const auto answer = service.Call(proto::StatsRequest());
  for (const proto::Counter& counter : answer.message.counters()) {
    counters[counter.name()] = counter.value();
  }
  return counters;
}

/// Waits until nothing is queued, `offered` searches having been offered so far.
inline void WaitForAudits(Service& service, uint64_t offered) {
  for (int i = 0; i < 6000; ++i) {
    auto counters = Counters(service);
    if (counters["audits"] + counters["audits_dropped"] >= offered) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  FAIL() << "audits take too long";
}

inline proto::SessionInfo Info(Service& service, const proto::SessionRef& session) {
  proto::StatsRequest request;
  request.set_with_sessions(true);
  request.set_with_plans(true);
  request.set_session_id(session.session_id());
  const auto answer = service.Call(request);
  EXPECT_EQ(answer.message.sessions_size(), 1);
  return answer.message.sessions(0);
}

inline proto::SessionRef Open(Service& service, const proto::OpenSessionRequest& request) {
  const auto opened = service.Call(request);
  EXPECT_TRUE(opened.ok()) << opened.status;
  return opened.message.session();
}

inline proto::OpenSessionRequest RequestWithTarget(const proto::ModelShape& shape, float target,
                                                   const std::string& model = "") {
  proto::OpenSessionRequest request;
  *request.mutable_shape() = shape;
  request.set_error_target(target);
  request.set_model(model);
  return request;
}

}  // namespace kvseek::service

#endif  // KVSEEK_TESTS_SERVICE_AUDITED_SERVICE_H_
