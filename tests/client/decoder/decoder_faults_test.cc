// Daemons that are slow, die, and come back: every step ends in the chosen fallback, within its
// deadline, and with a right result. Needs a GPU.
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

class DecoderFaultsTest : public DecoderTest {
 protected:
  void SetUp() override {
    DecoderTest::SetUp();
    if (IsSkipped()) return;
    options_.layer_deadline = kDeadline;
    options_.append_deadline = milliseconds(400);
    daemon_ = std::make_unique<DaemonChild>(directory_.path() + "/kvseek.sock");
  }

  void Begin(Fallback fallback) {
    options_.fallback = fallback;
    options_.local_tokens_max = fallback == Fallback::kLocalCopy ? 4096 : 0;
    Create({daemon_->address()});
    sequence_ = Open();
    ASSERT_TRUE(Prefill(sequence_, 500).ok());
    // The first step is the slowest: kernels are loaded.
    options_.layer_deadline = kDeadline;
    for (int step = 0; step < 5; ++step) Step({&sequence_}, 1);
    ExpectExact();
  }
  void ExpectExact() { EXPECT_LE(Step({&sequence_}, 1), kBf16) << step_status_; }
  /// The steady zone alone, which is known while daemons hold all blocks.
  void ExpectSteadyZone() {
    const uint64_t recent_begin = (sequence_.tokens - options_.recent_tokens) / 16 * 16;
    const auto visible = [&](uint64_t position) {
      return position < options_.sink_tokens || position >= recent_begin;
    };
    EXPECT_LE(Step({&sequence_}, 1, visible), kBf16) << step_status_;
  }
  /// Runs it, and expects that it takes no longer than one deadline and the reference's time.
  template <typename Work>
  void WithinDeadline(const Work& work) {
    const auto begun = Clock::now();
    work();
    EXPECT_LE(Clock::now() - begun, kDeadline + kMargin);
  }

  std::unique_ptr<DaemonChild> daemon_;
  Sequence sequence_;
};

TEST_F(DecoderFaultsTest, SlowDaemonAndSteadyZone) {
  Begin(Fallback::kSteadyZone);
  ASSERT_TRUE(decoder_->Flush(milliseconds(5000)).ok());
  daemon_->Pause();
  WithinDeadline([&] { ExpectSteadyZone(); });  // one deadline a step, not one a layer
  DecoderStats stats = decoder_->stats();
  EXPECT_GE(stats.misses_deadline, 1U);
  EXPECT_EQ(stats.fallbacks, 2U);
  WithinDeadline([&] { ExpectSteadyZone(); });
  daemon_->Resume();
  // Late answers are dropped: from now on they are the new questions'.
  std::this_thread::sleep_for(milliseconds(100));
  const uint64_t misses = decoder_->stats().misses;
  for (int step = 0; step < 50; ++step) ExpectExact();
  EXPECT_EQ(decoder_->stats().misses, misses);
}

TEST_F(DecoderFaultsTest, SlowDaemonAndLocalCopy) {
  Begin(Fallback::kLocalCopy);
  daemon_->Pause();
  for (int step = 0; step < 3; ++step) WithinDeadline([&] { ExpectExact(); });
  EXPECT_EQ(decoder_->stats().fallbacks, 6U);
  daemon_->Resume();
  for (int step = 0; step < 50; ++step) ExpectExact();
}

TEST_F(DecoderFaultsTest, SlowDaemonAndError) {
  Begin(Fallback::kError);
  daemon_->Pause();
  WithinDeadline([&] { Step({&sequence_}, 1); });
  EXPECT_EQ(step_status_.code(), absl::StatusCode::kDeadlineExceeded) << step_status_;
  daemon_->Resume();
}

TEST_F(DecoderFaultsTest, KilledDaemonAndSteadyZone) {
  Begin(Fallback::kSteadyZone);
  ASSERT_TRUE(decoder_->Flush(milliseconds(5000)).ok());
  daemon_->Kill();
  WithinDeadline([&] { ExpectSteadyZone(); });
  EXPECT_GE(decoder_->stats().misses_unavailable + decoder_->stats().misses_deadline, 1U);
  daemon_->Start();
  // It is another daemon now, and has never heard of the session: no answer is taken for one.
  for (int step = 0; step < 5; ++step) WithinDeadline([&] { ExpectSteadyZone(); });
  EXPECT_EQ(decoder_->stats().misses, decoder_->stats().fallbacks);
  // A new sequence is served.
  Sequence fresh = Open();
  ASSERT_TRUE(Prefill(fresh, 500).ok());
  for (int step = 0; step < 20; ++step) EXPECT_LE(Step({&fresh}, 1), kBf16) << step_status_;
}

TEST_F(DecoderFaultsTest, KilledDaemonAndLocalCopy) {
  Begin(Fallback::kLocalCopy);
  daemon_->Kill();
  for (int step = 0; step < 3; ++step) WithinDeadline([&] { ExpectExact(); });
  daemon_->Start();
  // Blocks go on into the local copy, however long.
  for (int step = 0; step < 300; ++step) ExpectExact();
  EXPECT_GE(decoder_->stats().sequences_lost, 1U);
}

TEST_F(DecoderFaultsTest, KilledDaemonAndError) {
  Begin(Fallback::kError);
  daemon_->Kill();
  WithinDeadline([&] { Step({&sequence_}, 1); });
  EXPECT_FALSE(step_status_.ok());
}

TEST_F(DecoderFaultsTest, DaemonThatStaysAwayIsGivenUp) {
  Begin(Fallback::kSteadyZone);
  daemon_->Kill();
  // The steady zone fills up, the blocks are given up after append_deadline, and decoding goes on.
  for (int step = 0; step < 400; ++step) {
    WithinDeadline([&] { Step({&sequence_}, 1); });
    ASSERT_TRUE(step_status_.ok()) << step_status_;
  }
  EXPECT_EQ(decoder_->stats().sequences_lost, 1U);
}

}  // namespace
}  // namespace kvseek::test
