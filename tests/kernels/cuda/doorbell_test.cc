// A stream that asks a thread, which plays the daemon, through memory that both look at.
#include "kernels/cuda/doorbell.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/cuda/attention.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace kvseek::kernels::cuda {
namespace {

using Clock = std::chrono::steady_clock;

struct Answer {
  uint64_t number = 0;
  uint64_t daemon_ns = 0;
  uint32_t status = 0;
  uint32_t unused = 0;
};

constexpr uint64_t kNoDeadline = 20'000'000'000;  // ns

/// One slot's memory, and the device's side of it.
struct Slot {
  Slot(int heads, int value_dim, size_t query_words)
      : asked(std::vector<uint64_t>(2), Place::kPinnedHost),
        answer(std::vector<Answer>(2), Place::kPinnedHost),
        question(4, Place::kPinnedHost),
        queries(query_words, Place::kPinnedHost),
        lses(static_cast<size_t>(heads), Place::kPinnedHost),
        outs(static_cast<size_t>(heads) * value_dim, Place::kPinnedHost),
        state(std::vector<DoorbellState>(1)) {}
  DoorbellSlot Pointers() const {
    return {.asked = asked.get(),
            .question = question.get(),
            .queries = queries.get(),
            .answer = answer.get(),
            .lses = lses.get(),
            .outs = outs.get(),
            .state = state.get()};
  }
  DeviceArray<uint64_t> asked;
  DeviceArray<Answer> answer;
  DeviceArray<uint64_t> question;
  DeviceArray<uint32_t> queries;
  DeviceArray<float> lses;
  DeviceArray<uint16_t> outs;
  DeviceArray<DoorbellState> state;
};

/// What the answer to question `number` says; small enough to be exact in fp16.
float OutOf(uint64_t number, size_t element) {
  return static_cast<float>((element * 7 + number * 13) % 2000) - 1000.0F;
}
float LseOf(uint64_t number, size_t head) {
  return 0.5F * static_cast<float>((number * 7 + head) % 9);
}

class DoorbellKernelTest : public CudaTest {
 protected:
  void TearDown() override {
    stop_.store(true);
    if (daemon_.joinable()) daemon_.join();
    CudaTest::TearDown();
  }
  void Make(size_t slots, int heads, int value_dim, size_t query_words) {
    heads_ = heads;
    value_dim_ = value_dim;
    words_ = query_words;
    for (size_t i = 0; i < slots; ++i) {
      slots_.push_back(std::make_unique<Slot>(heads, value_dim, query_words));
    }
    taken_.resize(slots);
    MakeLocal();
    faults_ = std::make_unique<DeviceArray<DoorbellFaults>>(std::vector<DoorbellFaults>(1),
                                                            Place::kPinnedHost);
    daemon_ = std::thread([this] { Serve(); });
  }
  void Serve() {
    std::vector<uint64_t> seen(slots_.size());
    while (!stop_.load()) {
      for (size_t s = 0; s < slots_.size() && !paused_.load(); ++s) {
        Slot& slot = *slots_[s];
        const uint64_t number =
            std::atomic_ref<uint64_t>(*slot.asked.get()).load(std::memory_order_acquire);
        if (number == seen[s]) continue;
        seen[s] = number;
        taken_[s].assign(slot.queries.get(), slot.queries.get() + words_);
        std::copy_n(slot.question.get(), 4, question_);
        const size_t heads = static_cast<size_t>(heads_);
        for (size_t h = 0; h < heads; ++h) slot.lses.get()[h] = LseOf(number, h);
        for (size_t i = 0; i < heads * static_cast<size_t>(value_dim_); ++i) {
          slot.outs.get()[i] = FloatToFp16(OutOf(number, i));
        }
        Answer& answer = *slot.answer.get();
        answer.status = status_.load();
        std::atomic_ref<uint64_t>(answer.number).store(number, std::memory_order_release);
      }
    }
  }
  std::vector<uint32_t> RandomWords(size_t count) {
    std::vector<uint32_t> words(count);
    for (uint32_t& word : words) word = static_cast<uint32_t>(random_());
    return words;
  }

  /// The local state, and how many elements the output has.
  void MakeLocal() {
    std::vector<float> outs(Elements()), lses(static_cast<size_t>(heads_));
    for (float& one : outs) one = Normal();
    for (float& one : lses) one = 2.0F * Normal();
    local_outs_ = std::make_unique<DeviceArray<float>>(outs);
    local_lses_ = std::make_unique<DeviceArray<float>>(lses);
  }
  size_t Elements() const { return static_cast<size_t>(heads_) * static_cast<size_t>(value_dim_); }
  cudaError_t Await(const DoorbellSlot& slot, DoorbellStep* step, float* out) {
    return AwaitAndMerge(slot, step, heads_, value_dim_, local_outs_->get(), local_lses_->get(),
                         out, DType::kFp32, faults_->get(), stream_);
  }
  /// The bits that MergeStates makes of the local state and the answer to `number`; 0: of the local
  /// state alone.
  void ExpectMerged(const std::vector<float>& out, uint64_t number) {
    std::vector<float> outs(Elements()), lses(static_cast<size_t>(heads_));
    for (size_t i = 0; i < outs.size(); ++i) outs[i] = OutOf(number, i);
    for (size_t h = 0; h < lses.size(); ++h) lses[h] = LseOf(number, h);
    const DeviceArray<float> far_outs(outs), far_lses(lses), merged(Elements());
    const StateList lists[] = {{local_outs_->get(), local_lses_->get(), 1},
                               {far_outs.get(), far_lses.get(), 1}};
    ASSERT_CUDA(MergeStates(lists, number == 0 ? 1 : 2, heads_, value_dim_, merged.get(),
                            DType::kFp32, nullptr, stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    const std::vector<float> expected = merged.Download();
    for (size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], expected[i]) << number << " " << i;
  }

  int heads_ = 0;
  int value_dim_ = 0;
  std::unique_ptr<DeviceArray<float>> local_outs_, local_lses_;
  std::unique_ptr<DeviceArray<DoorbellFaults>> faults_;
  size_t words_ = 0;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::vector<std::vector<uint32_t>> taken_;  ///< queries of the last questions
  uint64_t question_[4] = {};
  std::atomic<bool> stop_{false};
  std::atomic<bool> paused_{false};
  std::atomic<uint32_t> status_{0};
  std::thread daemon_;
};

/// A step as it stands in device memory: its question has 32 bytes.
struct Step {
  DoorbellStep step;
  uint64_t question[4] = {1, 2, 3, 4};
};
static_assert(sizeof(Step) == 48);

TEST_F(DoorbellKernelTest, AsksAndIsAnswered) {
  const int heads = std::vector<int>{1, 6, 32, 700}[static_cast<size_t>(Below(4))];
  const int value_dim = std::vector<int>{8, 72, 128}[static_cast<size_t>(Below(3))];
  const size_t words = 4 * static_cast<size_t>(1 + Below(30000));
  Make(1, heads, value_dim, words);
  const DeviceArray<float> out(static_cast<size_t>(heads) * static_cast<size_t>(value_dim));
  const DoorbellSlot slot = slots_[0]->Pointers();
  for (uint64_t number = 1; number <= 60; ++number) {
    const std::vector<uint32_t> data = RandomWords(words);
    const DeviceArray<uint32_t> queries(data);
    Step host;
    host.step.deadline_ns = kNoDeadline;
    for (uint64_t& word : host.question) word = random_();
    const DeviceArray<Step> step(std::vector<Step>{host});
    auto* const device_step = reinterpret_cast<DoorbellStep*>(step.get());
    ASSERT_CUDA(RingDoorbell(slot, queries.get(), words * 4, device_step, 32, stream_));
    ASSERT_CUDA(Await(slot, device_step, out.get()));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    ExpectMerged(out.Download(), number);
    ASSERT_EQ(taken_[0], data);
    ASSERT_TRUE(std::equal(question_, question_ + 4, host.question));
  }
  EXPECT_EQ(faults_->get()->misses, 0U);
  EXPECT_EQ(faults_->get()->refusals, 0U);
}

TEST_F(DoorbellKernelTest, AStepWaitsOnceAndTheNextIsAnswered) {
  constexpr int kValueDim = 128;
  for (const int heads : {32, 1000}) {
    slots_.clear();
    stop_.store(false);
    paused_.store(false);
    Make(3, heads, kValueDim, 4096);
    const DeviceArray<float> out(static_cast<size_t>(heads) * kValueDim);
    const DeviceArray<uint32_t> queries(RandomWords(4096));
    uint64_t misses = 0;
    for (int round = 1; round <= 20; ++round) {
      const bool paused = round % 2 == 0;
      paused_.store(paused);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      Step host;
      host.step.deadline_ns = paused ? 5'000'000 : kNoDeadline;
      const DeviceArray<Step> step(std::vector<Step>{host});
      auto* const device_step = reinterpret_cast<DoorbellStep*>(step.get());
      const auto before = Clock::now();
      for (const auto& slot : slots_) {
        ASSERT_CUDA(
            RingDoorbell(slot->Pointers(), queries.get(), 4096 * 4, device_step, 32, stream_));
        ASSERT_CUDA(Await(slot->Pointers(), device_step, out.get()));
      }
      ASSERT_CUDA(cudaStreamSynchronize(stream_));
      if (paused) {
        misses += 3;
        EXPECT_GE(Clock::now() - before, std::chrono::milliseconds(5));
        EXPECT_LT(Clock::now() - before, std::chrono::milliseconds(500));
        ExpectMerged(out.Download(), 0);
        // The layers after the first did not even ask.
        EXPECT_EQ(*slots_[0]->asked.get(), static_cast<uint64_t>(round));
        EXPECT_EQ(*slots_[1]->asked.get(), static_cast<uint64_t>(round) - 1);
      } else {
        ExpectMerged(out.Download(), static_cast<uint64_t>(round));
      }
      ASSERT_EQ(faults_->get()->misses, misses);
      ASSERT_EQ(faults_->get()->waits, misses / 3);
    }
    stop_.store(true);
    daemon_.join();
  }
}

TEST_F(DoorbellKernelTest, AStepOfNobodyIsEmptyAndNoMiss) {
  Make(1, 12, 64, 64);
  const DeviceArray<float> out(size_t{12} * 64);
  const DeviceArray<uint32_t> queries(RandomWords(64));
  for (uint64_t number = 1; number <= 10; ++number) {
    Step host;
    host.step.deadline_ns = kNoDeadline;
    host.step.mode = number % 2 == 0 ? DoorbellStep::kNobody : DoorbellStep::kAsk;
    const DeviceArray<Step> step(std::vector<Step>{host});
    auto* const device_step = reinterpret_cast<DoorbellStep*>(step.get());
    ASSERT_CUDA(RingDoorbell(slots_[0]->Pointers(), queries.get(), 256, device_step, 32, stream_));
    ASSERT_CUDA(Await(slots_[0]->Pointers(), device_step, out.get()));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    if (number % 2 != 0) {
      ExpectMerged(out.Download(), number);
    } else {
      ExpectMerged(out.Download(), 0);
      EXPECT_EQ(*slots_[0]->asked.get(), number - 1);
    }
  }
  EXPECT_EQ(faults_->get()->misses, 0U);
}

TEST_F(DoorbellKernelTest, AnErrorIsAnEmptyStateAndCounted) {
  Make(1, 12, 64, 64);
  const DeviceArray<float> out(size_t{12} * 64);
  const DeviceArray<uint32_t> queries(RandomWords(64));
  for (uint64_t number = 1; number <= 10; ++number) {
    status_.store(number % 2 == 0 ? 5 : 0);
    Step host;
    host.step.deadline_ns = kNoDeadline;
    const DeviceArray<Step> step(std::vector<Step>{host});
    auto* const device_step = reinterpret_cast<DoorbellStep*>(step.get());
    ASSERT_CUDA(RingDoorbell(slots_[0]->Pointers(), queries.get(), 256, device_step, 32, stream_));
    ASSERT_CUDA(Await(slots_[0]->Pointers(), device_step, out.get()));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    EXPECT_EQ(faults_->get()->refusals, number / 2);
    if (number % 2 != 0) {
      ExpectMerged(out.Download(), number);
    } else {
      ExpectMerged(out.Download(), 0);
    }
  }
  EXPECT_EQ(faults_->get()->status, 5U);
  EXPECT_EQ(faults_->get()->misses, 0U);
}

TEST_F(DoorbellKernelTest, AGraphIsLaunchedAgainAndAgain) {
  constexpr int kHeads = 32;
  constexpr int kValueDim = 128;
  Make(4, kHeads, kValueDim, 2048);
  const DeviceArray<float> out(size_t{4} * kHeads * kValueDim);
  const DeviceArray<uint32_t> queries(RandomWords(2048));
  const DeviceArray<Step> next(std::vector<Step>(1), Place::kPinnedHost);
  const DeviceArray<Step> step(std::vector<Step>(1));
  auto* const device_step = reinterpret_cast<DoorbellStep*>(step.get());
  next.get()->step.deadline_ns = kNoDeadline;
  cudaGraph_t graph = nullptr;
  ASSERT_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  EXPECT_CUDA(
      cudaMemcpyAsync(step.get(), next.get(), sizeof(Step), cudaMemcpyHostToDevice, stream_));
  for (size_t s = 0; s < slots_.size(); ++s) {
    const DoorbellSlot slot = slots_[s]->Pointers();
    EXPECT_CUDA(RingDoorbell(slot, queries.get(), 8192, device_step, 32, stream_));
    EXPECT_CUDA(Await(slot, device_step, out.get() + s * kHeads * kValueDim));
  }
  ASSERT_CUDA(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t replay = nullptr;
  ASSERT_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  for (uint64_t number = 1; number <= 100; ++number) {
    for (uint64_t& word : next.get()->question) word = random_();
    ASSERT_CUDA(cudaGraphLaunch(replay, stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    const std::vector<float> outs = out.Download();
    for (size_t s = 0; s < slots_.size(); ++s) {
      const auto o = outs.begin() + static_cast<ptrdiff_t>(s * kHeads * kValueDim);
      ExpectMerged({o, o + kHeads * kValueDim}, number);
    }
    ASSERT_TRUE(std::equal(question_, question_ + 4, next.get()->question));
  }
  EXPECT_EQ(faults_->get()->misses, 0U);
  EXPECT_CUDA(cudaGraphExecDestroy(replay));
  EXPECT_CUDA(cudaGraphDestroy(graph));
}

TEST(DoorbellArgumentsTest, Refuses) {
  alignas(16) uint64_t memory[16] = {};
  DoorbellSlot slot{.asked = memory,
                    .question = memory,
                    .queries = memory,
                    .answer = memory,
                    .lses = reinterpret_cast<const float*>(memory),
                    .outs = memory,
                    .state = reinterpret_cast<DoorbellState*>(memory)};
  auto* const step = reinterpret_cast<DoorbellStep*>(memory);
  auto* const floats = reinterpret_cast<float*>(memory);
  auto* const faults = reinterpret_cast<DoorbellFaults*>(memory);
  const auto refused = cudaErrorInvalidValue;
  EXPECT_EQ(RingDoorbell(slot, nullptr, 16, step, 16, nullptr), refused);
  EXPECT_EQ(RingDoorbell(slot, memory, 0, step, 16, nullptr), refused);
  EXPECT_EQ(RingDoorbell(slot, memory, 8, step, 16, nullptr), refused);
  EXPECT_EQ(RingDoorbell(slot, memory, 16, nullptr, 16, nullptr), refused);
  EXPECT_EQ(RingDoorbell(slot, memory, 16, step, 0, nullptr), refused);
  const auto await = [&](DoorbellStep* of, int heads, int value_dim, const float* local, float* out,
                         DoorbellFaults* count, DType dtype = DType::kFp32) {
    return AwaitAndMerge(slot, of, heads, value_dim, local, floats, out, dtype, count, nullptr);
  };
  EXPECT_EQ(await(nullptr, 1, 8, floats, floats, faults), refused);
  EXPECT_EQ(await(step, 0, 8, floats, floats, faults), refused);
  EXPECT_EQ(await(step, 1, 12, floats, floats, faults), refused);
  EXPECT_EQ(await(step, 1, 8, nullptr, floats, faults), refused);
  EXPECT_EQ(await(step, 1, 8, floats, nullptr, faults), refused);
  EXPECT_EQ(await(step, 1, 8, floats, floats, nullptr), refused);
  EXPECT_EQ(await(step, 1, 8, floats, floats, faults, DType{}), refused);
  slot.state = nullptr;
  EXPECT_EQ(RingDoorbell(slot, memory, 16, step, 16, nullptr), refused);
  EXPECT_EQ(await(step, 1, 8, floats, floats, faults), refused);
}

}  // namespace
}  // namespace kvseek::kernels::cuda
