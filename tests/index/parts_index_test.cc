// What landmark and cluster have in common, on both of them.
#include "index/parts_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "cli/evaluation.h"
#include "index/cluster_index.h"
#include "index/landmark_index.h"
#include "tests/index/double_attention.h"
#include "tests/index/random_trace.h"

namespace kvseek::index {
namespace {

constexpr auto kPast = std::chrono::steady_clock::time_point::min();

/// Builders of every kind over a view; `previous` may be null.
using Builder = std::shared_ptr<const BuiltIndex> (*)(const KvView& view,
                                                      std::shared_ptr<const BuiltIndex> previous);

std::shared_ptr<const BuiltIndex> BuildMinMax(const KvView& view,
                                              std::shared_ptr<const BuiltIndex> previous) {
  return BuildLandmark({.view = view, .previous = std::move(previous)}, {.block = 16});
}
std::shared_ptr<const BuiltIndex> BuildMeans(const KvView& view,
                                             std::shared_ptr<const BuiltIndex> previous) {
  return BuildLandmark({.view = view, .previous = std::move(previous)},
                       {.block = 64, .summary = LandmarkSummary::kMean});
}
std::shared_ptr<const BuiltIndex> BuildClusters(const KvView& view,
                                                std::shared_ptr<const BuiltIndex> previous) {
  return BuildCluster({.view = view, .previous = std::move(previous)}, {});
}

class PartsIndexTest : public ::testing::TestWithParam<Builder> {
 protected:
  static std::shared_ptr<const BuiltIndex> Build(const KvView& view,
                                                 std::shared_ptr<const BuiltIndex> previous = {}) {
    return GetParam()(view, std::move(previous));
  }
  static const PartsIndex& Parts(const BuiltIndex& built) {
    return dynamic_cast<const PartsIndex&>(built);
  }
};

void ExpectSame(const SearchResult& a, const SearchResult& b) {
  EXPECT_EQ(a.positions, b.positions);
  EXPECT_EQ(a.out, b.out);
  EXPECT_EQ(a.lse, b.lse);
  EXPECT_EQ(a.report.missed_mass, b.report.missed_mass);
  EXPECT_EQ(a.report.bytes_touched, b.report.bytes_touched);
}

TEST_P(PartsIndexTest, EveryKeyIsInOnePart) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 6 * kSegmentTokens + 100});
  const cli::StoredHead head(trace, 2);
  const auto built = Build(head.view());
  ASSERT_NE(built, nullptr);
  EXPECT_EQ(built->covered(), 6 * kSegmentTokens);
  EXPECT_GT(built->Bytes(), 0U);
  EXPECT_GT(built->build_core_seconds(), 0.0);
  int64_t next = 0;
  for (const auto& run : Parts(*built).runs()) {
    ASSERT_EQ(run->parts->begin(), next);
    next = run->parts->end();
    std::vector<int> seen(static_cast<size_t>(run->parts->end() - run->parts->begin()));
    for (int p = 0; p < run->parts->count(); ++p) {
      for (const uint16_t member : run->parts->Members(p)) ++seen[member];
    }
    EXPECT_THAT(seen, testing::Each(1));
  }
}

TEST_P(PartsIndexTest, NothingSealedIsNoIndexAndABuildMayBeGivenUp) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 1023});
  const cli::StoredHead head(trace, 2);
  EXPECT_EQ(Build(head.view()), nullptr);
  const cli::HeadTrace longer = RandomTrace({.tokens = 2048});
  const cli::StoredHead stored(longer, 2);
  EXPECT_EQ(BuildCluster({.view = stored.view(), .give_up = [] { return true; }}, {}), nullptr);
  EXPECT_EQ(BuildLandmark({.view = stored.view(), .give_up = [] { return true; }}, {}), nullptr);
}

TEST_P(PartsIndexTest, ReadsItsBudget) {
  for (const kernels::DType dtype : {kernels::DType::kBf16, kernels::DType::kFp16}) {
    const cli::HeadTrace trace =
        RandomTrace({.tokens = 9300, .key_dim = 80, .group = 7, .dtype = dtype});
    const cli::StoredHead head(trace, 2);
    const auto built = Build(head.view());
    Scratch scratch;
    for (const int candidates : {64, 1000, 1 << 20}) {
      for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{
               {0, 9300}, {0, 5000}, {4095, 4097}, {1001, 9217}, {9250, 9300}, {70, 70}}) {
        const SearchResult result =
            built->Search(head.view(), {trace.StepQueries(0), trace.group, begin, end},
                          {.candidates = candidates, .list_read = true}, scratch);
        const int64_t inside = std::max<int64_t>(0, std::min<int64_t>(end, 9216) - begin);
        const int64_t outside = std::max<int64_t>(0, end - std::max<int64_t>(begin, 9216));
        ASSERT_TRUE(std::is_sorted(result.positions.begin(), result.positions.end()));
        const auto read = static_cast<int64_t>(result.positions.size());
        EXPECT_EQ(read, result.report.keys_exact);
        // To within half a part, and at least one.
        EXPECT_LE(read, std::min<int64_t>(inside, candidates + 64) + outside);
        EXPECT_GE(read, std::min<int64_t>(inside, candidates - 64) + outside);
        if (!result.positions.empty()) {
          EXPECT_GE(result.positions.front(), begin);
          EXPECT_LT(result.positions.back(), end);
        }
      }
    }
  }
}

TEST_P(PartsIndexTest, ReadingAllIsExact) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 5200, .group = 1});
  const cli::StoredHead head(trace, 2);
  const auto built = Build(head.view());
  Scratch scratch;
  const SearchQuery query{trace.StepQueries(0), trace.group, 30, 5100};
  const SearchResult all = built->Search(head.view(), query, {.candidates = 1 << 20}, scratch);
  const SearchResult exact = ExactIndex().Search(head.view(), query, {}, scratch);
  EXPECT_NEAR(all.lse[0], exact.lse[0], 1e-4);
  EXPECT_EQ(all.report.missed_mass[0], 0.0F);
  const std::vector<double> truth(exact.out.begin(), exact.out.end());
  EXPECT_LE(cli::OutputError(all.out.data(), truth.data(), trace.value_dim), 1e-4);
}

TEST_P(PartsIndexTest, GrowthTakesRunsOverAndAnswersAsIfBuiltAtOnce) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 14 * kSegmentTokens});
  cli::HeadTrace shorter = trace;
  shorter.tokens = 9 * kSegmentTokens + 17;
  const cli::StoredHead head(trace, 2);
  const cli::StoredHead before(shorter, 2);
  const auto old = Build(before.view());
  const auto grown = Build(head.view(), old);
  const auto fresh = Build(head.view());
  const auto& runs = Parts(*grown).runs();
  ASSERT_EQ(runs.size(), 4U);
  EXPECT_EQ(runs[0], Parts(*old).runs()[0]);
  EXPECT_EQ(runs[1], Parts(*old).runs()[1]);
  EXPECT_NE(runs[2], Parts(*old).runs()[2]);  // was short
  EXPECT_EQ(grown->covered(), 14 * kSegmentTokens);
  Scratch scratch;
  const SearchQuery query{trace.StepQueries(1), trace.group, 0, trace.tokens};
  const SearchOptions options{.candidates = 700, .list_read = true};
  const SearchResult answer = grown->Search(head.view(), query, options, scratch);
  ExpectSame(answer, fresh->Search(head.view(), query, options, scratch));
  // The old index answers for the longer sequence, too: it reads the rest exactly.
  const SearchResult outdated = old->Search(head.view(), query, options, scratch);
  EXPECT_GE(outdated.report.keys_exact, 5 * kSegmentTokens);
}

TEST_P(PartsIndexTest, PastItsTimeItAnswersFromSummariesAndItsReportHolds) {
  constexpr int64_t kBegin = 1;  // after the sink, which no sample finds in a summary
  int covered = 0;
  int trials = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const cli::HeadTrace trace = RandomTrace({.tokens = 4200, .group = 4, .seed = seed});
    const cli::StoredHead head(trace, 2);
    const auto built = Build(head.view());
    Scratch scratch;
    const SearchResult result =
        built->Search(head.view(), {trace.StepQueries(0), trace.group, kBegin, 4200},
                      {.audit_samples = 128, .list_read = true, .stop_at = kPast}, scratch);
    EXPECT_EQ(result.positions.size(), 4200U - 4096U);
    for (int h = 0; h < trace.group; ++h, ++trials) {
      double missed = 0.0;
      double all = 0.0;
      for (int64_t p = kBegin; p < 4200; ++p) {
        const double weight = std::exp(ScoreOf(trace, 0, h, p));
        all += weight;
        if (p < 4096) missed += weight;
      }
      const auto at = static_cast<size_t>(h);
      ASSERT_TRUE(std::isfinite(result.lse[at]));
      covered += result.report.missed_low[at] <= missed / all &&
                 missed / all <= result.report.missed_high[at];
    }
  }
  EXPECT_GE(covered, trials * 9 / 10);
}

INSTANTIATE_TEST_SUITE_P(Kinds, PartsIndexTest,
                         ::testing::Values(&BuildMinMax, &BuildMeans, &BuildClusters));

}  // namespace
}  // namespace kvseek::index
