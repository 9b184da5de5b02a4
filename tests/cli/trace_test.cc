#include "cli/trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/cli/test_files.h"

namespace kvseek::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kData[] = KVSEEK_SOURCE_DIR "/tests/data/";

/// Writes a head of 5 tokens, dims 8 and 16, and 3 steps of 2 query heads; a test spoils one
/// tensor.
struct HeadFiles {
  TensorData k = MakeTensor("k", "BF16", {5, 8}, RandomValues(40, 1));
  TensorData v = MakeTensor("v", "BF16", {5, 16}, RandomValues(80, 2));
  TensorData q = MakeTensor("h.q_decode", "F32", {3, 2, 8}, RandomValues(48, 3));
  std::vector<TensorData> prefill = {};

  absl::StatusOr<HeadTrace> Load() const {
    const TempDir dir;
    std::vector<TensorData> queries = prefill;
    queries.push_back(q);
    return LoadHeadTrace(dir.Write("kv", SafeTensorsFile({k, v})),
                         dir.Write("q", SafeTensorsFile(queries)), "h");
  }
  void ExpectRefused(const std::string& tensor, const std::string& why) const {
    const absl::Status status = Load().status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << why;
    EXPECT_THAT(std::string(status.message()), HasSubstr("\"" + tensor + "\""));
    EXPECT_THAT(std::string(status.message()), HasSubstr(why));
  }
};

TEST(TraceTest, LoadsAHead) {
  const auto trace = HeadFiles().Load();
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->tokens, 5);
  EXPECT_EQ(trace->key_dim, 8);
  EXPECT_EQ(trace->value_dim, 16);
  EXPECT_EQ(trace->steps, 3);
  EXPECT_EQ(trace->group, 2);
  EXPECT_FALSE(trace->rounded);
  EXPECT_FLOAT_EQ(trace->softmax_scale, 1.0F / std::sqrt(8.0F));
  EXPECT_EQ(trace->StepQueries(2), trace->queries.data() + 32);
  EXPECT_EQ(trace->queries, RandomValues(48, 3));
  EXPECT_EQ(trace->keys[7], kernels::FloatToBf16(RandomValues(40, 1)[7]));
}

TEST(TraceTest, RoundsFp32ToBf16AndKeepsFp16) {
  HeadFiles files;
  files.k = MakeTensor("k", "F32", {5, 8}, RandomValues(40, 1));
  files.v = MakeTensor("v", "F32", {5, 16}, RandomValues(80, 2));
  auto trace = files.Load();
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_TRUE(trace->rounded);
  EXPECT_EQ(trace->dtype, kernels::DType::kBf16);
  EXPECT_EQ(trace->values[9], kernels::FloatToBf16(RandomValues(80, 2)[9]));
  files.k = MakeTensor("k", "F16", {5, 8}, RandomValues(40, 1));
  files.v = MakeTensor("v", "F16", {5, 16}, RandomValues(80, 2));
  trace = files.Load();
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_FALSE(trace->rounded);
  EXPECT_EQ(trace->dtype, kernels::DType::kFp16);
  EXPECT_EQ(trace->keys[3], kernels::FloatToFp16(RandomValues(40, 1)[3]));
}

TEST(TraceTest, RefusesWhatCannotBeStored) {
  HeadFiles files;
  files.k.dtype = "I16";
  files.ExpectRefused("k", "dtype I16");
  files = {};
  files.k.shape = {40};
  files.ExpectRefused("k", "[tokens, head_dim]");
  files = {};
  files.k = MakeTensor("k", "BF16", {0, 8}, {});
  files.ExpectRefused("k", "is empty");
  files = {};
  files.k.shape = {10, 4};
  files.ExpectRefused("k", "multiple of 8");
  files = {};
  files.v.shape = {10, 8};
  files.ExpectRefused("v", "10 tokens, but k has 5");
  files = {};
  files.v.dtype = "F16";
  files.ExpectRefused("v", "dtype differs");
  files = {};
  files.q.shape = {3, 16};
  files.ExpectRefused("h.q_decode", "[steps, group, head_dim]");
  files = {};
  files.q.shape = {1, 3, 16};
  files.ExpectRefused("h.q_decode", "head_dim 16, but k has 8");
  files = {};
  files.q = MakeTensor("h.q_decode", "F32", {1, 65, 8}, RandomValues(520, 3));
  files.ExpectRefused("h.q_decode", "group 65");
  files = {};
  std::vector<float> values = RandomValues(80, 2);
  values[11] = std::numeric_limits<float>::quiet_NaN();
  files.v = MakeTensor("v", "BF16", {5, 16}, values);
  files.ExpectRefused("v", "element 11");
  files = {};
  values[11] = 1e30F;
  files.v = MakeTensor("v", "BF16", {5, 16}, values);
  files.ExpectRefused("v", "element 11");
}

TensorData Positions(const std::vector<int64_t>& positions) {
  TensorData tensor{"prefill_positions", "I64", {positions.size()}, {}};
  for (const int64_t position : positions) {
    tensor.bytes += LittleEndian64(static_cast<uint64_t>(position));
  }
  return tensor;
}

TEST(TraceTest, LoadsPrefillQueries) {
  HeadFiles files;
  EXPECT_TRUE(files.Load()->prefill_positions.empty());
  files.prefill = {MakeTensor("h.q_prefill", "F32", {2, 2, 8}, RandomValues(32, 4)),
                   Positions({0, 4})};
  const auto trace = files.Load();
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->prefill_queries, RandomValues(32, 4));
  EXPECT_THAT(trace->prefill_positions, ElementsAre(0, 4));
}

TEST(TraceTest, RefusesPrefillQueriesThatCannotBe) {
  HeadFiles files;
  const TensorData q = MakeTensor("h.q_prefill", "F32", {2, 2, 8}, RandomValues(32, 4));
  files.prefill = {q};
  EXPECT_EQ(files.Load().status().code(), absl::StatusCode::kNotFound);
  files.prefill = {q, Positions({0, 1, 2})};
  files.ExpectRefused("prefill_positions", "not I64 [2]");
  files.prefill = {q, Positions({0, 5})};
  files.ExpectRefused("prefill_positions", "position 5 is not stored");
  files.prefill = {q, Positions({-1, 4})};
  files.ExpectRefused("prefill_positions", "position -1 is not stored");
  files.prefill = {MakeTensor("h.q_prefill", "F32", {4, 1, 8}, RandomValues(32, 4)),
                   Positions({0, 1, 2, 3})};
  files.ExpectRefused("h.q_prefill", "group 1, but decode has 2");
}

TEST(TraceTest, NamesMissingTensors) {
  HeadFiles files;
  files.v.name = "w";
  EXPECT_EQ(files.Load().status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(files.Load().status().message()), HasSubstr("\"v\""));
  files = {};
  files.q.name = "other.q_decode";
  EXPECT_THAT(std::string(files.Load().status().message()), HasSubstr("\"h.q_decode\""));
}

TEST(TraceTest, ListsHeads) {
  const auto heads = ListHeads(std::string(kData) + "code8.queries.safetensors");
  ASSERT_TRUE(heads.ok()) << heads.status();
  EXPECT_THAT(*heads, ElementsAre("layer15.kv1", "layer20.kv0"));
}

TEST(TraceTest, SpreadsSteps) {
  EXPECT_THAT(SpreadSteps(8, 4), ElementsAre(0, 2, 4, 6));
  EXPECT_THAT(SpreadSteps(5, 3), ElementsAre(0, 1, 3));
  EXPECT_THAT(SpreadSteps(3, 0), ElementsAre(0, 1, 2));
  EXPECT_THAT(SpreadSteps(3, 9), ElementsAre(0, 1, 2));
}

TEST(TraceTest, StoresEveryTokenOnce) {
  HeadFiles files;
  const size_t tokens = 2 * index::kSegmentTokens + index::kTailChunkTokens + 5;
  files.k = MakeTensor("k", "BF16", {tokens, 8}, RandomValues(tokens * 8, 1));
  files.v = MakeTensor("v", "BF16", {tokens, 16}, RandomValues(tokens * 16, 2));
  const auto trace = files.Load();
  ASSERT_TRUE(trace.ok()) << trace.status();
  const StoredHead head(*trace, 2);
  const index::KvView view = head.view();
  ASSERT_EQ(view.Tokens(), static_cast<int64_t>(tokens));
  ASSERT_EQ(view.segments.size(), 2U);
  ASSERT_EQ(view.tail.size(), 2U);
  EXPECT_EQ(view.tail_tokens, index::kTailChunkTokens + 5);
  EXPECT_EQ(view.segments[1]->keys()[8], trace->keys[(index::kSegmentTokens + 1) * 8]);
  EXPECT_EQ(view.tail[1].values[16], trace->values[(tokens - 4) * 16]);
}

}  // namespace
}  // namespace kvseek::cli
