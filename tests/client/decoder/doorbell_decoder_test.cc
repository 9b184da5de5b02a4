// SparseDecoder by way of a doorbell: right, the same bits as by way of requests, in a graph that
// is launched again and again, and on time when the daemon is not. Needs a GPU.
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "client/sparse_decoder.h"
#include "tests/client/decoder/decoder_fixture.h"

namespace kvseek::test {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr double kBf16 = 1.0 / 256.0 + 1e-3;
constexpr milliseconds kDeadline{60};
constexpr milliseconds kMargin{60};  ///< for a busy machine

/// Device memory of 16-bit elements.
class Tensor {
 public:
  explicit Tensor(size_t count) : count_(count) {
    EXPECT_EQ(cudaMalloc(&data_, count * sizeof(uint16_t)), cudaSuccess);
  }
  ~Tensor() { cudaFree(data_); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  void Upload(const std::vector<uint16_t>& host) {
    ASSERT_EQ(host.size(), count_);
    EXPECT_EQ(cudaMemcpy(data_, host.data(), count_ * sizeof(uint16_t), cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  std::vector<uint16_t> Download() const {
    std::vector<uint16_t> host(count_);
    EXPECT_EQ(cudaMemcpy(host.data(), data_, count_ * sizeof(uint16_t), cudaMemcpyDeviceToHost),
              cudaSuccess);
    return host;
  }
  void* get() const { return data_; }

 private:
  size_t count_;
  void* data_ = nullptr;
};

class DoorbellDecoderTest : public DecoderTest {
 protected:
  void SetUp() override {
    DecoderTest::SetUp();
    if (IsSkipped()) return;
    options_.rows = 0;
    options_.cache_rows = 0;
    options_.far_path = FarPath::kDoorbell;
    daemon_ = std::make_unique<DaemonChild>(directory_.path() + "/kvseek.sock");
  }
  std::vector<uint16_t> Elements(size_t count) {
    std::vector<uint16_t> elements(count);
    for (uint16_t& element : elements) element = Element(1.0F);
    return elements;
  }

  std::unique_ptr<DaemonChild> daemon_;
};

TEST_F(DoorbellDecoderTest, EqualsFullAttentionWhateverTheBatch) {
  options_.query_tokens_max = 3;
  Create({daemon_->address()});
  std::vector<Sequence> sequences{Open(), Open(), Open()};
  ASSERT_TRUE(Prefill(sequences[0], 300).ok());
  ASSERT_TRUE(Prefill(sequences[1], 700).ok());
  for (int step = 0; step < 120; ++step) {
    std::vector<Sequence*> batch{&sequences[0], &sequences[2]};
    if (step % 3 != 0) batch.insert(batch.begin() + step % 2, &sequences[1]);
    ASSERT_LE(Step(batch, 1 + static_cast<uint32_t>(step % 3), [](uint64_t) { return true; }),
              kBf16)
        << "step " << step << step_status_;
  }
  EXPECT_EQ(decoder_->stats().misses, 0U);
  EXPECT_GT(decoder_->stats().blocks_sent, 0U);
}

// Steps of two sequences by both ways, at first as calls, then 100 as launches of one graph.
TEST_F(DoorbellDecoderTest, TheSameBitsAsRequestsAlsoFromAGraph) {
  constexpr int kCalls = 20;
  constexpr int kLaunches = 100;
  const ModelShape& shape = options_.shape;
  DecoderOptions by_requests = options_;
  by_requests.far_path = FarPath::kRequests;
  auto other = SparseDecoder::Create(by_requests, {{.address = daemon_->address()}});
  ASSERT_TRUE(other.ok()) << other.status();
  Create({daemon_->address()});
  SparseDecoder* const decoders[] = {decoder_.get(), other->get()};
  std::vector<SequenceId> batches[2];
  for (const uint64_t tokens : {500, 900}) {
    for (auto* const decoder : decoders) {
      batches[decoder == decoders[1] ? 1 : 0].push_back(*decoder->Open());
      ASSERT_TRUE(
          decoder->BeginPrefill(batches[decoder == decoders[1] ? 1 : 0].back(), tokens).ok());
    }
    for (uint32_t layer = 0; layer < shape.layers; ++layer) {
      Tensor keys(tokens * shape.kv_heads * shape.key_dim);
      Tensor values(tokens * shape.kv_heads * shape.value_dim);
      keys.Upload(Elements(tokens * shape.kv_heads * shape.key_dim));
      values.Upload(Elements(tokens * shape.kv_heads * shape.value_dim));
      PrefillTensors tensors;
      tensors.keys = keys.get();
      tensors.values = values.get();
      for (int d = 0; d < 2; ++d) {
        ASSERT_TRUE(decoders[d]->PrefillLayer(batches[d].back(), layer, tensors, stream_).ok());
      }
    }
  }
  const size_t query_elements = size_t{2} * shape.query_heads * shape.key_dim;
  const size_t out_elements = size_t{2} * shape.query_heads * shape.value_dim;
  const size_t key_elements = size_t{2} * shape.kv_heads * shape.key_dim;
  const size_t value_elements = size_t{2} * shape.kv_heads * shape.value_dim;
  std::vector<std::unique_ptr<Tensor>> queries, keys, values, outs[2];
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    queries.push_back(std::make_unique<Tensor>(query_elements));
    keys.push_back(std::make_unique<Tensor>(key_elements));
    values.push_back(std::make_unique<Tensor>(value_elements));
    for (auto& out : outs) out.push_back(std::make_unique<Tensor>(out_elements));
  }
  const auto attend = [&](int d) {
    for (uint32_t layer = 0; layer < shape.layers; ++layer) {
      const absl::Status status =
          decoders[d]->Attend(layer, queries[layer]->get(), keys[layer]->get(),
                              values[layer]->get(), outs[d][layer]->get(), stream_);
      ASSERT_TRUE(status.ok()) << status;
    }
  };
  cudaGraphExec_t replay = nullptr;
  for (int step = 0; step < kCalls + kLaunches; ++step) {
    for (uint32_t layer = 0; layer < shape.layers; ++layer) {
      queries[layer]->Upload(Elements(query_elements));
      keys[layer]->Upload(Elements(key_elements));
      values[layer]->Upload(Elements(value_elements));
    }
    // Blocks are at the daemon, or not, in both.
    for (auto* const decoder : decoders) ASSERT_TRUE(decoder->Flush(milliseconds(10000)).ok());
    for (int d = 0; d < 2; ++d) ASSERT_TRUE(decoders[d]->BeginStep(batches[d], 1, stream_).ok());
    attend(1);
    if (step < kCalls) {
      attend(0);
    } else {
      if (replay == nullptr) {
        cudaGraph_t graph = nullptr;
        ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
        attend(0);
        ASSERT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
        ASSERT_EQ(cudaGraphInstantiate(&replay, graph, 0), cudaSuccess);
        ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
      }
      ASSERT_EQ(cudaGraphLaunch(replay, stream_), cudaSuccess);
    }
    ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    for (uint32_t layer = 0; layer < shape.layers; ++layer) {
      ASSERT_EQ(outs[0][layer]->Download(), outs[1][layer]->Download()) << step << " " << layer;
      EXPECT_GT(decoder_->daemon_ns(layer), 0U);
    }
  }
  EXPECT_EQ(decoder_->stats().misses, 0U);
  cudaGraphExecDestroy(replay);
}

class DoorbellFaultsTest : public DoorbellDecoderTest {
 protected:
  void SetUp() override {
    DoorbellDecoderTest::SetUp();
    if (IsSkipped()) return;
    options_.layer_deadline = kDeadline;
    options_.append_deadline = milliseconds(400);
    Create({daemon_->address()});
    sequence_ = Open();
    ASSERT_TRUE(Prefill(sequence_, 500).ok());
    for (int step = 0; step < 5; ++step) ExpectExact();
    ASSERT_TRUE(decoder_->Flush(milliseconds(5000)).ok());
  }
  void ExpectExact() { EXPECT_LE(Step({&sequence_}, 1), kBf16) << step_status_; }
  void ExpectSteadyZoneOnTime() {
    const uint64_t recent_begin = (sequence_.tokens - options_.recent_tokens) / 16 * 16;
    const auto visible = [&](uint64_t position) {
      return position < options_.sink_tokens || position >= recent_begin;
    };
    const auto begun = Clock::now();
    EXPECT_LE(Step({&sequence_}, 1, visible), kBf16) << step_status_;
    EXPECT_LE(Clock::now() - begun, kDeadline + kMargin);
  }
  Sequence sequence_;
};

TEST_F(DoorbellFaultsTest, AStoppedDaemonIsWaitedForOnceAStepAndComesBack) {
  daemon_->Pause();
  for (uint64_t step = 1; step <= 2; ++step) {
    ExpectSteadyZoneOnTime();
    EXPECT_EQ(decoder_->stats().misses, 2 * step);
    EXPECT_EQ(decoder_->stats().misses_deadline, step);
  }
  daemon_->Resume();
  std::this_thread::sleep_for(milliseconds(100));
  for (int step = 0; step < 50; ++step) ExpectExact();
  EXPECT_EQ(decoder_->stats().misses, 4U);
}

TEST_F(DoorbellFaultsTest, ADaemonThatDiedIsNotWaitedFor) {
  daemon_->Kill();
  for (int step = 0; step < 3; ++step) ExpectSteadyZoneOnTime();
  EXPECT_EQ(decoder_->stats().misses, 6U);
  EXPECT_EQ(decoder_->stats().misses_unavailable, 6U);
}

TEST_F(DoorbellDecoderTest, RefusesWhatADoorbellCannot) {
  const auto refused = [&](const DecoderOptions& options, size_t daemons = 1) {
    const std::vector<ClientOptions> addresses(daemons, {.address = daemon_->address()});
    return ErrorField(SparseDecoder::Create(options, addresses).status());
  };
  EXPECT_EQ(refused(options_, 2), "daemons");
  DecoderOptions options = options_;
  options.rows = 16;
  options.cache_rows = 64;
  EXPECT_EQ(refused(options), "rows");
  options = options_;
  options.fallback = Fallback::kError;
  EXPECT_EQ(refused(options), "fallback");
  options = options_;
  options.plan = PlanOfModes(2, std::vector<HeadMode>(4, HeadMode::kLocal));
  EXPECT_EQ(refused(options), "plan");
}

}  // namespace
}  // namespace kvseek::test
