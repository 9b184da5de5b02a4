// SearchOptions::mass, beta and vote, on every index that has them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cli/build_index.h"
#include "cli/reference.h"
#include "tests/index/recorded_trace.h"

namespace kvseek::index {
namespace {

class BudgetsTest : public testing::TestWithParam<std::string> {
 protected:
  BudgetsTest()
      : trace_(RecordedTrace("layer15.kv1")),
        head_(trace_, 2),
        built_(GetParam() == "ladder" ? nullptr
                                      : cli::BuildIndex(GetParam(), trace_, head_.view(), {})) {}

  SearchResult Search(int step, SearchOptions options) {
    options.list_read = true;
    const KeyIndex& index = built_ == nullptr ? LadderIndex() : *built_;
    return index.Search(head_.view(), {trace_.StepQueries(step), trace_.group, 0, trace_.tokens},
                        options, scratch_);
  }

  /// Means over some steps.
  struct Means {
    double read = 0.0;
    double missed = 0.0;  ///< true mass, of the worst head
  };
  Means Measure(const SearchOptions& options) {
    Means means;
    const std::vector<int> steps = cli::SpreadSteps(trace_.steps, 16);
    const cli::Reference reference = cli::ComputeReference(trace_, steps, {});
    for (size_t s = 0; s < steps.size(); ++s) {
      const SearchResult result = Search(steps[s], options);
      const std::vector<double> mass = cli::MassOfKeys(
          trace_, steps[s], reference.lse.data() + s * static_cast<size_t>(trace_.group),
          result.positions);
      means.read += static_cast<double>(result.positions.size()) / 16.0;
      means.missed += (1.0 - *std::min_element(mass.begin(), mass.end())) / 16.0;
    }
    return means;
  }

  cli::HeadTrace trace_;
  cli::StoredHead head_;
  std::shared_ptr<const BuiltIndex> built_;
  Scratch scratch_;
};

TEST_P(BudgetsTest, LessMassAllowedReadsMore) {
  double read = 0.0;
  for (const float mass : {0.9F, 0.3F, 0.1F, 0.03F}) {
    const Means means = Measure({.candidates = 6000, .mass = mass});
    EXPECT_GT(means.read, read) << mass;
    // The estimate is of keys that look light; of the heads' worst it is too small.
    EXPECT_LE(means.missed, 3.0 * double{mass}) << mass;
    read = means.read;
  }
  EXPECT_LT(read, 7000.0);
}

TEST_P(BudgetsTest, AWiderBetaReadsMore) {
  double read = 0.0;
  for (const float beta : {1.0F, 4.0F, 7.0F}) {
    const Means means = Measure({.candidates = 6000, .beta = beta});
    EXPECT_GT(means.read, read) << beta;
    read = means.read;
  }
}

TEST_P(BudgetsTest, CandidatesBoundThemAll) {
  for (int step = 0; step < 4; ++step) {
    const SearchResult all = Search(step, {.candidates = 700});
    for (const SearchOptions& options : {SearchOptions{.candidates = 700, .mass = 1e-6F},
                                         SearchOptions{.candidates = 700, .beta = 900.0F}}) {
      const SearchResult bounded = Search(step, options);
      // With beta, parts come in another order.
      if (options.beta == 0.0F || GetParam() == "ladder") {
        EXPECT_EQ(bounded.positions, all.positions);
        EXPECT_EQ(bounded.out, all.out);
      } else {
        EXPECT_LE(bounded.positions.size(), all.positions.size() + 200);
      }
    }
  }
}

TEST_P(BudgetsTest, TheSameSearchReadsTheSame) {
  const SearchOptions options{.candidates = 3000, .mass = 0.1F, .beta = 8.0F, .vote = Vote::kSum};
  const SearchResult first = Search(3, options);
  const SearchResult again = Search(3, options);
  EXPECT_EQ(first.positions, again.positions);
  EXPECT_EQ(first.out, again.out);
}

TEST_P(BudgetsTest, TopKStillReturnsK) {
  const SearchResult result = Search(5, {.k = 300, .candidates = 3000, .mass = 0.99F});
  EXPECT_EQ(result.positions.size(), 300U);
}

TEST_P(BudgetsTest, VotesReadAboutTheSameNumberOfKeys) {
  const Means max = Measure({.candidates = 1024, .vote = Vote::kMax});
  const Means sum = Measure({.candidates = 1024, .vote = Vote::kSum});
  EXPECT_NEAR(sum.read / max.read, 1.0, 0.05);
  EXPECT_LE(sum.missed, 1.1 * max.missed);
}

INSTANTIATE_TEST_SUITE_P(Indexes, BudgetsTest, testing::Values("ladder", "landmark", "cluster"),
                         [](const auto& index) { return index.param; });

}  // namespace
}  // namespace kvseek::index
