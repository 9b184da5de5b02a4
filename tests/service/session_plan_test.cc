// Head plans of sessions: what they change in answers, who inherits them, and what is refused.
#include "service/session_plan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <thread>

#include "tests/service/service_fixture.h"

namespace kvseek::service {
namespace {

constexpr size_t kTokens = 3000;

void AddHead(proto::HeadPlan& plan, uint32_t layer, uint32_t kv_head, const char* index,
             uint32_t candidates) {
  proto::PlannedHead& head = *plan.add_heads();
  head.set_layer(layer);
  head.set_kv_head(kv_head);
  head.set_mode("auto");
  head.set_index(index);
  head.set_candidates(candidates);
}

/// Layer 0: head 0 ladder with 128 candidates, head 1 exact. Layer 1: head 1 ladder with 512.
proto::HeadPlan Plan() {
  proto::HeadPlan plan;
  plan.set_version(1);
  AddHead(plan, 0, 0, "ladder", 128);
  AddHead(plan, 0, 1, "exact", 0);
  AddHead(plan, 1, 1, "ladder", 512);
  plan.mutable_heads(2)->set_mode("rows");
  plan.mutable_heads(2)->set_k(77);
  return plan;
}

DaemonOptions WithDefault(const proto::HeadPlan& plan) {
  DaemonOptions options = Service::SmallOptions(2);
  options.plan = std::make_shared<const proto::HeadPlan>(plan);
  return options;
}

proto::OpenSessionRequest OpenRequest() {
  proto::OpenSessionRequest request;
  *request.mutable_shape() = SmallShape();
  return request;
}

proto::SessionRef Filled(Service& service, const proto::OpenSessionRequest& request) {
  const auto opened = service.Call(request);
  EXPECT_TRUE(opened.ok()) << opened.status;
  for (uint32_t layer = 0; layer < 2; ++layer) {
    const auto rows = RandomRows(5 + layer, SmallShape(), kTokens);
    const auto held = AppendRows(service, opened.message.session(), layer, 0, kTokens, rows);
    EXPECT_TRUE(held.ok()) << held.status;
  }
  return opened.message.session();
}

proto::SessionRef FilledWith(Service& service, const proto::HeadPlan& plan) {
  proto::OpenSessionRequest request = OpenRequest();
  *request.mutable_plan() = plan;
  return Filled(service, request);
}

Answer<proto::AttendResponse> Ask(Service& service, const proto::SessionRef& session,
                                  uint32_t layer, const proto::SearchOptions& options = {},
                                  uint64_t end = kTokens) {
  proto::AttendRequest request;
  proto::QueryItem& item = *request.add_items();
  *item.mutable_session() = session;
  item.set_layer(layer);
  item.set_tokens(1);
  item.add_range_end(end);
  request.set_query_dtype(proto::DTYPE_FP32);
  *request.mutable_options() = options;
  auto answer = service.Call(request, Tensors().Add(reference::RandomFloats(9, 6 * 16, 1.5F)));
  EXPECT_TRUE(answer.ok()) << answer.status;
  EXPECT_EQ(answer.message.reports_size(), 2);
  return answer;
}

/// Keys read at 4 bits where the ladder answers, about; every head of a group has some of its own.
void ExpectLadder(const proto::Report& report, int64_t candidates) {
  EXPECT_EQ(report.index(), proto::INDEX_LADDER);
  EXPECT_NEAR(static_cast<double>(report.keys_fine()), static_cast<double>(candidates),
              0.5 * static_cast<double>(candidates));
}

TEST(SessionPlanTest, EachHeadIsSearchedAsPlanned) {
  Service service;
  const proto::SessionRef session = FilledWith(service, Plan());
  const auto first = Ask(service, session, 0);
  ExpectLadder(first.message.reports(0), 128);
  EXPECT_EQ(first.message.reports(1).index(), proto::INDEX_EXACT);
  const auto second = Ask(service, session, 1);
  EXPECT_EQ(second.message.reports(0).index(), proto::INDEX_EXACT);  // short, so auto is exact
  ExpectLadder(second.message.reports(1), 512);
}

TEST(SessionPlanTest, PlannedIsTheSameAsAskedFor) {
  Service service;
  const proto::SessionRef planned = FilledWith(service, Plan());
  const proto::SessionRef plain = Filled(service, OpenRequest());
  proto::SearchOptions options;
  options.set_index(proto::INDEX_LADDER);
  options.set_candidates(512);
  const auto asked = Ask(service, plain, 1, options);
  const auto answer = Ask(service, planned, 1);
  EXPECT_EQ(answer.message.reports(1).SerializeAsString(),
            asked.message.reports(1).SerializeAsString());
  const std::vector<float> ours = Tensors(answer.tensors).Take<float>(size_t{6} * 24);
  const std::vector<float> theirs = Tensors(asked.tensors).Take<float>(size_t{6} * 24);
  EXPECT_EQ(std::vector<float>(ours.begin() + 72, ours.end()),
            std::vector<float>(theirs.begin() + 72, theirs.end()));
}

TEST(SessionPlanTest, APlannedThresholdIsTheSameAsOneAskedFor) {
  Service service;
  proto::HeadPlan plan = Plan();
  plan.mutable_heads(2)->set_threshold(-6.5F);
  const proto::SessionRef planned = FilledWith(service, plan);
  const proto::SessionRef without = FilledWith(service, Plan());
  const auto report = [&](const proto::SessionRef& session, const proto::SearchOptions& options) {
    return Ask(service, session, 1, options).message.reports(1);
  };
  proto::SearchOptions options;
  options.set_threshold(-6.5F);
  const proto::Report answer = report(planned, {});
  EXPECT_EQ(answer.SerializeAsString(), report(without, options).SerializeAsString());
  EXPECT_LT(answer.keys_fine(), report(without, {}).keys_fine());
  // None is something to ask for.
  options.set_threshold(0.0F);
  EXPECT_EQ(report(planned, options).SerializeAsString(), report(without, {}).SerializeAsString());
  // The threshold is the planned index's.
  options.Clear();
  options.set_index(proto::INDEX_EXACT);
  EXPECT_EQ(report(planned, options).index(), proto::INDEX_EXACT);
  proto::StatsRequest stats;
  stats.set_with_sessions(true);
  stats.set_with_plans(true);
  EXPECT_EQ(service.Call(stats).message.sessions(0).plan().heads(2).threshold(), -6.5F);
}

TEST(SessionPlanTest, WhatARequestSaysCounts) {
  Service service;
  const proto::SessionRef session = FilledWith(service, Plan());
  proto::SearchOptions options;
  options.set_candidates(256);  // for the planned index
  auto answer = Ask(service, session, 0, options);
  ExpectLadder(answer.message.reports(0), 256);
  EXPECT_EQ(answer.message.reports(1).index(), proto::INDEX_EXACT);
  options.set_index(proto::INDEX_LADDER);
  answer = Ask(service, session, 0, options);
  ExpectLadder(answer.message.reports(0), 256);
  ExpectLadder(answer.message.reports(1), 256);
  // The index alone: the planned budget is for the planned index, the daemon's for any other.
  options.clear_candidates();
  answer = Ask(service, session, 0, options);
  ExpectLadder(answer.message.reports(0), 128);
  EXPECT_EQ(answer.message.reports(1).keys_fine(), 2048U);  // the default is all in segments
}

TEST(SessionPlanTest, TopKTakesItToo) {
  Service service;
  const proto::SessionRef session = FilledWith(service, Plan());
  proto::TopKRequest request;
  proto::QueryItem& item = *request.add_items();
  *item.mutable_session() = session;
  item.set_tokens(1);
  request.set_query_dtype(proto::DTYPE_FP32);
  request.set_k(10);
  const auto answer =
      service.Call(request, Tensors().Add(reference::RandomFloats(9, 6 * 16, 1.5F)));
  ASSERT_TRUE(answer.ok()) << answer.status;
  ExpectLadder(answer.message.reports(0), 128);
  EXPECT_EQ(answer.message.reports(1).index(), proto::INDEX_EXACT);
  EXPECT_EQ(answer.message.position_counts(0), 10U);  // k is the request's
}

TEST(SessionPlanTest, ForksInherit) {
  Service service;
  proto::ForkRequest fork;
  *fork.mutable_session() = FilledWith(service, Plan());
  fork.set_tokens(2500);
  const auto forked = service.Call(fork);
  ASSERT_TRUE(forked.ok()) << forked.status;
  const auto answer = Ask(service, forked.message.session(), 0, {}, 2500);
  ExpectLadder(answer.message.reports(0), 128);
  EXPECT_EQ(answer.message.reports(1).index(), proto::INDEX_EXACT);
}

TEST(SessionPlanTest, TheDaemonsPlanIsForSessionsWithoutOne) {
  proto::HeadPlan plan = Plan();
  plan.set_scan_bits(1);
  Service service(WithDefault(plan));
  ExpectLadder(Ask(service, Filled(service, OpenRequest()), 0).message.reports(0), 128);
  // An empty plan is a plan.
  proto::HeadPlan empty;
  empty.set_version(1);
  const auto without = Ask(service, FilledWith(service, empty), 0);
  EXPECT_EQ(without.message.reports(0).index(), proto::INDEX_EXACT);
  // One that does not fit is left aside.
  proto::OpenSessionRequest two_bits = OpenRequest();
  two_bits.set_scan_bits(2);
  EXPECT_EQ(Ask(service, Filled(service, two_bits), 0).message.reports(0).index(),
            proto::INDEX_EXACT);
  proto::OpenSessionRequest one_layer = OpenRequest();
  one_layer.mutable_shape()->set_layers(1);
  EXPECT_TRUE(service.Call(one_layer).ok());
}

proto::SessionInfo Info(Service& service, const proto::SessionRef& session) {
  proto::StatsRequest request;
  request.set_with_sessions(true);
  request.set_with_plans(true);
  request.set_session_id(session.session_id());
  const auto answer = service.Call(request);
  EXPECT_EQ(answer.message.sessions_size(), 1);
  return answer.message.sessions(0);
}

TEST(SessionPlanTest, StatsTellIt) {
  Service service;
  proto::HeadPlan plan = Plan();
  plan.set_scan_bits(1);
  plan.set_error_target(0.05);
  const proto::SessionRef planned = FilledWith(service, plan);
  const proto::SessionRef plain = Filled(service, OpenRequest());
  EXPECT_EQ(Info(service, planned).plan().SerializeAsString(), plan.SerializeAsString());
  EXPECT_EQ(Info(service, planned).scan_bits(), 1U);
  EXPECT_FALSE(Info(service, plain).has_plan());
  proto::StatsRequest request;
  request.set_with_sessions(true);
  const auto answer = service.Call(request);
  ASSERT_EQ(answer.message.sessions_size(), 2);
  EXPECT_FALSE(answer.message.sessions(0).has_plan());
  request.set_session_id(99);
  EXPECT_EQ(service.Call(request).message.sessions_size(), 0);
}

TEST(SessionPlanTest, IndexesThatItNamesAreBuiltAndStandBackUntilThen) {
  DaemonOptions options = Service::SmallOptions(2);
  options.build_from_tokens = 1024;
  options.candidates = 512;
  Service service(options);
  proto::HeadPlan plan = Plan();
  plan.mutable_heads(0)->set_index("landmark");
  const auto opened = [&] {
    proto::OpenSessionRequest request = OpenRequest();
    *request.mutable_plan() = plan;
    return service.Call(request);
  }();
  ASSERT_TRUE(opened.ok()) << opened.status;
  const proto::SessionRef session = opened.message.session();
  ASSERT_EQ(Info(service, session).built_size(), 1);
  EXPECT_EQ(Info(service, session).built(0).index(), proto::INDEX_LANDMARK);
  ASSERT_TRUE(AppendRows(service, session, 0, 0, 1000, RandomRows(5, SmallShape(), 1000)).ok());
  EXPECT_EQ(Ask(service, session, 0, {}, 1000).message.reports(0).index(), proto::INDEX_EXACT);
  ASSERT_TRUE(AppendRows(service, session, 0, 1000, 2000, RandomRows(6, SmallShape(), 2000)).ok());
  proto::IndexKind index = proto::INDEX_AUTO;
  for (int i = 0; i < 3000 && index != proto::INDEX_LANDMARK; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    index = Ask(service, session, 0).message.reports(0).index();
  }
  EXPECT_EQ(index, proto::INDEX_LANDMARK);
  proto::TopKRequest request;
  proto::QueryItem& item = *request.add_items();
  *item.mutable_session() = session;
  item.set_tokens(1);
  item.add_range_end(2048);  // what the index covers
  request.set_query_dtype(proto::DTYPE_FP32);
  request.set_k(300);  // more than the planned candidates
  const auto answer =
      service.Call(request, Tensors().Add(reference::RandomFloats(9, 6 * 16, 1.5F)));
  ASSERT_TRUE(answer.ok()) << answer.status;
  EXPECT_EQ(answer.message.reports(0).index(), proto::INDEX_LANDMARK);
  EXPECT_EQ(answer.message.position_counts(0), 300U);
}

TEST(SessionPlanTest, RefusalsNameTheField) {
  Service service;
  const uint64_t used = service.budget().used_bytes();
  const auto refused = [&](const std::function<void(proto::OpenSessionRequest&)>& spoil) {
    proto::OpenSessionRequest request = OpenRequest();
    *request.mutable_plan() = Plan();
    spoil(request);
    return Describe(service.Call(request).status);
  };
  const std::string invalid = "INVALID_ARGUMENT ";
  EXPECT_EQ(refused([](auto& m) { m.mutable_plan()->clear_version(); }), invalid + "plan.version");
  EXPECT_EQ(refused([](auto& m) { m.mutable_plan()->mutable_heads(2)->set_candidates(~0U); }),
            invalid + "plan.heads[2].candidates");
  EXPECT_EQ(refused([](auto& m) { m.mutable_plan()->mutable_heads(2)->set_threshold(1.0F); }),
            invalid + "plan.heads[2].threshold");
  EXPECT_EQ(refused([](auto& m) { m.mutable_plan()->mutable_heads(2)->set_layer(2); }),
            invalid + "plan.heads[2].layer");
  EXPECT_EQ(refused([](auto& m) { m.mutable_plan()->mutable_heads(1)->set_kv_head(2); }),
            invalid + "plan.heads[1].kv_head");
  EXPECT_EQ(refused([](auto& m) { m.mutable_plan()->mutable_heads(1)->set_kv_head(0); }),
            invalid + "plan.heads[1]");
  EXPECT_EQ(refused([](auto& m) {
              m.set_scan_bits(2);
              m.mutable_plan()->set_scan_bits(1);
            }),
            invalid + "plan.scan_bits");
  EXPECT_EQ(refused([](auto& m) { m.set_error_target(NAN); }), invalid + "error_target");
  EXPECT_EQ(refused([](auto& m) { m.set_error_target(-0.1F); }), invalid + "error_target");
  EXPECT_EQ(refused([](auto& m) { m.set_error_target(0.1F); }), "FAILED_PRECONDITION error_target");
  EXPECT_EQ(service.budget().used_bytes(), used);
}

TEST(SessionPlanTest, WithoutAPlanThereIsNone) {
  const SessionPlan none(2, 2, nullptr, nullptr);
  EXPECT_FALSE(none.exists());
  EXPECT_EQ(none.Get(1, 1, 9000), HeadSetting());
  const SessionPlan opened(2, 2, std::make_shared<const proto::HeadPlan>(Plan()), nullptr);
  EXPECT_TRUE(opened.exists());
  EXPECT_EQ(opened.Get(1, 1, 9000), (HeadSetting{proto::INDEX_LADDER, 512, 0.0F}));
  EXPECT_EQ(opened.Message({9000, 0}).heads_size(), 3);
}

}  // namespace
}  // namespace kvseek::service
