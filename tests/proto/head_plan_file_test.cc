// What makes a good head plan; the file's text is tested with client/head_plan.h.
#include "proto/head_plan_file.h"

#include <gtest/gtest.h>

#include <limits>

#include "proto/status_code.h"

namespace kvseek::proto {
namespace {

HeadPlan Good() {
  HeadPlan plan;
  plan.set_version(kHeadPlanVersion);
  for (const auto& [layer, kv_head] : {std::pair(0, 1), std::pair(2, 0), std::pair(2, 1)}) {
    PlannedHead& head = *plan.add_heads();
    head.set_layer(static_cast<uint32_t>(layer));
    head.set_kv_head(static_cast<uint32_t>(kv_head));
    head.set_mode("state");
    head.set_index("ladder");
    head.set_candidates(1000);
  }
  return plan;
}

template <typename Spoil>
std::string Refused(const Spoil& spoil) {
  HeadPlan plan = Good();
  spoil(plan);
  const absl::Status status = CheckHeadPlan(plan, "plan.");
  EXPECT_EQ(status.ok() ? absl::StatusCode::kInvalidArgument : status.code(),
            absl::StatusCode::kInvalidArgument);
  return ErrorField(status);
}

TEST(HeadPlanFileTest, RefusalsNameTheField) {
  EXPECT_TRUE(CheckHeadPlan(Good()).ok());
  EXPECT_EQ(Refused([](HeadPlan& p) { p.clear_version(); }), "plan.version");
  EXPECT_EQ(Refused([](HeadPlan& p) { p.set_scan_bits(3); }), "plan.scan_bits");
  EXPECT_EQ(Refused([](HeadPlan& p) { p.set_error_target(-1.0); }), "plan.error_target");
  EXPECT_EQ(
      Refused([](HeadPlan& p) { p.set_error_target(std::numeric_limits<double>::infinity()); }),
      "plan.error_target");
  EXPECT_EQ(Refused([](HeadPlan& p) { p.mutable_heads(1)->set_mode("fast"); }),
            "plan.heads[1].mode");
  EXPECT_EQ(Refused([](HeadPlan& p) { p.mutable_heads(2)->clear_index(); }), "plan.heads[2].index");
  EXPECT_EQ(Refused([](HeadPlan& p) { p.mutable_heads(0)->set_candidates((1 << 20) + 1); }),
            "plan.heads[0].candidates");
  for (const float threshold : {0.5F, -1001.0F, std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_EQ(Refused([=](HeadPlan& p) { p.mutable_heads(1)->set_threshold(threshold); }),
              "plan.heads[1].threshold");
  }
  EXPECT_EQ(Refused([](HeadPlan& p) { p.mutable_heads(0)->set_k((1 << 16) + 1); }),
            "plan.heads[0].k");
  EXPECT_EQ(Refused([](HeadPlan& p) { p.mutable_heads(1)->set_layer(3); }), "plan.heads[2]");
  EXPECT_EQ(Refused([](HeadPlan& p) { p.mutable_heads(1)->set_kv_head(1); }), "plan.heads[2]");
}

TEST(HeadPlanFileTest, FitsAModelThatHasItsHeads) {
  EXPECT_TRUE(CheckHeadPlanFits(Good(), 3, 2).ok());
  EXPECT_EQ(ErrorField(CheckHeadPlanFits(Good(), 2, 2, "plan.")), "plan.heads[1].layer");
  EXPECT_EQ(ErrorField(CheckHeadPlanFits(Good(), 3, 1)), "heads[0].kv_head");
  EXPECT_TRUE(CheckHeadPlanFits(HeadPlan(), 0, 0).ok());
}

TEST(HeadPlanFileTest, NamesHaveTheirNumbers) {
  PlannedHead head;
  for (uint32_t i = 0; i < kHeadModeNames.size(); ++i) {
    head.set_mode(kHeadModeNames[i]);
    EXPECT_EQ(HeadModeNumber(head), i);
  }
  for (uint32_t i = 0; i < kIndexNames.size(); ++i) {
    head.set_index(kIndexNames[i]);
    EXPECT_EQ(IndexNumber(head), i);
  }
}

}  // namespace
}  // namespace kvseek::proto
