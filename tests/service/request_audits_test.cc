// Audits as a client of the daemon's core sees them: in Stats.
#include "service/request_audits.h"

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <thread>

#include "tests/service/service_fixture.h"

namespace kvseek::service {
namespace {

constexpr size_t kTokens = 3000;
constexpr size_t kGroup = 3;
using Counters = std::map<std::string, uint64_t>;

DaemonOptions Options(double share) {
  DaemonOptions options = Service::SmallOptions(2);
  options.audit_share = share;
  options.audit_queue_max = 1000;
  return options;
}

proto::SessionRef Fill(Service& service) {
  const proto::SessionRef session = OpenSession(service, SmallShape());
  const auto answer =
      AppendRows(service, session, 0, 0, kTokens, RandomRows(5, SmallShape(), kTokens));
  EXPECT_TRUE(answer.ok()) << answer.status;
  return session;
}

template <typename Request>
Request Ask(const proto::SessionRef& session, proto::IndexKind index) {
  Request request;
  proto::QueryItem& item = *request.add_items();
  *item.mutable_session() = session;
  item.set_tokens(1);
  item.set_range_begin(100);
  request.set_query_dtype(proto::DTYPE_FP32);
  request.mutable_options()->set_index(index);
  request.mutable_options()->set_candidates(128);
  request.mutable_options()->set_exact_rows(4);
  return request;
}

Tensors Queries(uint32_t seed) {
  return Tensors().Add(reference::RandomFloats(seed, size_t{6} * 16, 1.5F));
}

void AskOften(Service& service, const proto::SessionRef& session, proto::IndexKind index,
              uint32_t requests) {
  for (uint32_t i = 0; i < requests; ++i) {
    const auto answer = service.Call(Ask<proto::AttendRequest>(session, index), Queries(i));
    ASSERT_TRUE(answer.ok()) << answer.status;
  }
}

Counters Stats(Service& service) {
  Counters counters;
  const auto answer = service.Call(proto::StatsRequest());
  for (const proto::Counter& counter : answer.message.counters()) {
    counters[counter.name()] = counter.value();
  }
  return counters;
}

/// Stats once `audits` are done or dropped, or after long.
Counters StatsAfter(Service& service, uint64_t audits) {
  Counters counters;
  for (int i = 0; i < 3000; ++i) {
    counters = Stats(service);
    if (counters["audits"] + counters["audits_dropped"] >= audits) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return counters;
}

TEST(AuditHistogramTest, CountsUpToEachBound) {
  AuditHistogram histogram({0.1, 1.0, 2.5});
  for (const double value : {0.0, 0.1, 0.2, 1.0, 1.5, 2.5, 2.6, 100.0}) histogram.Count(value);
  Counters values;
  histogram.AddTo("x", values);
  EXPECT_EQ(values, (Counters{{"x_le_0.1", 2}, {"x_le_1", 4}, {"x_le_2.5", 6}}));
}

TEST(RequestAuditsTest, AreOffByDefault) {
  Service service;
  const proto::SessionRef session = Fill(service);
  AskOften(service, session, proto::INDEX_LADDER, 5);
  for (const auto& [name, value] : Stats(service)) EXPECT_NE(name.substr(0, 5), "audit") << value;
}

TEST(RequestAuditsTest, TellHowFarAnswersAreOff) {
  Service service(Options(1.0));
  const proto::SessionRef session = Fill(service);
  constexpr uint64_t kRequests = 40;
  AskOften(service, session, proto::INDEX_LADDER, kRequests);
  Counters counters = StatsAfter(service, kRequests);
  const uint64_t audits = counters["audits"];  // few find the queue in use
  ASSERT_GT(audits, kRequests / 2);
  EXPECT_EQ(audits + counters["audits_dropped"], kRequests);
  const uint64_t heads = counters["audit_heads"];
  EXPECT_EQ(heads, audits * kGroup);
  EXPECT_EQ(counters["audit_bytes_exact"], audits * (kTokens - 100) * (16 + 24) * 2);
  EXPECT_GT(counters["audit_bytes_touched"], 0U);
  EXPECT_LT(counters["audit_bytes_touched"], counters["audit_bytes_exact"]);
  EXPECT_EQ(counters["audit_recall_le_1"], heads);
  EXPECT_EQ(counters["audit_missed_le_1"], heads);
  EXPECT_EQ(counters["audit_error_le_1"], heads);
  // 128 of 2900 keys are not all, and not nothing: an error there is, and a small one.
  EXPECT_LT(counters["audit_error_le_0.01"], heads);
  EXPECT_GT(counters["audit_error_le_0.5"], heads / 2);
  EXPECT_LT(counters["audit_missed_le_0.001"], heads);
  EXPECT_GT(counters["audit_missed_ratio_le_4"], 0U);
  EXPECT_LE(counters["audit_missed_ratio_le_4"], heads);
  EXPECT_LE(counters["audit_error_le_0.05"], counters["audit_error_le_0.1"]);
}

TEST(RequestAuditsTest, LeaveOutWhatIsExactAndTopK) {
  Service service(Options(1.0));
  const proto::SessionRef session = Fill(service);
  AskOften(service, session, proto::INDEX_EXACT, 5);
  auto request = Ask<proto::TopKRequest>(session, proto::INDEX_LADDER);
  request.set_k(10);
  request.set_with_state(true);
  ASSERT_TRUE(service.Call(request, Queries(1)).ok());
  AskOften(service, session, proto::INDEX_LADDER, 1);
  Counters counters = StatsAfter(service, 1);
  EXPECT_EQ(counters["audits"] + counters["audits_dropped"], 1U);
}

TEST(RequestAuditsTest, TakeAboutTheirShare) {
  Service service(Options(0.25));
  const proto::SessionRef session = Fill(service);
  constexpr uint32_t kRequests = 400;
  AskOften(service, session, proto::INDEX_LADDER, kRequests);
  uint64_t before = 0;
  uint64_t audits = StatsAfter(service, 50)["audits"];
  while (audits != before) {  // until no more come
    before = audits;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    audits = Stats(service)["audits"];
  }
  EXPECT_GE(audits, 50U);  // 100 +- 8.7
  EXPECT_LE(audits, 150U);
}

TEST(RequestAuditsTest, DropWhatDoesNotFit) {
  DaemonOptions options = Options(1.0);
  options.audit_queue_max = 0;
  Service service(options);
  const proto::SessionRef session = Fill(service);
  AskOften(service, session, proto::INDEX_LADDER, 7);
  Counters counters = StatsAfter(service, 7);
  EXPECT_EQ(counters["audits"], 0U);
  EXPECT_EQ(counters["audits_dropped"], 7U);
}

TEST(RequestAuditsTest, AnswersAreTheSameAndSessionsMayGo) {
  Service plain;
  const proto::SessionRef known = Fill(plain);
  const auto expected =
      plain.Call(Ask<proto::AttendRequest>(known, proto::INDEX_LADDER), Queries(3));
  ASSERT_TRUE(expected.ok()) << expected.status;
  Service service(Options(1.0));
  for (int i = 0; i < 5; ++i) {
    const proto::SessionRef session = Fill(service);
    auto answer = service.Call(Ask<proto::AttendRequest>(session, proto::INDEX_LADDER), Queries(3));
    ASSERT_TRUE(answer.ok()) << answer.status;
    EXPECT_EQ(answer.tensors.bytes(), Tensors(expected.tensors).bytes());
    proto::TruncateRequest truncate;
    *truncate.mutable_session() = session;
    truncate.set_tokens(50);
    EXPECT_TRUE(service.Call(truncate).ok());
    proto::CloseSessionRequest close;
    *close.mutable_session() = session;
    EXPECT_TRUE(service.Call(close).ok());
  }
  // Those whose keys went first are dropped.
  Counters counters = StatsAfter(service, 5);
  EXPECT_EQ(counters["audits"] + counters["audits_dropped"], 5U);
}

TEST(RequestAuditsTest, ADaemonMayStopWithAuditsQueued) {
  for (int i = 0; i < 5; ++i) {
    Service service(Options(1.0));
    const proto::SessionRef session = Fill(service);
    AskOften(service, session, proto::INDEX_LADDER, 20);
  }
}

}  // namespace
}  // namespace kvseek::service
