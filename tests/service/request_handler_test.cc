// How requests are run: sessions cut and closed, queues, deadlines, cancellation, counters.
#include "service/request_handler.h"

#include <gtest/gtest.h>

#include <chrono>
#include <latch>
#include <map>
#include <thread>

#include "tests/service/search_fixture.h"

namespace kvseek::service {
namespace {

using RequestHandlerTest = SearchTest;

TEST_F(RequestHandlerTest, ForkTruncateAndClose) {
  Service service;
  const proto::SessionRef parent = OpenWith(service, {2500, 700});
  const uint64_t used = service.budget().used_bytes();
  proto::ForkRequest fork;
  *fork.mutable_session() = parent;
  fork.set_lease_ms(1234);
  const auto all = service.Call(fork);
  ASSERT_TRUE(all.ok()) << all.status;
  EXPECT_EQ(all.message.lease_ms(), 1234U);
  EXPECT_EQ(service.store().List()[1]->State(0), service.store().List()[0]->State(0));
  EXPECT_LT(service.budget().used_bytes() - used, 10000U) << "tables only";
  fork.set_tokens(1500);
  const auto part = service.Call(fork);
  ASSERT_TRUE(part.ok()) << part.status;

  proto::TruncateRequest truncate;
  *truncate.mutable_session() = parent;
  truncate.set_tokens(0);
  EXPECT_TRUE(service.Call(truncate).ok());
  const auto sessions = service.store().List();
  ASSERT_EQ(sessions.size(), 3U);
  EXPECT_EQ(sessions[0]->State(0)->tokens, 0);
  EXPECT_EQ(sessions[1]->State(0)->tokens, 2500);
  EXPECT_EQ(sessions[1]->State(1)->tokens, 700);
  EXPECT_EQ(sessions[2]->State(0)->tokens, 1500);
  EXPECT_EQ(sessions[2]->State(1)->tokens, 700) << "a shorter layer keeps what it has";
  for (const auto& session : {parent, all.message.session(), part.message.session()}) {
    proto::CloseSessionRequest close;
    *close.mutable_session() = session;
    EXPECT_TRUE(service.Call(close).ok());
    EXPECT_EQ(Describe(service.Call(close).status), "NOT_FOUND session");
  }
}

TEST_F(RequestHandlerTest, ClosingGivesAllMemoryBack) {
  Service service;
  const proto::SessionRef session = OpenWith(service, {2500, 700});
  EXPECT_GT(service.budget().used_bytes(), 0U);
  proto::CloseSessionRequest close;
  *close.mutable_session() = session;
  EXPECT_TRUE(service.Call(close).ok());
  for (int i = 0; i < 1000 && service.budget().used_bytes() > 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(service.budget().used_bytes(), 0U);
}

TEST_F(RequestHandlerTest, FullQueueRefusesDeadlinesPassAndCancelsWork) {
  DaemonOptions options = Service::SmallOptions(1);
  options.queue_limit = 3;
  Service service(options);
  const proto::SessionRef session = OpenWith(service, {500});
  std::latch release(1);
  service.pool().Submit([&](index::Scratch&) { release.wait(); });
  const std::string request = Attend({Item(session, 0, 1)}).SerializeAsString();
  const auto payload = [] { return Tensors().Add(Queries(1, 1)).Copy(); };
  const auto cancelled = std::make_shared<std::atomic<bool>>(false);
  auto served = service.Start(proto::Op::kAttend, request, payload());
  auto late = service.Start(proto::Op::kAttend, request, payload(), std::chrono::milliseconds(1));
  auto given_up =
      service.Start(proto::Op::kAttend, request, payload(), std::chrono::seconds(60), cancelled);
  const auto refused =
      Service::Wait<proto::AttendResponse>(service.Start(proto::Op::kAttend, request, payload()));
  EXPECT_EQ(Describe(refused.status), "RESOURCE_EXHAUSTED");
  EXPECT_GT(proto::RetryAfterMs(refused.status), 0U);
  EXPECT_TRUE(service.Call(proto::HealthRequest()).message.serving()) << "short ones go on";
  EXPECT_EQ(service.Call(proto::StatsRequest()).message.queue_depth(), 3U);
  cancelled->store(true);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  release.count_down();
  EXPECT_TRUE(Service::Wait<proto::AttendResponse>(std::move(served)).ok());
  EXPECT_EQ(Describe(Service::Wait<proto::AttendResponse>(std::move(late)).status),
            "DEADLINE_EXCEEDED");
  EXPECT_EQ(Describe(Service::Wait<proto::AttendResponse>(std::move(given_up)).status),
            "CANCELLED");
  EXPECT_EQ(service.Call(proto::StatsRequest()).message.queue_depth(), 0U);
}

TEST_F(RequestHandlerTest, DestructionAnswersWhatIsUnderWay) {
  std::vector<std::future<Response>> answers;
  {
    Service service(Service::SmallOptions(1));
    const proto::SessionRef session = OpenWith(service, {9000});
    auto request = Attend({Item(session, 0, 64)}, proto::INDEX_EXACT);
    for (int i = 0; i < 20; ++i) {
      answers.push_back(service.Start(proto::Op::kAttend, request.SerializeAsString(),
                                      Tensors().Add(Queries(1, 64)).Copy()));
    }
  }
  int unavailable = 0;
  for (auto& future : answers) {
    const absl::Status status = Service::Wait<proto::AttendResponse>(std::move(future)).status;
    if (absl::IsUnavailable(status)) ++unavailable;
  }
  EXPECT_GT(unavailable, 0);
}

TEST_F(RequestHandlerTest, TimeInTheDaemonCountsFromTheRequestsArrival) {
  Service service(Service::SmallOptions(1));
  const proto::SessionRef session = OpenWith(service, {500});
  std::latch release(1);
  service.pool().Submit([&](index::Scratch&) { release.wait(); });  // the only worker
  const auto begin = std::chrono::steady_clock::now();
  auto attend = service.Start(proto::Op::kAttend, Attend({Item(session, 0, 1)}).SerializeAsString(),
                              Tensors().Add(Queries(1, 1)).Copy());
  auto topk = service.Start(proto::Op::kTopK, TopK({Item(session, 0, 1)}, 4).SerializeAsString(),
                            Tensors().Add(Queries(1, 1)).Copy());
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  release.count_down();
  const auto attended = Service::Wait<proto::AttendResponse>(std::move(attend));
  const auto found = Service::Wait<proto::TopKResponse>(std::move(topk));
  const auto whole = std::chrono::steady_clock::now() - begin;
  for (const uint32_t micros : {attended.message.compute_us(), found.message.compute_us()}) {
    EXPECT_GE(micros, 20000U) << "waiting for a worker counts";
    EXPECT_LE(std::chrono::microseconds(micros), whole);
  }
}

TEST_F(RequestHandlerTest, StatsCount) {
  Service service;
  const proto::SessionRef session = OpenWith(service, {500, 200});
  service.Call(Attend({Item(session, 0, 2)}), Tensors().Add(Queries(1, 2)));
  service.Call(Attend({Item(session, 5, 2)}), Tensors().Add(Queries(1, 2)));
  proto::StatsRequest request;
  request.set_with_sessions(true);
  const auto answer = service.Call(request);
  ASSERT_TRUE(answer.ok());
  std::map<std::string, uint64_t> counters;
  for (const auto& counter : answer.message.counters()) counters[counter.name()] = counter.value();
  EXPECT_EQ(counters.at("requests_open_session"), 1U);
  EXPECT_EQ(counters.at("requests_append"), 2U);
  EXPECT_EQ(counters.at("requests_attend"), 2U);
  EXPECT_EQ(counters.at("errors_invalid_argument"), 1U);
  EXPECT_EQ(counters.at("tokens_appended"), 700U);
  EXPECT_EQ(counters.at("searches"), 4U);
  EXPECT_EQ(counters.at("keys_exact"), 2000U);
  EXPECT_GT(counters.at("bytes_in"), 0U);
  EXPECT_GT(counters.at("bytes_out"), 0U);
  EXPECT_EQ(counters.at("sessions_expired"), 0U);
  EXPECT_EQ(answer.message.connections_open(), 7U);
  EXPECT_EQ(answer.message.workers(), 2U);
  EXPECT_EQ(answer.message.sessions_open(), 1U);
  EXPECT_EQ(answer.message.memory_used_bytes(), service.budget().used_bytes());
  ASSERT_EQ(answer.message.sessions_size(), 1);
  const proto::SessionInfo& info = answer.message.sessions(0);
  EXPECT_EQ(info.tokens(0), 500U);
  EXPECT_EQ(info.tokens(1), 200U);
  EXPECT_EQ(info.shape().query_heads(), 6U);
  EXPECT_FLOAT_EQ(info.shape().softmax_scale(), 0.25F);
  EXPECT_EQ(info.session().session_id(), session.session_id());
  EXPECT_GT(info.bytes(), 0U);
  EXPECT_EQ(info.scan_bits(), 2U);
}

}  // namespace
}  // namespace kvseek::service
