// kvseek plan as a process, on recorded heads and on a made-up streaming one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "client/head_plan.h"
#include "tests/cli/run_program.h"

namespace kvseek::cli {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

std::string Data(const std::string& name) { return KVSEEK_SOURCE_DIR "/tests/data/" + name; }
std::string Recorded() {
  return absl::StrCat(" --kv '", Data("code8.layer15.kv1.safetensors"), "' --kv '",
                      Data("code8.layer20.kv0.safetensors"), "' --queries '",
                      Data("code8.queries.safetensors"), "'");
}

TEST(PlanTest, MeetsItsTargetNearlyAsCheaplyAsTheBestFixedSetting) {
  const TempDir dir;
  const Ran ran = RunKvseek("plan" + Recorded() + " --audits 96 --steps 24 --format json --out '" +
                            dir.File("plan.json") + "'");
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  const json result = json::parse(ran.out);
  ASSERT_EQ(result.at("heads").size(), 2U);
  const auto plan = ReadHeadPlan(dir.File("plan.json"));
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->heads.size(), 2U);
  EXPECT_EQ(plan->scan_bits, result.at("scan_bits"));
  EXPECT_EQ(plan->error_target, 0.1);
  for (size_t i = 0; i < 2; ++i) {
    const json& head = result.at("heads")[i];
    const json& planned = head.at("planned");
    EXPECT_LE(planned.at("output_error"), 0.1);
    EXPECT_LE(head.at("best_fixed").at("output_error"), 0.1);
    EXPECT_LE(head.at("bytes_ratio"), 1.2);
    EXPECT_NEAR(head.at("bytes_ratio").get<double>(),
                planned.at("bytes_read").get<double>() /
                    head.at("best_fixed").at("bytes_read").get<double>(),
                1e-9);
    EXPECT_LT(planned.at("bytes_read"), 7680 * 512);  // less than exact reads
    EXPECT_GT(planned.at("recall_at_100"), 0.8);
    EXPECT_LE(planned.at("recall_at_100"), 1.0);
    EXPECT_LE(head.at("audits").at("output_error"), 0.1);
    EXPECT_EQ(head.at("audits").at("count"), 96);
    EXPECT_GT(head.at("audits").at("trials"), 96);
    EXPECT_FALSE(head.at("streaming"));
    EXPECT_GT(head.at("far_mass"), 0.05);
    const PlannedHead& written = plan->heads[i];
    EXPECT_EQ(written.layer, i == 0 ? 15U : 20U);
    EXPECT_EQ(written.kv_head, i == 0 ? 1U : 0U);
    EXPECT_EQ(written.mode, HeadMode::kAuto);
    EXPECT_EQ(written.index, planned.at("index"));
    EXPECT_EQ(written.candidates, planned.at("candidates"));
  }
}

TEST(PlanTest, AsksForExactWhereNothingElseIsGoodEnough) {
  const Ran ran = RunKvseek("plan" + Recorded() +
                            " --index landmark --target-error 0.0001 --audits 40 --steps 4"
                            " --format json");
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  for (const json& head : json::parse(ran.out).at("heads")) {
    EXPECT_EQ(head.at("planned").at("index"), "exact");
    EXPECT_EQ(head.at("planned").at("candidates"), 0);
    EXPECT_EQ(head.at("planned").at("output_error"), 0.0);
    EXPECT_EQ(head.at("planned").at("bytes_read"), 7680 * 512);
  }
}

TEST(PlanTest, PrintsATable) {
  const Ran ran = RunKvseek("plan" + Recorded() + " --scan-bits 2 --audits 24 --steps 4");
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  EXPECT_THAT(ran.out, HasSubstr("best fixed"));
  EXPECT_THAT(ran.out, HasSubstr("ladder 2 bit, "));
  EXPECT_THAT(ran.out, HasSubstr("Sessions with 2 scan bits"));
  EXPECT_THAT(RunKvseek("plan --help").out, HasSubstr("Example"));
}

/// A head whose queries look at the first token and at tokens less than 32 back only, their keys
/// turning with the position.
std::string StreamingHead(const TempDir& dir, bool with_prefill) {
  constexpr uint64_t kTokens = 1400;
  constexpr uint64_t kDim = 32;
  const auto direction = [](uint64_t position, float scale) {
    std::vector<float> row(kDim, 0.0F);
    row[position / 32 % (kDim - 1)] = scale;
    row[(position / 32 + 1) % (kDim - 1)] = scale;
    return row;
  };
  std::vector<float> keys;
  std::vector<float> queries;
  std::string positions;
  uint64_t samples = 0;
  for (uint64_t t = 0; t < kTokens; ++t) {
    std::vector<float> key = direction(t, 6.0F);
    if (t == 0) key[kDim - 1] = 12.0F;
    keys.insert(keys.end(), key.begin(), key.end());
    if (t % 10 != 9) continue;
    std::vector<float> query = direction(t, 6.0F);
    // Keys of directions that come round again are pushed down by the sink's share.
    query[kDim - 1] = 14.0F;
    queries.insert(queries.end(), query.begin(), query.end());
    positions += LittleEndian64(t);
    ++samples;
  }
  const TensorData prefill = MakeTensor("layer3.kv0.q_prefill", "F32", {samples, 1, kDim}, queries);
  std::vector<TensorData> tensors = {
      MakeTensor("layer3.kv0.q_decode", "F32", {2, 1, kDim},
                 std::vector<float>(queries.end() - 2 * kDim, queries.end()))};
  if (with_prefill) {
    tensors.push_back(prefill);
    tensors.push_back({"prefill_positions", "I64", {samples}, positions});
  }
  const std::string kv = dir.Write(
      "layer3.kv0.safetensors",
      SafeTensorsFile({MakeTensor("k", "BF16", {kTokens, kDim}, keys),
                       MakeTensor("v", "BF16", {kTokens, 8}, RandomValues(kTokens * 8, 2))}));
  return absl::StrCat(" --kv '", kv, "' --queries '",
                      dir.Write("queries", SafeTensorsFile(tensors)), "'");
}

TEST(PlanTest, FindsAStreamingHead) {
  const TempDir dir;
  const std::string head = StreamingHead(dir, true);
  const Ran ran = RunKvseek("plan" + head + " --recent 64 --sink 4 --format json --out '" +
                            dir.File("plan") + "'");
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  const json result = json::parse(ran.out).at("heads").at(0);
  EXPECT_TRUE(result.at("streaming"));
  EXPECT_LT(result.at("far_mass"), 0.05);
  const auto plan = ReadHeadPlan(dir.File("plan"));
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->heads.size(), 1U);
  EXPECT_EQ(plan->heads[0].layer, 3U);
  EXPECT_EQ(plan->heads[0].kv_head, 0U);
  EXPECT_EQ(plan->heads[0].mode, HeadMode::kLocal);
  // With the sink counted as far it is none.
  const Ran without = RunKvseek("plan" + head + " --recent 64 --sink 0 --format json");
  ASSERT_EQ(without.exit_code, 0) << without.err;
  EXPECT_FALSE(json::parse(without.out).at("heads").at(0).at("streaming"));
}

TEST(PlanTest, RefusesWhatItCannotPlan) {
  const TempDir dir;
  const std::string untrained = StreamingHead(dir, false);
  const Ran no_queries = RunKvseek("plan" + untrained);
  EXPECT_EQ(no_queries.exit_code, 1);
  EXPECT_THAT(no_queries.err, HasSubstr("layer3.kv0.q_prefill"));
  const Ran too_late = RunKvseek("plan" + Recorded() + " --recent 9000");
  EXPECT_EQ(too_late.exit_code, 1);
  EXPECT_THAT(too_late.err, HasSubstr("--recent"));
  const Ran nowhere =
      RunKvseek("plan" + Recorded() + " --audits 9 --steps 1 --index ladder --out '" +
                dir.File("no/such/folder") + "'");
  EXPECT_EQ(nowhere.exit_code, 1);
  EXPECT_THAT(nowhere.err, HasSubstr("no/such/folder"));
  EXPECT_EQ(RunKvseek("plan" + Recorded() + " --target-error 0").exit_code, 2);
  EXPECT_EQ(RunKvseek("plan" + Recorded() + " --index magic").exit_code, 2);
  EXPECT_EQ(RunKvseek("plan" + Recorded() + " --head layer15.kv1").exit_code, 2);
  EXPECT_EQ(RunKvseek("plan").exit_code, 2);
}

}  // namespace
}  // namespace kvseek::cli
