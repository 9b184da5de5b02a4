// Which candidates of a ladder search are read exactly: each head's best, found among what the
// pieces of its scan list.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cli/evaluation.h"
#include "index/key_index.h"
#include "index/ladder_plan.h"
#include "index/selection.h"
#include "tests/index/random_trace.h"
#include "tests/index/recorded_trace.h"

namespace kvseek::index {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Looks into a plan between its steps.
struct LadderPlanPeer {
  static LadderPlan& Of(SearchPlan& plan) { return dynamic_cast<LadderPlan&>(plan); }

  static int Group(LadderPlan& plan) { return plan.group_; }
  /// (group); may be changed before the scan.
  static std::pmr::vector<float>& ListingThresholds(LadderPlan& plan) {
    return plan.listing_thresholds_;
  }
  /// Before the scan: leaves room for so many of each piece, fewer than there was. What stands
  /// behind them would be the best.
  static void LimitLists(LadderPlan& plan, int capacity) {
    for (auto& piece : plan.pieces_) {
      for (int i = capacity; i < piece.lists.capacity; ++i) piece.lists.keys[i] = {kInfinity, 0, 0};
      piece.lists.capacity = capacity;
    }
  }
  /// Candidates that pieces have listed, or would have with more room.
  static int Listed(LadderPlan& plan, int head) {
    int listed = 0;
    for (auto& piece : plan.pieces_) {
      const auto [begin, end] = piece.lists.Of(head);
      listed += end - begin;
    }
    return listed;
  }
  static std::vector<float> Scores(LadderPlan& plan, int head) {
    const ScoredKeys all = plan.AllCandidates();
    std::vector<float> scores;
    for (size_t i = 0; i < all.positions.size(); ++i) {
      scores.push_back(all.Scores(i, plan.group_)[head]);
    }
    return scores;
  }
  /// Numbers of a head's exact candidates.
  static std::vector<uint32_t> Picks(LadderPlan& plan, int head) {
    const auto& picks = plan.picks_[static_cast<size_t>(head)];
    return {picks.begin(), picks.end()};
  }
};

namespace {

void RunStep(SearchPlan& plan, Scratch& scratch) {
  const int pieces = plan.pieces();
  for (int p = 0; p < pieces; ++p) plan.Run(p, scratch);
}

/// Takes a new plan to its scan.
LadderPlan& RunToScan(SearchPlan& plan, Scratch& scratch) {
  while (plan.phase() != SearchPhase::kScan) {
    RunStep(plan, scratch);
    EXPECT_TRUE(plan.NextStep(scratch));
  }
  return LadderPlanPeer::Of(plan);
}

/// Runs a plan from its scan on and checks that each head's exact candidates are the best of all by
/// their 4-bit scores. Returns the candidates listed, of all heads.
int ExpectBestRows(LadderPlan& plan, const SearchOptions& options, Scratch& scratch) {
  RunStep(plan, scratch);
  EXPECT_TRUE(plan.NextStep(scratch));
  RunStep(plan, scratch);
  int listed = 0;
  for (int h = 0; h < LadderPlanPeer::Group(plan); ++h) {
    const std::vector<float> scores = LadderPlanPeer::Scores(plan, h);
    Scratch own;
    const auto best = BestIndices(scores, options.exact_rows, own);
    EXPECT_THAT(LadderPlanPeer::Picks(plan, h), testing::ElementsAreArray(best)) << h;
    listed += LadderPlanPeer::Listed(plan, h);
  }
  return listed;
}

// Chosen among what the pieces listed or among all, exact rows are the same, as is the answer.
TEST(ExactRowsTest, AreTheBestWhateverIsListed) {
  cli::HeadTrace repeated = RandomTrace({.tokens = 20480, .key_dim = 64, .group = 3});
  for (size_t row = 0; row < 20480; ++row) {  // ties: each of 1024 keys is there twenty times
    std::copy_n(repeated.keys.begin() + static_cast<ptrdiff_t>(row % 1024 * 64), 64,
                repeated.keys.begin() + static_cast<ptrdiff_t>(row * 64));
  }
  for (const cli::HeadTrace& trace : {RecordedTrace("layer15.kv1"), repeated}) {
    const cli::StoredHead head(trace, 2);
    Scratch scratch;
    const SearchOptions options{.candidates = 2048, .exact_rows = 48};
    const SearchQuery query = WholeRange(trace, 1);
    const auto usual = LadderIndex().Plan(head.view(), query, options, scratch);
    const int listed = ExpectBestRows(RunToScan(*usual, scratch), options, scratch);
    // Most of them are left out, and no head's list falls short.
    EXPECT_LT(listed, trace.group * options.candidates / 2);
    for (int h = 0; h < trace.group; ++h) {
      EXPECT_GE(LadderPlanPeer::Listed(LadderPlanPeer::Of(*usual), h), options.exact_rows);
    }
    SearchResult expected;
    usual->Finish(expected, scratch);
    for (const float threshold : {-kInfinity, kInfinity}) {
      for (const bool limited : {false, true}) {
        SCOPED_TRACE(testing::Message() << threshold << ' ' << limited);
        const auto other = LadderIndex().Plan(head.view(), query, options, scratch);
        LadderPlan& plan = RunToScan(*other, scratch);
        for (float& bar : LadderPlanPeer::ListingThresholds(plan)) bar = threshold;
        if (limited) LadderPlanPeer::LimitLists(plan, 10);
        ExpectBestRows(plan, options, scratch);
        SearchResult result;
        other->Finish(result, scratch);
        EXPECT_EQ(result.out, expected.out);
        EXPECT_EQ(result.lse, expected.lse);
        EXPECT_EQ(result.report.keys_exact, expected.report.keys_exact);
      }
    }
  }
}

// The best keys stand in the sampled blocks only: a threshold from the sample lists too few.
TEST(ExactRowsTest, AreTheBestWhereTheSampleMisleads) {
  cli::HeadTrace trace = RandomTrace({.tokens = 16384, .key_dim = 64, .group = 2});
  for (int64_t i = 0; i < 64; ++i) {  // of 256 blocks; a key in each
    const auto row = static_cast<ptrdiff_t>(i * 255 / 63 * 64 + 5);
    for (int d = 0; d < 64; ++d) {
      const float query = trace.queries[static_cast<size_t>((i % 2) * 64 + d)];
      trace.keys[static_cast<size_t>(row * 64 + d)] = kernels::FloatToBf16(4.0F * query);
    }
  }
  const cli::StoredHead head(trace, 2);
  Scratch scratch;
  const SearchOptions options{.candidates = 1024, .exact_rows = 64};
  const auto plan = LadderIndex().Plan(head.view(), WholeRange(trace, 0), options, scratch);
  const int listed = ExpectBestRows(RunToScan(*plan, scratch), options, scratch);
  EXPECT_GT(listed, 0);
  for (int h = 0; h < trace.group; ++h) {
    EXPECT_LT(LadderPlanPeer::Listed(LadderPlanPeer::Of(*plan), h), options.exact_rows);
  }
}

}  // namespace
}  // namespace kvseek::index
