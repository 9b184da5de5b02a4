// SearchOptions::threshold on every index, and its calibration.
#include "index/threshold_calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cli/build_index.h"
#include "tests/index/random_trace.h"
#include "tests/index/recorded_trace.h"

namespace kvseek::index {
namespace {

constexpr int64_t kUncovered = 512;  // of the trace: always read

class ThresholdTest : public testing::TestWithParam<std::string> {
 protected:
  ThresholdTest()
      : trace_(RecordedTrace("layer20.kv0")),
        head_(trace_, 2),
        built_(GetParam() == "ladder" ? nullptr
                                      : cli::BuildIndex(GetParam(), trace_, head_.view(), {})) {}

  const KeyIndex& index() const { return built_ == nullptr ? LadderIndex() : *built_; }

  SearchResult Search(int step, SearchOptions options) {
    options.list_read = true;
    return index().Search(head_.view(), {trace_.StepQueries(step), trace_.group, 0, trace_.tokens},
                          options, scratch_);
  }

  BuildInput Input() const {
    BuildInput input;
    input.view = head_.view();
    input.group = trace_.group;
    input.queries = trace_.prefill_queries;
    input.query_positions = trace_.prefill_positions;
    return input;
  }

  /// What a walk scores depends on what it looks for.
  bool IsFilter() const { return GetParam() != "graph"; }

  cli::HeadTrace trace_;
  cli::StoredHead head_;
  std::shared_ptr<const BuiltIndex> built_;
  Scratch scratch_;
};

TEST_P(ThresholdTest, LeavesOutSomeOfTheCandidates) {
  for (int step = 0; step < 40; step += 5) {
    const SearchResult all = Search(step, {.candidates = 1500});
    std::vector<int64_t> wider = all.positions;
    int64_t chosen = all.report.keys_chosen;
    for (const float threshold : {-11.0F, -9.0F, -7.0F, -5.0F, -0.01F}) {
      const SearchResult some = Search(step, {.candidates = 1500, .threshold = threshold});
      EXPECT_LE(some.report.keys_chosen, chosen) << step << " " << threshold;
      EXPECT_EQ(some.report.keys_chosen + kUncovered, static_cast<int64_t>(some.positions.size()));
      if (IsFilter()) {
        EXPECT_TRUE(
            std::includes(wider.begin(), wider.end(), some.positions.begin(), some.positions.end()))
            << step << " " << threshold;
      }
      wider = some.positions;
      chosen = some.report.keys_chosen;
    }
    EXPECT_LT(chosen, 100) << step;
    EXPECT_LT(chosen, all.report.keys_chosen);
  }
}

TEST_P(ThresholdTest, OneThatAllPassChangesNothing) {
  for (int step = 0; step < 12; step += 3) {
    for (const int k : {-1, 100}) {
      const SearchResult none = Search(step, {.k = k, .candidates = 900});
      const SearchResult least =
          Search(step, {.k = k, .candidates = 900, .threshold = kMinThreshold});
      EXPECT_EQ(least.positions, none.positions);
      EXPECT_EQ(least.out, none.out);
      EXPECT_EQ(least.lse, none.lse);
      EXPECT_EQ(least.report.keys_chosen, none.report.keys_chosen);
    }
  }
}

TEST_P(ThresholdTest, TheSameSearchReadsTheSame) {
  const SearchOptions options{.candidates = 3000, .mass = 0.01F, .threshold = -8.0F};
  const SearchResult first = Search(3, options);
  const SearchResult again = Search(3, options);
  EXPECT_EQ(first.positions, again.positions);
  EXPECT_EQ(first.out, again.out);
}

TEST_P(ThresholdTest, TopKStillReturnsK) {
  for (int step = 0; step < 20; step += 4) {
    // More than what is always read: the index has to find some, though none passes.
    const SearchResult result =
        Search(step, {.k = 1000, .candidates = 2000, .threshold = kHighestThreshold});
    EXPECT_GE(result.positions.size(), 900U) << step;
    EXPECT_LE(result.positions.size(), 1000U);
  }
}

TEST_P(ThresholdTest, CalibratesToTheWantedNumber) {
  const SearchOptions options{.candidates = 4000};
  float before = 0.0F;
  for (const double wanted : {100.0, 400.0, 1600.0}) {
    const CalibratedThreshold found =
        CalibrateThreshold(index(), Input(), options, wanted, scratch_);
    EXPECT_EQ(found.queries, kCalibrationQueriesMax);
    EXPECT_NEAR(found.keys, wanted, 0.05 * wanted);
    EXPECT_LT(found.threshold, before);
    before = found.threshold;
    const CalibratedThreshold again =
        CalibrateThreshold(index(), Input(), options, wanted, scratch_);
    EXPECT_EQ(again.threshold, found.threshold);
    EXPECT_EQ(again.keys, found.keys);
  }
}

TEST_P(ThresholdTest, NoThresholdWhereTheBudgetIsLess) {
  const CalibratedThreshold found =
      CalibrateThreshold(index(), Input(), {.candidates = 200}, 1000.0, scratch_);
  EXPECT_EQ(found.threshold, 0.0F);
  EXPECT_LT(found.keys, 1000.0);
  EXPECT_GT(found.keys, 100.0);
}

TEST_P(ThresholdTest, NeedsLateQueries) {
  BuildInput input = Input();
  const auto late = std::lower_bound(input.query_positions.begin(), input.query_positions.end(),
                                     3 * trace_.tokens / 4);
  const auto early = static_cast<size_t>(late - input.query_positions.begin());
  ASSERT_GT(early, 0U);
  input.query_positions = input.query_positions.first(early);
  const CalibratedThreshold found =
      CalibrateThreshold(index(), input, {.candidates = 2000}, 100.0, scratch_);
  EXPECT_EQ(found.queries, 0);
  EXPECT_EQ(found.threshold, 0.0F);
}

INSTANTIATE_TEST_SUITE_P(Indexes, ThresholdTest,
                         testing::Values("ladder", "product", "landmark", "cluster", "graph"),
                         [](const auto& index) { return index.param; });

// Whatever the noise of the estimates: of keys that stand out, exactly these pass.
TEST(ThresholdOfLadderTest, PassesKeysByTheirShareOfMass) {
  cli::HeadTrace trace = RandomTrace({.tokens = 20 * kSegmentTokens, .group = 1});
  std::fill(trace.queries.begin(), trace.queries.end(), 0.0F);
  const auto dim = static_cast<size_t>(trace.key_dim);
  trace.queries[0] = 8.0F;  // times a scale of 1/8: the score is a key's first element
  std::vector<int64_t> heavy;
  for (size_t t = 0; t < static_cast<size_t>(trace.tokens); ++t) {
    for (size_t d = 0; d < dim; ++d) trace.keys[t * dim + d] = 0;
    if (t % 257 == 3) {
      trace.keys[t * dim] = kernels::FloatToBf16(6.0F);
      heavy.push_back(static_cast<int64_t>(t));
    }
  }
  const cli::StoredHead head(trace, 2);
  // 80 of 20480 keys have exp(6) times the others' weight: shares of exp(-4.9) and exp(-10.9).
  Scratch scratch;
  const SearchQuery query{trace.StepQueries(0), 1, 0, trace.tokens};
  SearchOptions options{.candidates = 1 << 15, .list_read = true, .threshold = -8.0F};
  EXPECT_EQ(LadderIndex().Search(head.view(), query, options, scratch).positions, heavy);
  options.threshold = -14.0F;
  EXPECT_EQ(LadderIndex().Search(head.view(), query, options, scratch).report.keys_chosen,
            trace.tokens);
  options.threshold = -1.0F;
  EXPECT_EQ(LadderIndex().Search(head.view(), query, options, scratch).report.keys_chosen, 0);
}

}  // namespace
}  // namespace kvseek::index
