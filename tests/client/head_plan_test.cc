#include "client/head_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "tests/cli/test_files.h"

namespace kvseek {
namespace {

using ::testing::HasSubstr;

constexpr char kPlan[] = R"({"version": 1, "scan_bits": 1, "error_target": 0.1, "heads": [
  {"layer": 2, "kv_head": 1, "mode": "state", "index": "ladder", "candidates": 6889},
  {"layer": 15, "kv_head": 0, "mode": "local", "index": "exact"},
  {"layer": 15, "kv_head": 1, "mode": "rows", "index": "cluster", "candidates": 512, "k": 256,
   "threshold": -9.5}]})";

std::string With(const std::string& old_text, const std::string& new_text) {
  const std::string changed = absl::StrReplaceAll(kPlan, {{old_text, new_text}});
  EXPECT_NE(changed, kPlan) << old_text;
  return changed;
}

void ExpectRefused(const std::string& json, const std::string& named) {
  const auto plan = ParseHeadPlan(json);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument) << json;
  EXPECT_THAT(std::string(plan.status().message()), HasSubstr(named)) << json;
}

TEST(HeadPlanTest, ReadsWhatTheDocumentShows) {
  const auto plan = ParseHeadPlan(kPlan);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->scan_bits, 1U);
  EXPECT_EQ(plan->error_target, 0.1);
  ASSERT_EQ(plan->heads.size(), 3U);
  EXPECT_EQ(plan->heads[0], (PlannedHead{2, 1, HeadMode::kState, "ladder", 6889, 0}));
  EXPECT_EQ(plan->heads[1], (PlannedHead{15, 0, HeadMode::kLocal, "exact", 0, 0}));
  EXPECT_EQ(plan->heads[2], (PlannedHead{15, 1, HeadMode::kRows, "cluster", 512, 256, -9.5F}));
}

TEST(HeadPlanTest, RefusalsNameTheField) {
  ExpectRefused("", "not a head plan");
  ExpectRefused("[1]", "not a head plan");
  ExpectRefused("{", "not a head plan");
  ExpectRefused("{}", "version");
  ExpectRefused(With("\"version\": 1", "\"version\": 2"), "version: 2");
  ExpectRefused(With("\"scan_bits\": 1", "\"scan_bits\": 3"), "scan_bits");
  ExpectRefused(With("\"scan_bits\": 1", "\"scan_bits\": -1"), "scan_bits");
  ExpectRefused(With("0.1", "-0.1"), "error_target");
  ExpectRefused(With("0.1", "\"NaN\""), "error_target");
  ExpectRefused(With("\"local\"", "\"nowhere\""), "heads[1].mode");
  ExpectRefused(With("\"mode\": \"local\", ", ""), "heads[1].mode");
  ExpectRefused(With("\"cluster\"", "\"magic\""), "heads[2].index");
  ExpectRefused(With(", \"index\": \"exact\"", ""), "heads[1].index");
  ExpectRefused(With("6889", "1048577"), "heads[0].candidates");
  ExpectRefused(With("-9.5", "9.5"), "heads[2].threshold");
  ExpectRefused(With("6889", "\"many\""), "candidates");
  ExpectRefused(With("256", "65537"), "heads[2].k");
  ExpectRefused(With("\"layer\": 2,", "\"layer\": 15,"), "heads[1]");
  ExpectRefused(With("\"kv_head\": 0", "\"kv_head\": 1"), "heads[2]");
  ExpectRefused(With("\"layer\": 2,", "\"level\": 2,"), "level");
}

TEST(HeadPlanTest, RoundTripsAtRandom) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  const auto below = [&](uint32_t bound) { return static_cast<uint32_t>(random() % bound); };
  const char* const indexes[] = {"auto", "exact", "ladder", "landmark", "cluster", "graph"};
  const cli::TempDir dir;
  for (int i = 0; i < 50; ++i) {
    HeadPlan plan;
    plan.scan_bits = below(3);
    plan.error_target = std::uniform_real_distribution<double>(0.0, 1.0)(random);
    for (uint32_t layer = 0; layer < below(12); ++layer) {
      for (uint32_t head = below(3); head < 4; head += 1 + below(2)) {
        plan.heads.push_back({layer, head, static_cast<HeadMode>(below(4)), indexes[below(6)],
                              below((1U << 20) + 1), below((1U << 16) + 1)});
      }
    }
    ASSERT_TRUE(WriteHeadPlan(plan, dir.File("plan")).ok());
    const auto read = ReadHeadPlan(dir.File("plan"));
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(*read, plan);
  }
}

TEST(HeadPlanTest, WritesNothingThatItWouldNotRead) {
  HeadPlan plan;
  plan.heads = {{.layer = 1, .index = "magic"}};
  EXPECT_THAT(std::string(FormatHeadPlan(plan).status().message()), HasSubstr("heads[0].index"));
  plan.heads = {{.layer = 1}, {.layer = 0}};
  const cli::TempDir dir;
  EXPECT_THAT(std::string(WriteHeadPlan(plan, dir.File("plan")).message()), HasSubstr("heads[1]"));
  EXPECT_EQ(ReadHeadPlan(dir.File("plan")).status().code(), absl::StatusCode::kNotFound);
}

TEST(HeadPlanTest, FileErrorsNameTheFile) {
  const cli::TempDir dir;
  const auto missing = ReadHeadPlan(dir.File("none"));
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr(dir.File("none")));
  const auto bad = ReadHeadPlan(dir.Write("bad", With("\"local\"", "\"nowhere\"")));
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr(dir.File("bad")));
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr("heads[1].mode"));
  EXPECT_EQ(WriteHeadPlan({}, dir.File("no/such/folder")).code(), absl::StatusCode::kUnavailable);
}

TEST(HeadPlanTest, FillsADecodersModes) {
  const auto plan = ParseHeadPlan(kPlan);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const auto modes = HeadModesOf(*plan, 16, 2);
  ASSERT_TRUE(modes.ok()) << modes.status();
  ASSERT_EQ(modes->size(), 32U);
  for (size_t i = 0; i < modes->size(); ++i) {
    const HeadMode expected = i == 5    ? HeadMode::kState
                              : i == 30 ? HeadMode::kLocal
                              : i == 31 ? HeadMode::kRows
                                        : HeadMode::kAuto;
    EXPECT_EQ((*modes)[i], expected) << i;
  }
  const auto rows = HeadRowsOf(*plan, 16, 2, 128);
  ASSERT_TRUE(rows.ok()) << rows.status();
  for (size_t i = 0; i < rows->size(); ++i) EXPECT_EQ((*rows)[i], i == 31 ? 256U : 128U) << i;
  EXPECT_EQ(*HeadModesOf(PlanOfModes(2, *modes), 16, 2), *modes);
  EXPECT_THAT(std::string(HeadModesOf(*plan, 15, 2).status().message()),
              HasSubstr("heads[1].layer: 15"));
  EXPECT_THAT(std::string(HeadModesOf(*plan, 16, 1).status().message()),
              HasSubstr("heads[0].kv_head: 1"));
}

}  // namespace
}  // namespace kvseek
