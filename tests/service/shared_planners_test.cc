// What one session's audits taught is there for the next of the same model, and for no other.
#include "service/shared_planners.h"

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "service/session.h"
#include "tests/service/audited_service.h"

namespace kvseek::service {
namespace {

constexpr size_t kTokens = 3000;
constexpr float kTarget = 0.5F;
constexpr uint32_t kOpened = 999;  ///< candidates of head 0 where the daemon has a plan

void Fill(Service& service, const proto::SessionRef& session, size_t tokens = kTokens) {
  const auto rows = RandomRows(5, SmallShape(), tokens);
  ASSERT_TRUE(AppendRows(service, session, 0, 0, tokens, rows).ok());
}

Answer<proto::AttendResponse> Ask(Service& service, const proto::SessionRef& session,
                                  uint32_t seed) {
  proto::AttendRequest request;
  proto::QueryItem& item = *request.add_items();
  *item.mutable_session() = session;
  item.set_tokens(1);
  request.set_query_dtype(proto::DTYPE_FP32);
  return service.Call(request, Tensors().Add(reference::RandomFloats(seed, 6 * 16, 1.5F)));
}

/// Asks until both heads are planned; `offered` counts the searches so far.
void Teach(Service& service, const proto::SessionRef& session, uint64_t& offered) {
  for (uint32_t i = 0; i < 200; ++i) {
    ASSERT_TRUE(Ask(service, session, i).ok());
    WaitForAudits(service, ++offered);
    if (i % 16 != 0) continue;
    const proto::HeadPlan plan = Info(service, session).plan();
    if (plan.heads_size() == 2 && plan.heads(0).candidates() != kOpened) return;
  }
  FAIL() << "nothing was planned";
}

TEST(SharedPlannersTest, ASecondSessionStartsFromWhatTheFirstLearned) {
  Service service(Audited());
  uint64_t offered = 0;
  const auto first = Open(service, RequestWithTarget(SmallShape(), kTarget, "m"));
  Fill(service, first);
  EXPECT_EQ(Ask(service, first, 1).message.reports(0).index(), proto::INDEX_EXACT);  // short: auto
  WaitForAudits(service, ++offered);
  Teach(service, first, offered);
  const proto::HeadPlan learned = Info(service, first).plan();
  proto::CloseSessionRequest close;
  *close.mutable_session() = first;
  ASSERT_TRUE(service.Call(close).ok());

  const auto second = Open(service, RequestWithTarget(SmallShape(), kTarget, "m"));
  Fill(service, second);
  const proto::SessionInfo info = Info(service, second);
  EXPECT_EQ(info.model(), "m");
  EXPECT_EQ(info.plan().SerializeAsString(), learned.SerializeAsString());
  EXPECT_EQ(info.planner_audits(), Counters(service)["planner_audits"]);
  EXPECT_GE(info.planner_audits(), 16U);
  const auto answer = Ask(service, second, 7);
  for (int head = 0; head < 2; ++head) {
    EXPECT_EQ(answer.message.reports(head).index(), proto::INDEX_LADDER) << head;
  }
  EXPECT_EQ(Counters(service)["planners"], 1U);
  EXPECT_EQ(Counters(service)["planner_heads"], 2U);
}

TEST(SharedPlannersTest, BothTeachOnePlanner) {
  Service service(Audited());
  uint64_t offered = 0;
  proto::SessionRef sessions[2];
  for (proto::SessionRef& session : sessions) {
    session = Open(service, RequestWithTarget(SmallShape(), kTarget, "m"));
    Fill(service, session);
  }
  for (uint32_t i = 0; i < 8; ++i) {
    ASSERT_TRUE(Ask(service, sessions[i % 2], i).ok());
    WaitForAudits(service, ++offered);
  }
  for (const proto::SessionRef& session : sessions) {
    EXPECT_EQ(Info(service, session).planner_audits(), 8U);
  }
}

TEST(SharedPlannersTest, WhatDiffersDoesNotShare) {
  Service service(Audited());
  uint64_t offered = 0;
  const auto request = RequestWithTarget(SmallShape(), kTarget, "m");
  const auto first = Open(service, request);
  Fill(service, first);
  Teach(service, first, offered);
  const auto learned = [&](const std::function<void(proto::OpenSessionRequest&)>& change) {
    proto::OpenSessionRequest other = request;
    change(other);
    const proto::SessionRef session = Open(service, other);
    const uint64_t audits = Info(service, session).planner_audits();
    proto::CloseSessionRequest close;
    *close.mutable_session() = session;
    EXPECT_TRUE(service.Call(close).ok());
    return audits;
  };
  EXPECT_GT(learned([](auto&) {}), 0U);
  EXPECT_GT(learned([](auto& m) { m.set_name("a name is no matter"); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.set_model("another"); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.set_model(""); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.set_error_target(0.25F); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.set_scan_bits(1); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.add_build(proto::INDEX_CLUSTER); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.mutable_plan()->set_version(1); }), 0U);
  EXPECT_EQ(learned([](auto& m) {
              m.add_build(proto::INDEX_LANDMARK);
              m.mutable_landmark()->set_block(32);
            }),
            0U);
  EXPECT_EQ(learned([](auto& m) { m.mutable_shape()->set_layers(3); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.mutable_shape()->set_kv_heads(3); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.mutable_shape()->set_query_heads(4); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.mutable_shape()->set_key_dim(24); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.mutable_shape()->set_value_dim(16); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.mutable_shape()->set_dtype(proto::DTYPE_FP16); }), 0U);
  EXPECT_EQ(learned([](auto& m) { m.mutable_shape()->set_softmax_scale(0.5F); }), 0U);
}

TEST(SharedPlannersTest, ForksShareAndTheDaemonsPlanIsWhereSessionsBegin) {
  DaemonOptions options = Audited();
  proto::HeadPlan plan;
  plan.set_version(1);
  proto::PlannedHead& head = *plan.add_heads();
  head.set_mode("auto");
  head.set_index("ladder");
  head.set_candidates(kOpened);
  options.plan = std::make_shared<const proto::HeadPlan>(plan);
  Service service(options);
  uint64_t offered = 0;
  const auto parent = Open(service, RequestWithTarget(SmallShape(), kTarget));  // of no model
  Fill(service, parent);
  ASSERT_EQ(Info(service, parent).plan().heads_size(), 1);
  EXPECT_EQ(Info(service, parent).plan().heads(0).candidates(), kOpened);
  proto::ForkRequest fork;
  *fork.mutable_session() = parent;
  const proto::SessionRef child = service.Call(fork).message.session();
  Teach(service, child, offered);
  EXPECT_EQ(Info(service, parent).plan().SerializeAsString(),
            Info(service, child).plan().SerializeAsString());
  EXPECT_NE(Info(service, parent).plan().heads(0).candidates(), kOpened);
  EXPECT_EQ(Counters(service)["planners"], 0U);
}

SessionSettings Settings(const std::string& model) {
  SessionSettings settings;
  settings.layers = 2;
  settings.kv_heads = 2;
  settings.query_heads = 6;
  settings.model = model;
  settings.error_target = kTarget;
  return settings;
}

TEST(SharedPlannersTest, HowLandmarkIsBuiltCounts) {
  SharedPlanners planners(4);
  SessionSettings settings = Settings("a");
  settings.build = 1U << static_cast<uint32_t>(index::BuiltKind::kLandmark);
  const std::shared_ptr<LivePlanner> bounds = planners.Find(settings);
  settings.landmark.summary = index::LandmarkSummary::kMean;
  EXPECT_NE(planners.Find(settings), bounds);
  settings.landmark = {.block = 32};
  EXPECT_NE(planners.Find(settings), bounds);
  settings.landmark = {};
  EXPECT_EQ(planners.Find(settings), bounds);
}

TEST(SharedPlannersTest, TheLeastRecentlyOpenedGoes) {
  SharedPlanners planners(3);
  const std::weak_ptr<LivePlanner> a = planners.Find(Settings("a"));
  const std::weak_ptr<LivePlanner> b = planners.Find(Settings("b"));
  const std::weak_ptr<LivePlanner> c = planners.Find(Settings("c"));
  EXPECT_EQ(planners.Find(Settings("a")), a.lock());
  planners.Find(Settings("d"));
  EXPECT_FALSE(a.expired());
  EXPECT_TRUE(b.expired());
  EXPECT_FALSE(c.expired());
  EXPECT_EQ(planners.counts().kept, 3U);
  EXPECT_EQ(planners.counts().evicted, 1U);
  for (int i = 0; i < 100; ++i) planners.Find(Settings(std::to_string(i)));
  EXPECT_EQ(planners.counts().kept, 3U);
  EXPECT_EQ(planners.counts().evicted, 101U);
}

TEST(SharedPlannersTest, ThoseOfOpenSessionsGoLastAndStayWithThem) {
  SharedPlanners planners(2);
  const std::shared_ptr<LivePlanner> a = planners.Find(Settings("a"));
  for (int i = 0; i < 10; ++i) planners.Find(Settings(std::to_string(i)));
  EXPECT_EQ(planners.Find(Settings("a")), a);
  const std::shared_ptr<LivePlanner> b = planners.Find(Settings("b"));
  const std::shared_ptr<LivePlanner> c = planners.Find(Settings("c"));
  EXPECT_EQ(planners.counts().kept, 2U);
  EXPECT_NE(planners.Find(Settings("a")), a);  // it had to go; who has it keeps it
  EXPECT_EQ(a->audits(), 0U);
}

TEST(SharedPlannersTest, NoneToBeKeptNoneWithoutATargetAndNoneForALonelySession) {
  SharedPlanners none(0);
  EXPECT_NE(none.Find(Settings("a")), none.Find(Settings("a")));
  SharedPlanners planners(4);
  EXPECT_NE(planners.Find(Settings("")), planners.Find(Settings("")));
  SessionSettings settings = Settings("a");
  settings.own_plan = true;
  EXPECT_NE(planners.Find(settings), planners.Find(settings));
  settings.error_target = 0.0F;
  EXPECT_EQ(planners.Find(settings), nullptr);
  EXPECT_EQ(planners.counts().kept, 0U);
}

TEST(SharedPlannersTest, SessionsComeAndGoWhileAuditsTeach) {
  DaemonOptions options = Audited();
  options.planners_max = 2;
  Service service(options);
  std::vector<std::thread> clients;
  for (uint32_t c = 0; c < 3; ++c) {
    clients.emplace_back([&service, c] {
      for (uint32_t round = 0; round < 6; ++round) {
        const std::string model(1, static_cast<char>('a' + (c + round) % 3));
        const auto session = Open(service, RequestWithTarget(SmallShape(), kTarget, model));
        Fill(service, session, 1100);
        for (uint32_t i = 0; i < 8; ++i) ASSERT_TRUE(Ask(service, session, i).ok());
        EXPECT_EQ(Info(service, session).model(), model);
        proto::CloseSessionRequest close;
        *close.mutable_session() = session;
        EXPECT_TRUE(service.Call(close).ok());
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_LE(Counters(service)["planners"], 2U);
}

}  // namespace
}  // namespace kvseek::service
