// A stream that asks a thread, which plays the daemon, through memory that both look at.
#include "kernels/cuda/doorbell.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

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
float LseOf(uint64_t number, size_t head) { return static_cast<float>(number * 1000 + head); }

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

  int heads_ = 0;
  int value_dim_ = 0;
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

void ExpectAnswer(const std::vector<float>& out, const std::vector<float>& lse, uint64_t number) {
  for (size_t h = 0; h < lse.size(); ++h) ASSERT_EQ(lse[h], LseOf(number, h)) << h;
  for (size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], OutOf(number, i)) << i;
}

TEST_F(DoorbellKernelTest, AsksAndIsAnswered) {
  const int heads = std::vector<int>{1, 6, 32, 700}[static_cast<size_t>(Below(4))];
  const int value_dim = std::vector<int>{8, 72, 128}[static_cast<size_t>(Below(3))];
  const size_t words = 4 * static_cast<size_t>(1 + Below(30000));
  Make(1, heads, value_dim, words);
  const DeviceArray<DoorbellFaults> faults(std::vector<DoorbellFaults>(1), Place::kPinnedHost);
  const DeviceArray<float> out(static_cast<size_t>(heads) * static_cast<size_t>(value_dim));
  const DeviceArray<float> lse(static_cast<size_t>(heads));
  const DoorbellSlot slot = slots_[0]->Pointers();
  for (uint64_t number = 1; number <= 200; ++number) {
    const std::vector<uint32_t> data = RandomWords(words);
    const DeviceArray<uint32_t> queries(data);
    Step host;
    host.step.deadline_ns = kNoDeadline;
    for (uint64_t& word : host.question) word = random_();
    const DeviceArray<Step> step(std::vector<Step>{host});
    auto* const device_step = reinterpret_cast<DoorbellStep*>(step.get());
    ASSERT_CUDA(RingDoorbell(slot, queries.get(), words * 4, device_step, 32, stream_));
    ASSERT_CUDA(AwaitAnswer(slot, device_step, heads, value_dim, out.get(), lse.get(), faults.get(),
                            stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    ExpectAnswer(out.Download(), lse.Download(), number);
    ASSERT_EQ(taken_[0], data);
    ASSERT_TRUE(std::equal(question_, question_ + 4, host.question));
  }
  EXPECT_EQ(faults.get()->misses, 0U);
  EXPECT_EQ(faults.get()->refusals, 0U);
}

TEST_F(DoorbellKernelTest, AStepWaitsOnceAndTheNextIsAnswered) {
  constexpr int kValueDim = 128;
  for (const int heads : {32, 1000}) {
    slots_.clear();
    stop_.store(false);
    paused_.store(false);
    Make(3, heads, kValueDim, 4096);
    const DeviceArray<DoorbellFaults> faults(std::vector<DoorbellFaults>(1), Place::kPinnedHost);
    const DeviceArray<float> out(static_cast<size_t>(heads) * kValueDim);
    const DeviceArray<float> lse(static_cast<size_t>(heads));
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
        ASSERT_CUDA(AwaitAnswer(slot->Pointers(), device_step, heads, kValueDim, out.get(),
                                lse.get(), faults.get(), stream_));
      }
      ASSERT_CUDA(cudaStreamSynchronize(stream_));
      if (paused) {
        misses += 3;
        EXPECT_GE(Clock::now() - before, std::chrono::milliseconds(5));
        EXPECT_LT(Clock::now() - before, std::chrono::milliseconds(500));
        for (const float one : lse.Download()) ASSERT_EQ(one, -kInfinity);
        // The layers after the first did not even ask.
        EXPECT_EQ(*slots_[0]->asked.get(), static_cast<uint64_t>(round));
        EXPECT_EQ(*slots_[1]->asked.get(), static_cast<uint64_t>(round) - 1);
      } else {
        ExpectAnswer(out.Download(), lse.Download(), static_cast<uint64_t>(round));
      }
      ASSERT_EQ(faults.get()->misses, misses);
      ASSERT_EQ(faults.get()->waits, misses / 3);
    }
    stop_.store(true);
    daemon_.join();
  }
}

TEST_F(DoorbellKernelTest, AStepOfNobodyIsEmptyAndNoMiss) {
  Make(1, 12, 64, 64);
  const DeviceArray<DoorbellFaults> faults(std::vector<DoorbellFaults>(1), Place::kPinnedHost);
  const DeviceArray<float> out(size_t{12} * 64), lse(12);
  const DeviceArray<uint32_t> queries(RandomWords(64));
  for (uint64_t number = 1; number <= 10; ++number) {
    Step host;
    host.step.deadline_ns = kNoDeadline;
    host.step.mode = number % 2 == 0 ? DoorbellStep::kNobody : DoorbellStep::kAsk;
    const DeviceArray<Step> step(std::vector<Step>{host});
    auto* const device_step = reinterpret_cast<DoorbellStep*>(step.get());
    ASSERT_CUDA(RingDoorbell(slots_[0]->Pointers(), queries.get(), 256, device_step, 32, stream_));
    ASSERT_CUDA(AwaitAnswer(slots_[0]->Pointers(), device_step, 12, 64, out.get(), lse.get(),
                            faults.get(), stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    if (number % 2 != 0) {
      ExpectAnswer(out.Download(), lse.Download(), number);
    } else {
      for (const float one : lse.Download()) ASSERT_EQ(one, -kInfinity);
      EXPECT_EQ(*slots_[0]->asked.get(), number - 1);
    }
  }
  EXPECT_EQ(faults.get()->misses, 0U);
}

TEST_F(DoorbellKernelTest, AnErrorIsAnEmptyStateAndCounted) {
  Make(1, 12, 64, 64);
  const DeviceArray<DoorbellFaults> faults(std::vector<DoorbellFaults>(1), Place::kPinnedHost);
  const DeviceArray<float> out(size_t{12} * 64), lse(12);
  const DeviceArray<uint32_t> queries(RandomWords(64));
  for (uint64_t number = 1; number <= 10; ++number) {
    status_.store(number % 2 == 0 ? 5 : 0);
    Step host;
    host.step.deadline_ns = kNoDeadline;
    const DeviceArray<Step> step(std::vector<Step>{host});
    auto* const device_step = reinterpret_cast<DoorbellStep*>(step.get());
    ASSERT_CUDA(RingDoorbell(slots_[0]->Pointers(), queries.get(), 256, device_step, 32, stream_));
    ASSERT_CUDA(AwaitAnswer(slots_[0]->Pointers(), device_step, 12, 64, out.get(), lse.get(),
                            faults.get(), stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    EXPECT_EQ(faults.get()->refusals, number / 2);
    if (number % 2 != 0) {
      ExpectAnswer(out.Download(), lse.Download(), number);
    } else {
      for (const float one : lse.Download()) ASSERT_EQ(one, -kInfinity);
    }
  }
  EXPECT_EQ(faults.get()->status, 5U);
  EXPECT_EQ(faults.get()->misses, 0U);
}

TEST_F(DoorbellKernelTest, AGraphIsLaunchedAgainAndAgain) {
  constexpr int kHeads = 32;
  constexpr int kValueDim = 128;
  Make(4, kHeads, kValueDim, 2048);
  const DeviceArray<DoorbellFaults> faults(std::vector<DoorbellFaults>(1), Place::kPinnedHost);
  const DeviceArray<float> out(size_t{4} * kHeads * kValueDim), lse(size_t{4} * kHeads);
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
    EXPECT_CUDA(AwaitAnswer(slot, device_step, kHeads, kValueDim,
                            out.get() + s * kHeads * kValueDim, lse.get() + s * kHeads,
                            faults.get(), stream_));
  }
  ASSERT_CUDA(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t replay = nullptr;
  ASSERT_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  for (uint64_t number = 1; number <= 300; ++number) {
    for (uint64_t& word : next.get()->question) word = random_();
    ASSERT_CUDA(cudaGraphLaunch(replay, stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    const std::vector<float> outs = out.Download();
    const std::vector<float> lses = lse.Download();
    for (size_t s = 0; s < slots_.size(); ++s) {
      const auto o = outs.begin() + static_cast<ptrdiff_t>(s * kHeads * kValueDim);
      const auto l = lses.begin() + static_cast<ptrdiff_t>(s * kHeads);
      ExpectAnswer({o, o + kHeads * kValueDim}, {l, l + kHeads}, number);
    }
    ASSERT_TRUE(std::equal(question_, question_ + 4, next.get()->question));
  }
  EXPECT_EQ(faults.get()->misses, 0U);
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
  EXPECT_EQ(AwaitAnswer(slot, nullptr, 1, 8, floats, floats, faults, nullptr), refused);
  EXPECT_EQ(AwaitAnswer(slot, step, 0, 8, floats, floats, faults, nullptr), refused);
  EXPECT_EQ(AwaitAnswer(slot, step, 1, 12, floats, floats, faults, nullptr), refused);
  EXPECT_EQ(AwaitAnswer(slot, step, 1, 8, nullptr, floats, faults, nullptr), refused);
  EXPECT_EQ(AwaitAnswer(slot, step, 1, 8, floats, floats, nullptr, nullptr), refused);
  slot.state = nullptr;
  EXPECT_EQ(RingDoorbell(slot, memory, 16, step, 16, nullptr), refused);
  EXPECT_EQ(AwaitAnswer(slot, step, 1, 8, floats, floats, faults, nullptr), refused);
}

}  // namespace
}  // namespace kvseek::kernels::cuda
