// SparseDecoder against full attention in double precision: real daemons, real kernels, tokens
// leaving the steady zone all the time. Needs a GPU.
#include "client/sparse_decoder.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "tests/client/decoder/decoder_fixture.h"

namespace kvseek::test {
namespace {

/// Of bf16 and fp16: an output is rounded once, at the end.
constexpr double kBf16 = 1.0 / 256.0 + 1e-3;
constexpr double kFp16 = 1.0 / 2048.0 + 1e-3;

constexpr std::chrono::seconds kFlush{20};

struct Setting {
  const char* name;
  HeadMode mode;
  uint32_t query_tokens;
  uint32_t daemons;
  uint32_t key_dim;
  uint32_t value_dim;
  uint32_t group;
  DType dtype;
};

std::ostream& operator<<(std::ostream& out, const Setting& setting) { return out << setting.name; }

class SparseDecoderTest : public DecoderTest {
 protected:
  void StartDaemons(uint32_t count) {
    for (uint32_t d = 0; d < count; ++d) {
      daemons_.push_back(
          std::make_unique<DaemonChild>(directory_.path() + "/" + std::to_string(d)));
      addresses_.push_back(daemons_.back()->address());
    }
  }
  std::vector<std::unique_ptr<DaemonChild>> daemons_;
  std::vector<std::string> addresses_;
};

class EqualsFullAttentionTest : public SparseDecoderTest,
                                public testing::WithParamInterface<Setting> {};

TEST_P(EqualsFullAttentionTest, OverManySteps) {
  const Setting& setting = GetParam();
  options_.shape.key_dim = setting.key_dim;
  options_.shape.value_dim = setting.value_dim;
  options_.shape.query_heads = options_.shape.kv_heads * setting.group;
  options_.shape.dtype = setting.dtype;
  options_.query_tokens_max = setting.query_tokens;
  options_.cache_rows = options_.rows * setting.query_tokens + 32;
  const uint32_t kv_heads = options_.shape.kv_heads;
  options_.plan =
      PlanOfModes(kv_heads, std::vector<HeadMode>(options_.shape.layers * kv_heads, setting.mode));
  StartDaemons(setting.daemons);
  Create(addresses_);
  // A prompt, a long one, and a sequence that starts with nothing.
  std::vector<Sequence> sequences{Open(), Open(), Open()};
  ASSERT_TRUE(Prefill(sequences[0], 300).ok());
  ASSERT_TRUE(Prefill(sequences[1], 700).ok());
  const double allowed = setting.dtype == DType::kBf16 ? kBf16 : kFp16;
  const int steps = 256 / static_cast<int>(setting.query_tokens);
  for (int step = 0; step < steps; ++step) {
    std::vector<Sequence*> batch{&sequences[0], &sequences[2]};
    if (step % 3 != 0) batch.push_back(&sequences[1]);
    ASSERT_LE(Step(batch, setting.query_tokens), allowed) << "step " << step << step_status_;
  }
  ASSERT_TRUE(decoder_->Flush(kFlush).ok());
  const DecoderStats stats = decoder_->stats();
  EXPECT_EQ(stats.misses, 0U);
  EXPECT_EQ(stats.layers, 2U * steps);
  EXPECT_GE(stats.blocks_sent, 2 * (steps / options_.block_tokens - 2));
  if (setting.mode == HeadMode::kRows) {
    EXPECT_GT(stats.rows_asked, 10000U);
    EXPECT_GT(stats.rows_cached, 0U);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Settings, EqualsFullAttentionTest,
    testing::Values(
        Setting{"state", HeadMode::kState, 1, 1, 64, 64, 3, DType::kBf16},
        Setting{"rows", HeadMode::kRows, 1, 1, 64, 64, 3, DType::kBf16},
        Setting{"chosen", HeadMode::kAuto, 1, 1, 128, 128, 4, DType::kBf16},
        Setting{"state_of_two_daemons", HeadMode::kState, 1, 2, 96, 64, 7, DType::kFp16},
        Setting{"rows_of_two_daemons", HeadMode::kRows, 1, 2, 128, 128, 1, DType::kFp16},
        Setting{"speculative_state", HeadMode::kState, 3, 1, 64, 128, 8, DType::kBf16},
        Setting{"speculative_rows", HeadMode::kRows, 4, 2, 64, 64, 2, DType::kBf16}),
    testing::PrintToStringParamName());

TEST_F(SparseDecoderTest, HeadsInDifferentModes) {
  // Head 0 of layer 0 is local: it sees its steady zone alone.
  options_.plan =
      PlanOfModes(2, {HeadMode::kState, HeadMode::kRows, HeadMode::kRows, HeadMode::kAuto});
  options_.plan.heads[1].k = options_.rows / 2 + 1;  // the same layer's head 0 has another number
  options_.plan.heads[2].k = options_.rows + 5;
  options_.plan.heads[2].index = "exact";
  options_.plan.heads[3].index = "ladder";
  options_.plan.heads[3].candidates = 1000;
  options_.cache_rows = options_.rows + 40;
  StartDaemons(1);
  Create(addresses_);
  Sequence sequence = Open();
  ASSERT_TRUE(Prefill(sequence, 500).ok());
  for (int step = 0; step < 100; ++step) {
    ASSERT_LE(Step({&sequence}, 1), kBf16) << "step " << step << step_status_;
  }
}

TEST_F(SparseDecoderTest, LocalHeadsSeeTheSteadyZone) {
  options_.plan = PlanOfModes(2, std::vector<HeadMode>(4, HeadMode::kLocal));
  StartDaemons(1);
  Create(addresses_);
  Sequence sequence = Open();
  ASSERT_TRUE(Prefill(sequence, 500).ok());
  for (int step = 0; step < 100; ++step) {
    ASSERT_TRUE(decoder_->Flush(kFlush).ok());
    const uint64_t recent_begin = (sequence.tokens - options_.recent_tokens) / 16 * 16;
    const auto visible = [&](uint64_t position) {
      return position < options_.sink_tokens || position >= recent_begin;
    };
    ASSERT_LE(Step({&sequence}, 1, visible), kBf16) << "step " << step << step_status_;
  }
  EXPECT_EQ(decoder_->stats().requests, 0U);
}

TEST_F(SparseDecoderTest, RefusedTokensAreTakenBack) {
  options_.query_tokens_max = 4;
  options_.cache_rows = 4 * options_.rows;
  StartDaemons(1);
  Create(addresses_);
  Sequence sequence = Open();
  ASSERT_TRUE(Prefill(sequence, 400).ok());
  for (int step = 0; step < 120; ++step) {
    ASSERT_LE(Step({&sequence}, 4), kBf16) << "step " << step << step_status_;
    const uint64_t refused = random_() % 4;
    const uint64_t tokens = sequence.tokens - refused;
    ASSERT_TRUE(decoder_->Truncate(sequence.id, tokens).ok());
    sequence.tokens = tokens;
    for (uint32_t layer = 0; layer < options_.shape.layers; ++layer) {
      sequence.keys[layer].resize(tokens * 2 * 64);
      sequence.values[layer].resize(tokens * 2 * 64);
    }
  }
  // Back into what the daemon holds already, but the GPU still has.
  ASSERT_TRUE(decoder_->Flush(kFlush).ok());
  const uint64_t tokens = sequence.tokens - 60;
  ASSERT_TRUE(decoder_->Truncate(sequence.id, tokens).ok());
  sequence.tokens = tokens;
  for (uint32_t layer = 0; layer < options_.shape.layers; ++layer) {
    sequence.keys[layer].resize(tokens * 2 * 64);
    sequence.values[layer].resize(tokens * 2 * 64);
  }
  for (int step = 0; step < 100; ++step) {
    ASSERT_LE(Step({&sequence}, 1), kBf16) << "step " << step << step_status_;
  }
  EXPECT_EQ(decoder_->Truncate(sequence.id, 100).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SparseDecoderTest, SeveralTurns) {
  StartDaemons(1);
  Create(addresses_);
  Sequence sequence = Open();
  for (const uint64_t tokens : {7, 300, 1, 90, 650}) {
    ASSERT_TRUE(Prefill(sequence, tokens).ok());
    for (int step = 0; step < 20; ++step) {
      ASSERT_LE(Step({&sequence}, 1), kBf16) << "step " << step << step_status_;
    }
  }
}

TEST_F(SparseDecoderTest, DaemonsLearnFromThePromptsQueries) {
  options_.open.build = {IndexKind::kGraph};
  options_.prefill_chunk_tokens = 250;  // no multiple of 32
  StartDaemons(2);
  Create(addresses_);
  Sequence sequence = Open();
  // The fixture's queries are NaN but for every 32nd token's: a daemon would refuse any other.
  const absl::Status status = Prefill(sequence, 9300);
  ASSERT_TRUE(status.ok()) << status;
  for (const std::string& address : addresses_) {
    auto client = KvClient::Connect({.address = address});
    ASSERT_TRUE(client.ok()) << client.status();
    uint64_t covered = 0;
    for (int i = 0; i < 600 && covered == 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      const auto stats = (*client)->Stats(/*with_sessions=*/true);
      ASSERT_TRUE(stats.ok()) << stats.status();
      ASSERT_EQ(stats->sessions.size(), 1U);
      ASSERT_EQ(stats->sessions[0].built.size(), 1U);
      covered = stats->sessions[0].built[0].tokens_covered;
    }
    EXPECT_GE(covered, 8192U) << "a graph is built from queries or not at all";
  }
}

TEST_F(SparseDecoderTest, PrefillTakesStrides) {
  StartDaemons(1);
  Create(addresses_);
  const auto id = decoder_->Open();
  ASSERT_TRUE(id.ok());
  // Heads first, as some engines have it: the same rows must come out of both.
  Sequence sequence = Open();
  ASSERT_TRUE(Prefill(sequence, 400).ok());
  ASSERT_TRUE(decoder_->BeginPrefill(*id, 400).ok());
  Sequence strided = sequence;
  strided.id = *id;
  for (uint32_t layer = 0; layer < 2; ++layer) {
    std::vector<uint16_t> heads_first[2];
    const std::vector<uint16_t>* rows[2] = {&sequence.keys[layer], &sequence.values[layer]};
    void* device[2] = {};
    for (int i = 0; i < 2; ++i) {
      heads_first[i].resize(rows[i]->size());
      for (size_t t = 0; t < 400; ++t) {
        for (size_t h = 0; h < 2; ++h) {
          std::copy_n(rows[i]->data() + (t * 2 + h) * 64, 64,
                      heads_first[i].data() + (h * 400 + t) * 64);
        }
      }
      const size_t bytes = heads_first[i].size() * sizeof(uint16_t);
      ASSERT_EQ(cudaMalloc(&device[i], bytes), cudaSuccess);
      ASSERT_EQ(cudaMemcpy(device[i], heads_first[i].data(), bytes, cudaMemcpyHostToDevice),
                cudaSuccess);
    }
    ASSERT_TRUE(decoder_
                    ->PrefillLayer(*id, layer,
                                   {.keys = device[0],
                                    .values = device[1],
                                    .key_token_stride = 64,
                                    .key_head_stride = 400 * 64,
                                    .value_token_stride = 64,
                                    .value_head_stride = 400 * 64},
                                   stream_)
                    .ok());
    cudaFree(device[0]);
    cudaFree(device[1]);
  }
  for (int step = 0; step < 10; ++step) ASSERT_LE(Step({&strided}, 1), kBf16) << step_status_;
}

TEST_F(SparseDecoderTest, SaysWhatIsWrong) {
  StartDaemons(1);
  const auto code = [&](auto change) {
    DecoderOptions options = options_;
    change(options);
    return SparseDecoder::Create(options, {{.address = addresses_[0]}}).status().code();
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](DecoderOptions& o) { o.shape.layers = 0; }), invalid);
  EXPECT_EQ(code([](DecoderOptions& o) { o.shape.query_heads = 5; }), invalid);
  EXPECT_EQ(code([](DecoderOptions& o) { o.shape.key_dim = 264; }), invalid);
  EXPECT_EQ(code([](DecoderOptions& o) { o.recent_tokens = 100; }), invalid);
  EXPECT_EQ(code([](DecoderOptions& o) { o.sink_tokens = 8; }), invalid);
  EXPECT_EQ(code([](DecoderOptions& o) { o.cache_rows = 10; }), invalid);
  EXPECT_EQ(code([](DecoderOptions& o) { o.plan.heads = {{.layer = 2}}; }), invalid);
  EXPECT_EQ(code([](DecoderOptions& o) { o.plan.heads = {{.k = o.cache_rows + 1}}; }), invalid);
  EXPECT_EQ(code([](DecoderOptions& o) { o.open.plan = HeadPlan(); }), invalid);
  EXPECT_EQ(code([](DecoderOptions& o) { o.fallback = Fallback::kLocalCopy; }), invalid);
  Create(addresses_);
  Sequence sequence = Open();
  EXPECT_EQ(decoder_->BeginStep({}, 1, stream_).code(), invalid);
  EXPECT_EQ(decoder_->BeginStep({sequence.id, sequence.id}, 1, stream_).code(), invalid);
  EXPECT_EQ(decoder_->BeginStep({sequence.id}, 2, stream_).code(), invalid);
  EXPECT_EQ(decoder_->BeginStep({99}, 1, stream_).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(decoder_->Attend(0, nullptr, nullptr, nullptr, nullptr, stream_).code(),
            absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(decoder_->BeginPrefill(sequence.id, 10).ok());
  EXPECT_EQ(decoder_->BeginStep({sequence.id}, 1, stream_).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(decoder_->PrefillLayer(sequence.id, 2, {}, stream_).code(), invalid);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(decoder_->Open().ok());
  EXPECT_EQ(decoder_->Open().status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(decoder_->Close(sequence.id).ok());
  EXPECT_EQ(decoder_->Close(sequence.id).code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(decoder_->Open().ok());
}

}  // namespace
}  // namespace kvseek::test
