// A trace's head through a daemon of this process.
#include "cli/daemon_search.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cli/library_search.h"
#include "service/daemon.h"
#include "tests/cli/test_files.h"

namespace kvseek::cli {
namespace {

class DaemonSearchTest : public ::testing::Test {
 protected:
  void SetUp() override {
    service::DaemonOptions options;
    options.listen = {"unix:" + dir_.File("s")};
    options.workers = 2;
    options.build_from_tokens = 7 * index::kSegmentTokens;  // all segments of the traces, once
    auto daemon = service::Daemon::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
    auto client = KvClient::Connect({.address = options.listen[0]});
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
    const std::string data = KVSEEK_SOURCE_DIR "/tests/data/code8.";
    auto trace = LoadHeadTrace(data + "layer15.kv1.safetensors", data + "queries.safetensors",
                               "layer15.kv1");
    ASSERT_TRUE(trace.ok()) << trace.status();
    trace_ = *std::move(trace);
  }

  const TempDir dir_;
  std::unique_ptr<service::Daemon> daemon_;
  std::unique_ptr<KvClient> client_;
  HeadTrace trace_;
};

/// The index that the daemon builds is the library's, bit for bit, with the landmarks that came
/// with appends.
TEST_F(DaemonSearchTest, LandmarkServedEqualsLandmarkComputed) {
  const StoredHead stored(trace_, 2);
  PieceRunner runner(1);
  std::vector<std::vector<float>> answers;
  for (const BuildSettings& settings :
       {BuildSettings{.block = 16, .summary = "minmax"}, BuildSettings{.block = 256},
        BuildSettings{.block = 16, .summary = "given"},
        BuildSettings{.block = 64, .summary = "given"}}) {
    SCOPED_TRACE(settings.summary + std::to_string(settings.block));
    const auto built = BuildIndex("landmark", trace_, stored.view(), settings);
    ASSERT_NE(built, nullptr);
    const auto computed = SearchLibrary(trace_, stored, *built, runner);
    auto head = DaemonHead::Open(*client_, trace_, 2, IndexKind::kLandmark, settings);
    ASSERT_TRUE(head.ok()) << head.status();
    const auto stats = client_->Stats(/*with_sessions=*/true);
    ASSERT_TRUE(stats.ok() && stats->sessions.size() == 1);
    const SessionStats& session = stats->sessions[0];
    ASSERT_TRUE(session.landmark.has_value());
    EXPECT_EQ(session.landmark->block, static_cast<uint32_t>(settings.block));
    const bool given = settings.summary == "given";
    EXPECT_EQ(session.landmark->summary,
              given ? LandmarkSummary::kGiven : LandmarkSummary::kBounds);
    EXPECT_EQ(session.landmarks_given,
              given ? static_cast<uint64_t>(trace_.tokens / settings.block) : 0U);
    const auto served = (*head)->Search(IndexKind::kLandmark);
    const index::SearchOptions options{.candidates = 512, .audit_samples = 16, .list_read = true};
    for (int step = 0; step < 8; ++step) {
      const auto here = computed(step, options);
      const auto there = served(step, options);
      ASSERT_TRUE(there.ok()) << there.status();
      EXPECT_EQ(there->out, here->out);
      EXPECT_EQ(there->lse, here->lse);
      EXPECT_EQ(there->positions, here->positions);
      EXPECT_EQ(there->report.missed_mass, here->report.missed_mass);
      EXPECT_EQ(there->report.missed_high, here->report.missed_high);
      EXPECT_EQ(there->report.bytes_touched, here->report.bytes_touched);
      if (step == 7) answers.push_back(here->out);
    }
  }
  for (size_t i = 1; i < answers.size(); ++i) EXPECT_NE(answers[i], answers[i - 1]);
}

TEST_F(DaemonSearchTest, MeansAreServed) {
  auto head =
      DaemonHead::Open(*client_, trace_, 2, IndexKind::kLandmark, {.block = 32, .summary = "mean"});
  ASSERT_TRUE(head.ok()) << head.status();
  const auto stats = client_->Stats(/*with_sessions=*/true);
  ASSERT_TRUE(stats.ok() && stats->sessions.size() == 1);
  EXPECT_EQ(stats->sessions[0].landmark,
            (LandmarkOptions{.summary = LandmarkSummary::kMean, .block = 32}));
  const index::SearchOptions options{.candidates = 512, .list_read = true};
  const auto answer = (*head)->Search(IndexKind::kLandmark)(0, options);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_LT(answer->report.keys_exact, 512 + 32 + 512);
}

}  // namespace
}  // namespace kvseek::cli
