// Plans that a daemon makes from its audits: on recorded heads, and where there is nothing to plan.
#include "service/live_planner.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <thread>

#include "cli/trace.h"
#include "tests/service/audited_service.h"

namespace kvseek::service {
namespace {

/// Both recorded heads as one layer of a session.
class RecordedHeads {
 public:
  RecordedHeads() {
    for (const char* name : {"layer15.kv1", "layer20.kv0"}) {
      const std::string folder = KVSEEK_SOURCE_DIR "/tests/data/code8.";
      auto trace =
          cli::LoadHeadTrace(folder + name + ".safetensors", folder + "queries.safetensors", name);
      EXPECT_TRUE(trace.ok()) << trace.status();
      heads_.push_back(*std::move(trace));
    }
    shape_.set_layers(1);
    shape_.set_kv_heads(2);
    shape_.set_query_heads(12);
    shape_.set_key_dim(128);
    shape_.set_value_dim(128);
    shape_.set_dtype(proto::DTYPE_BF16);
  }
  const proto::ModelShape& shape() const { return shape_; }
  int steps() const { return heads_[0].steps; }

  void Fill(Service& service, const proto::SessionRef& session) const {
    Rows rows;
    const auto tokens = static_cast<size_t>(heads_[0].tokens);
    for (size_t t = 0; t < tokens; ++t) {
      for (const cli::HeadTrace& head : heads_) {
        const auto row = static_cast<ptrdiff_t>(t * 128);
        rows.keys.insert(rows.keys.end(), head.keys.begin() + row, head.keys.begin() + row + 128);
        rows.values.insert(rows.values.end(), head.values.begin() + row,
                           head.values.begin() + row + 128);
      }
    }
    const auto held = AppendRows(service, session, 0, 0, tokens, rows);
    ASSERT_TRUE(held.ok()) << held.status;
  }
  Answer<proto::AttendResponse> Ask(Service& service, const proto::SessionRef& session, int step,
                                    proto::IndexKind index) const {
    proto::AttendRequest request;
    proto::QueryItem& item = *request.add_items();
    *item.mutable_session() = session;
    item.set_tokens(1);
    request.set_query_dtype(proto::DTYPE_FP32);
    request.mutable_options()->set_index(index);
    std::vector<float> queries;
    for (const cli::HeadTrace& head : heads_) {
      queries.insert(queries.end(), head.StepQueries(step), head.StepQueries(step) + 6 * 128);
    }
    return service.Call(request, Tensors().Add(queries));
  }

 private:
  std::vector<cli::HeadTrace> heads_;
  proto::ModelShape shape_;
};

/// Mean over the query heads of KV head `head` of ||a - b|| / ||b||.
double Error(const std::vector<float>& a, const std::vector<float>& b, size_t head) {
  double sum = 0.0;
  for (size_t h = 6 * head; h < 6 * head + 6; ++h) {
    double difference = 0.0;
    double norm = 0.0;
    for (size_t d = h * 128; d < (h + 1) * 128; ++d) {
      difference += (double{a[d]} - double{b[d]}) * (double{a[d]} - double{b[d]});
      norm += double{b[d]} * double{b[d]};
    }
    sum += std::sqrt(difference / norm);
  }
  return sum / 6.0;
}

TEST(LivePlannerTest, MeetsItsTargetOnRecordedHeads) {
  constexpr float kTarget = 0.1F;
  const RecordedHeads heads;
  Service service(Audited());
  const proto::SessionRef session = Open(service, RequestWithTarget(heads.shape(), kTarget));
  heads.Fill(service, session);
  EXPECT_EQ(Info(service, session).plan().heads_size(), 0);
  EXPECT_EQ(Info(service, session).error_target(), kTarget);
  uint64_t offered = 0;
  for (int step = 0; step < heads.steps(); step += 2) {
    ASSERT_TRUE(heads.Ask(service, session, step, proto::INDEX_AUTO).ok());
    if (++offered % 8 == 0) WaitForAudits(service, offered);  // as slowly as a decoder asks
  }
  WaitForAudits(service, offered);
  const proto::SessionInfo info = Info(service, session);
  EXPECT_EQ(info.plan().error_target(), double{kTarget});
  EXPECT_EQ(info.plan().scan_bits(), 2U);
  ASSERT_EQ(info.plan().heads_size(), 2);
  for (const proto::PlannedHead& head : info.plan().heads()) {
    EXPECT_EQ(head.index(), "ladder");
    EXPECT_GE(head.candidates(), 64U);
    EXPECT_LT(head.candidates(), 2048U);  // the default is 4096
  }
  EXPECT_GE(Counters(service)["audit_plan_changes"], 2U);
  EXPECT_GT(Counters(service)["audit_trials"], offered / 2);

  // The steps between those that were audited.
  double errors[2] = {0.0, 0.0};
  int asked = 0;
  for (int step = 1; step < heads.steps(); step += 4, ++asked) {
    auto exact = heads.Ask(service, session, step, proto::INDEX_EXACT);
    auto planned = heads.Ask(service, session, step, proto::INDEX_AUTO);
    ASSERT_TRUE(exact.ok() && planned.ok());
    const auto truth = exact.tensors.Take<float>(size_t{12} * 128);
    const auto out = planned.tensors.Take<float>(size_t{12} * 128);
    for (size_t head = 0; head < 2; ++head) {
      EXPECT_EQ(planned.message.reports(static_cast<int>(head)).index(), proto::INDEX_LADDER);
      errors[head] += Error(out, truth, head);
    }
  }
  // The planner's bound holds in about 19 of 20 cases, and these are other steps.
  for (const double error : errors) EXPECT_LE(error / asked, 1.15 * double{kTarget});
}

/// A session of random rows, 3000 tokens, and questions about it.
class SmallLivePlannerTest : public testing::Test {
 protected:
  static constexpr size_t kTokens = 3000;

  void Start(float target) {
    session_ = Open(service_, RequestWithTarget(SmallShape(), target));
    const auto rows = RandomRows(5, SmallShape(), kTokens);
    ASSERT_TRUE(AppendRows(service_, session_, 0, 0, kTokens, rows).ok());
  }
  template <typename Request>
  void Ask(int requests) {
    Request request;
    proto::QueryItem& item = *request.add_items();
    *item.mutable_session() = session_;
    item.set_tokens(1);
    request.set_query_dtype(proto::DTYPE_FP32);
    for (int i = 0; i < requests; ++i) {
      const auto queries = reference::RandomFloats(static_cast<uint32_t>(i), 6 * 16, 1.5F);
      ASSERT_TRUE(service_.Call(request, Tensors().Add(queries)).ok());
      if (++offered_ % 8 == 0) WaitForAudits(service_, offered_);
    }
    WaitForAudits(service_, offered_);
  }

  Service service_{Audited()};
  proto::SessionRef session_;
  uint64_t offered_ = 0;
};

TEST_F(SmallLivePlannerTest, ChoosesExactWhereNothingElseIsGoodEnough) {
  Start(1e-5F);
  Ask<proto::AttendRequest>(200);
  const proto::HeadPlan plan = Info(service_, session_).plan();
  ASSERT_EQ(plan.heads_size(), 2);
  for (const proto::PlannedHead& head : plan.heads()) EXPECT_EQ(head.index(), "exact");
}

TEST_F(SmallLivePlannerTest, LearnsFromTopKAndForksInherit) {
  Start(0.5F);
  Ask<proto::TopKRequest>(120);
  const proto::HeadPlan plan = Info(service_, session_).plan();
  ASSERT_EQ(plan.heads_size(), 2);
  EXPECT_EQ(Counters(service_)["audit_heads"], 0U);  // only answers to Attend are counted
  proto::ForkRequest fork;
  *fork.mutable_session() = session_;
  const auto forked = service_.Call(fork);
  ASSERT_TRUE(forked.ok()) << forked.status;
  const proto::SessionInfo info = Info(service_, forked.message.session());
  EXPECT_EQ(info.plan().SerializeAsString(), plan.SerializeAsString());
  EXPECT_EQ(info.error_target(), 0.5F);
}

TEST_F(SmallLivePlannerTest, GivesItsMemoryBack) {
  const uint64_t before = service_.budget().used_bytes();
  Start(0.5F);
  const uint64_t filled = service_.budget().used_bytes();
  Ask<proto::AttendRequest>(16);
  EXPECT_GT(service_.budget().used_bytes(), filled);
  EXPECT_LT(service_.budget().used_bytes(), filled + 2 * 8192);
  proto::CloseSessionRequest close;
  *close.mutable_session() = session_;
  ASSERT_TRUE(service_.Call(close).ok());
  EXPECT_EQ(service_.budget().used_bytes(), before);
}

/// Learn by itself, on the state of a session without a target.
class LearnTest : public SmallLivePlannerTest {
 protected:
  void SetUp() override {
    Start(0.0F);
    state_ = service_.store().List()[0]->State(0);
  }
  LivePlanner::Learned Learn(LivePlanner& planner, int64_t end, uint32_t seed) {
    const std::vector<float> queries = reference::RandomFloats(seed, 3 * 16, 1.5F);
    const index::SearchQuery query{queries.data(), 3, 0, end};
    const index::SearchAudit audit(state_->View(1), query, scratch_);
    return planner.Learn({0, 1, state_.get(), query, {}, &audit}, budget_, scratch_);
  }
  /// Until the setting changes; how many audits that took.
  int LearnUntilChanged(LivePlanner& planner, int64_t end) {
    for (int audits = 1; audits <= 400; ++audits) {
      if (Learn(planner, end, static_cast<uint32_t>(audits)).changed) return audits;
    }
    return 0;
  }

  std::shared_ptr<const LayerState> state_;
  MemoryBudget budget_{1 << 20, std::chrono::milliseconds(1)};
  index::Scratch scratch_;
};

TEST_F(LearnTest, BelievesNothingBeforeEnoughAudits) {
  LivePlanner planner(1, 2, 0.5F, 0);
  const int audits = LearnUntilChanged(planner, kTokens);
  EXPECT_GE(audits, index::PlannerOptions().audits_min);
  EXPECT_EQ(planner.audits(), static_cast<uint64_t>(audits));
  EXPECT_EQ(planner.heads(), 1U);
  EXPECT_EQ(planner.Get(0, 0, kTokens), HeadSetting());
  EXPECT_EQ(planner.Get(0, 1, kTokens).index, proto::INDEX_LADDER);
  EXPECT_GE(planner.Get(0, 1, kTokens).candidates, 64U);
}

TEST_F(LearnTest, EachOctaveOfTheRangeHasItsOwnPlanner) {
  constexpr int64_t kShort = 1200;  // below 2048, and kTokens is not
  LivePlanner planner(1, 2, 0.5F, 0);
  ASSERT_GT(LearnUntilChanged(planner, kShort), 0);
  const HeadSetting shorter = planner.Get(0, 1, kShort);
  EXPECT_EQ(planner.Get(0, 1, 2047), shorter);
  // Until the longer one has chosen, what the shorter one chose counts.
  for (uint32_t i = 0; i + 1 < 8; ++i) {
    EXPECT_FALSE(Learn(planner, kTokens, i).changed);
    EXPECT_EQ(planner.Get(0, 1, kTokens), shorter);
  }
  EXPECT_EQ(planner.heads(), 2U);
  LivePlanner alone(1, 2, 0.5F, 0);
  for (uint32_t i = 0; i < 200; ++i) {
    Learn(planner, kTokens, i);
    Learn(alone, kTokens, i);
  }
  // The other seven audits are the same, so the longer one believes what it would by itself.
  EXPECT_NE(planner.Get(0, 1, kTokens), HeadSetting());
  EXPECT_NEAR(static_cast<double>(planner.Get(0, 1, kTokens).candidates),
              static_cast<double>(alone.Get(0, 1, kTokens).candidates),
              0.2 * static_cast<double>(alone.Get(0, 1, kTokens).candidates));
  EXPECT_EQ(planner.Get(0, 1, kShort), shorter);
  EXPECT_EQ(planner.Get(0, 1, 4096), planner.Get(0, 1, kTokens));  // the nearest shorter
}

TEST_F(LearnTest, AShorterRangeTakesTheNearestLongerOctave) {
  LivePlanner planner(1, 2, 0.5F, 0);
  ASSERT_GT(LearnUntilChanged(planner, kTokens), 0);
  EXPECT_EQ(planner.Get(0, 1, 10), planner.Get(0, 1, kTokens));
  EXPECT_EQ(planner.Get(0, 1, int64_t{1} << 40), planner.Get(0, 1, kTokens));
}

TEST_F(LearnTest, IndexesThatAreNotBuiltYetAreNotTried) {
  LivePlanner planner(1, 2, 0.5F, 1U << static_cast<uint32_t>(index::BuiltKind::kCluster));
  EXPECT_EQ(Learn(planner, kTokens, 1).trials, 1);  // the ladder's
}

TEST_F(LearnTest, WithoutMemoryNothingIsPlanned) {
  for (const uint64_t left : {100, 1000}) {  // for no table, for no planner
    auto taken = budget_.Reserve(budget_.limit_bytes() - left, "");
    ASSERT_TRUE(taken.ok());
    LivePlanner planner(1, 2, 0.5F, 0);
    EXPECT_EQ(Learn(planner, kTokens, 1).trials, 0);
    EXPECT_EQ(planner.audits(), 0U);
    EXPECT_EQ(planner.Get(0, 1, kTokens), HeadSetting());
  }
}

TEST_F(LearnTest, SettingsAreReadWhileItLearns) {
  LivePlanner planner(1, 2, 0.5F, 0);
  std::atomic<bool> done{false};
  std::thread reader([&] {
    while (!done.load()) {
      for (const int64_t range : {1200, 3000, 100000}) {
        const HeadSetting setting = planner.Get(0, 1, range);
        EXPECT_TRUE(setting == HeadSetting() || setting.index == proto::INDEX_EXACT ||
                    setting.candidates >= 64U);
      }
    }
  });
  EXPECT_GT(LearnUntilChanged(planner, kTokens), 0);
  EXPECT_GT(LearnUntilChanged(planner, 1200), 0);
  done = true;
  reader.join();
}

}  // namespace
}  // namespace kvseek::service
