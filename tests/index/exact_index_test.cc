#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cli/evaluation.h"
#include "index/key_index.h"
#include "index/selection.h"
#include "kernels/cpu/attention.h"
#include "tests/index/random_trace.h"

namespace kvseek::index {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Attention in double precision over [begin, end) without `left_out` (ascending).
struct Truth {
  std::vector<double> out;
  std::vector<double> lse;
};

Truth Attend(const cli::HeadTrace& trace, int step, int64_t begin, int64_t end,
             const std::vector<int64_t>& left_out = {}) {
  Truth truth;
  for (int h = 0; h < trace.group; ++h) {
    const float* query = trace.StepQueries(step) + h * trace.key_dim;
    std::vector<double> scores;
    double largest = -kInfinity;
    for (int64_t t = begin; t < end; ++t) {
      double score = 0.0;
      for (int d = 0; d < trace.key_dim; ++d) {
        score += static_cast<double>(query[d]) *
                 kernels::LoadElement(trace.keys.data(), trace.dtype,
                                      static_cast<size_t>(t * trace.key_dim + d));
      }
      if (std::binary_search(left_out.begin(), left_out.end(), t)) score = -kInfinity;
      scores.push_back(score * trace.softmax_scale);
      largest = std::max(largest, scores.back());
    }
    std::vector<double> out(static_cast<size_t>(trace.value_dim));
    double sum = 0.0;
    for (int64_t t = begin; t < end; ++t) {
      const double weight = std::exp(scores[static_cast<size_t>(t - begin)] - largest);
      sum += weight;
      for (int d = 0; d < trace.value_dim; ++d) {
        out[static_cast<size_t>(d)] +=
            weight * kernels::LoadElement(trace.values.data(), trace.dtype,
                                          static_cast<size_t>(t * trace.value_dim + d));
      }
    }
    for (double& value : out) value /= sum;
    truth.out.insert(truth.out.end(), out.begin(), out.end());
    truth.lse.push_back(largest + std::log(sum));
  }
  return truth;
}

void ExpectEqual(const cli::HeadTrace& trace, const SearchResult& result, const Truth& truth,
                 double tolerance) {
  for (int h = 0; h < trace.group; ++h) {
    const auto at = static_cast<size_t>(h) * static_cast<size_t>(trace.value_dim);
    EXPECT_LE(cli::OutputError(result.out.data() + at, truth.out.data() + at, trace.value_dim),
              tolerance)
        << "head " << h;
    EXPECT_NEAR(result.lse[static_cast<size_t>(h)], truth.lse[static_cast<size_t>(h)], tolerance);
  }
}

TEST(ExactIndexTest, AttendEqualsDoublePrecision) {
  for (const TraceShape& shape :
       {TraceShape{.tokens = 2500, .key_dim = 128, .value_dim = 128, .group = 6},
        TraceShape{.tokens = 1024, .key_dim = 80, .value_dim = 64, .group = 1},
        TraceShape{.tokens = 1, .key_dim = 64, .value_dim = 96, .group = 7},
        TraceShape{.tokens = 9000,
        .key_dim = 96,
        .value_dim = 256,
        .group = 3,
        .dtype = kernels::DType::kFp16}}) {
    const cli::HeadTrace trace = RandomTrace(shape);
    const cli::StoredHead head(trace, 2);
    Scratch scratch;
    for (int step = 0; step < trace.steps; ++step) {
      const SearchResult result = ExactIndex().Search(
          head.view(), {trace.StepQueries(step), trace.group, 0, trace.tokens}, {}, scratch);
      ExpectEqual(trace, result, Attend(trace, step, 0, trace.tokens), 2e-5);
      EXPECT_EQ(result.report.keys_exact, trace.tokens);
      EXPECT_THAT(result.report.missed_mass, testing::Each(0.0F));
    }
  }
}

TEST(ExactIndexTest, RangesAreCoveredExactly) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 2600});
  const cli::StoredHead head(trace, 2);
  Scratch scratch;
  for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{1, 2},
                                                                           {5, 1023},
                                                                           {1023, 1025},
                                                                           {1024, 2048},
                                                                           {2047, 2600},
                                                                           {2599, 2600},
                                                                           {100, 2555}}) {
    const SearchResult result = ExactIndex().Search(
        head.view(), {trace.StepQueries(0), trace.group, begin, end}, {}, scratch);
    ExpectEqual(trace, result, Attend(trace, 0, begin, end), 2e-5);
  }
}

TEST(ExactIndexTest, EmptyRangeIsTheEmptyState) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 100});
  const cli::StoredHead head(trace, 2);
  Scratch scratch;
  for (const int k : {-1, 0, 5}) {
    const SearchResult result = ExactIndex().Search(
        head.view(), {trace.StepQueries(0), trace.group, 50, 50}, {.k = k}, scratch);
    EXPECT_THAT(result.out, testing::Each(0.0F));
    EXPECT_THAT(result.lse, testing::Each(-kInfinity));
    EXPECT_THAT(result.positions, testing::IsEmpty());
    EXPECT_THAT(result.report.missed_mass, testing::Each(0.0F));
  }
}

TEST(ExactIndexTest, TopKReturnsTheHeaviestAndTheStateOfTheRest) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 9500, .group = 4});
  const cli::StoredHead head(trace, 2);
  Scratch scratch;
  for (const int k : {0, 1, 64, 700}) {
    const SearchResult result = ExactIndex().Search(
        head.view(), {trace.StepQueries(1), trace.group, 3, 9400}, {.k = k}, scratch);
    ASSERT_EQ(result.positions.size(), static_cast<size_t>(k));
    EXPECT_TRUE(std::is_sorted(result.positions.begin(), result.positions.end()));
    ExpectEqual(trace, result, Attend(trace, 1, 3, 9400, result.positions), 5e-5);
    // No key left out has a larger weight in any head than the least of those returned has in its
    // best.
    const Truth all = Attend(trace, 1, 3, 9400);
    const auto best_weight = [&](int64_t position) {
      double best = -kInfinity;
      for (int h = 0; h < trace.group; ++h) {
        const float* query = trace.StepQueries(1) + h * trace.key_dim;
        double score = 0.0;
        for (int d = 0; d < trace.key_dim; ++d) {
          score += static_cast<double>(query[d]) *
                   kernels::LoadElement(trace.keys.data(), trace.dtype,
                                        static_cast<size_t>(position * trace.key_dim + d));
        }
        best = std::max(best, score * trace.softmax_scale - all.lse[static_cast<size_t>(h)]);
      }
      return best;
    };
    double least_returned = kInfinity;
    for (const int64_t p : result.positions) {
      least_returned = std::min(least_returned, best_weight(p));
    }
    for (int64_t p = 3; p < 9400; ++p) {
      if (std::binary_search(result.positions.begin(), result.positions.end(), p)) continue;
      ASSERT_LE(best_weight(p), least_returned + 1e-4) << "position " << p;
    }
  }
}

TEST(ExactIndexTest, KLargerThanTheRangeReturnsAllAndLeavesNothing) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 1100});
  const cli::StoredHead head(trace, 2);
  Scratch scratch;
  const SearchResult result = ExactIndex().Search(
      head.view(), {trace.StepQueries(0), trace.group, 1000, 1090}, {.k = 91}, scratch);
  ASSERT_EQ(result.positions.size(), 90U);
  EXPECT_EQ(result.positions.front(), 1000);
  EXPECT_EQ(result.positions.back(), 1089);
  EXPECT_THAT(result.lse, testing::Each(-kInfinity));
  EXPECT_THAT(result.out, testing::Each(0.0F));
}

TEST(SelectionTest, BestIndicesBreaksTiesByOrder) {
  Scratch scratch;
  const std::vector<float> values = {1.0F, 3.0F, 3.0F, 2.0F, 3.0F, -kInfinity};
  EXPECT_THAT(BestIndices(values, 0, scratch), testing::IsEmpty());
  EXPECT_THAT(BestIndices(values, 2, scratch), testing::ElementsAre(1, 2));
  EXPECT_THAT(BestIndices(values, 4, scratch), testing::ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(BestIndices(values, 6, scratch), testing::ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(BestIndices(values, 100, scratch), testing::SizeIs(6));
  EXPECT_THAT(BestIndices({}, 3, scratch), testing::IsEmpty());
}

TEST(SelectionTest, SubtractingAllLeavesTheEmptyState) {
  OwnedState state(2, 8);
  OwnedState part(2, 8);
  for (int h = 0; h < 2; ++h) {
    state.view().max[h] = part.view().max[h] = 3.0F;
    state.view().sum[h] = part.view().sum[h] = 0.7F;
    for (int d = 0; d < 8; ++d) state.view().acc[h * 8 + d] = part.view().acc[h * 8 + d] = 1.0F;
  }
  SubtractState(state.view(), part.view());
  EXPECT_THAT(state.Lse(), testing::Each(-kInfinity));
}

}  // namespace
}  // namespace kvseek::index
