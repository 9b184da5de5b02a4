#include "cli/evaluation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "cli/library_search.h"
#include "cli/percentile.h"
#include "kernels/cpu/simd_level.h"
#include "tests/cli/test_files.h"

namespace kvseek::cli {
namespace {

using ::testing::ElementsAre;

/// A trace in memory with random rows, stored as bf16.
HeadTrace RandomTrace(int64_t tokens, int key_dim, int value_dim, int steps, int group) {
  const auto stored = [](const std::vector<float>& values) {
    std::vector<uint16_t> rows;
    rows.reserve(values.size());
    for (const float value : values) rows.push_back(kernels::FloatToBf16(value));
    return rows;
  };
  HeadTrace trace;
  trace.name = "random";
  trace.tokens = tokens;
  trace.key_dim = key_dim;
  trace.value_dim = value_dim;
  trace.steps = steps;
  trace.group = group;
  trace.keys = stored(RandomValues(static_cast<size_t>(tokens * key_dim), 1));
  trace.values = stored(RandomValues(static_cast<size_t>(tokens * value_dim), 2));
  trace.queries = RandomValues(
      static_cast<size_t>(steps) * static_cast<size_t>(group) * static_cast<size_t>(key_dim), 3,
      2.0F);
  trace.softmax_scale = 1.0F / std::sqrt(static_cast<float>(key_dim));
  return trace;
}

double NaiveScore(const HeadTrace& trace, int step, int head, int64_t token) {
  double score = 0.0;
  for (int d = 0; d < trace.key_dim; ++d) {
    score +=
        double{trace.StepQueries(step)[head * trace.key_dim + d]} *
        double{kernels::Bf16ToFloat(trace.keys[static_cast<size_t>(token * trace.key_dim + d)])};
  }
  return score * double{trace.softmax_scale};
}

// Two keys along the axes, one query: scores 8 ln 3 / 8 = ln 3 and 0, so weights 3/4 and 1/4.
TEST(ReferenceTest, AgreesWithPaper) {
  HeadTrace trace = RandomTrace(2, 8, 8, 1, 1);
  std::fill(trace.keys.begin(), trace.keys.end(), uint16_t{0});
  std::fill(trace.values.begin(), trace.values.end(), uint16_t{0});
  trace.keys[0] = kernels::FloatToBf16(8.0F);
  trace.values[0] = kernels::FloatToBf16(1.0F);
  trace.values[8 + 1] = kernels::FloatToBf16(4.0F);
  trace.queries.assign(8, 0.0F);
  trace.queries[0] = std::log(3.0F);
  trace.softmax_scale = 0.125F;
  const std::vector<int> steps = {0};
  const Reference reference = ComputeReference(trace, steps, {.oracle_ks = {1, 2}});
  EXPECT_NEAR(reference.out[0], 0.75, 1e-7);
  EXPECT_NEAR(reference.out[1], 1.0, 1e-7);
  EXPECT_EQ(reference.out[2], 0.0);
  EXPECT_NEAR(reference.lse[0], std::log(4.0), 1e-7);
  EXPECT_EQ(reference.top, 2);
  EXPECT_THAT(reference.top_keys, ElementsAre(0, 1));
  // The top key alone: value (1, 0, ...), three quarters of the mass; the error is |(0.25, -1)| /
  // |(0.75, 1)| = 0.8246.
  EXPECT_NEAR(reference.oracles[0].mass[0], 0.75, 1e-7);
  const Evaluation one = EvaluateOracle(trace, reference, 0);
  EXPECT_NEAR(one.error_mean, std::sqrt(1.0625) / 1.25, 1e-6);
  EXPECT_NEAR(one.missed_true, 0.25, 1e-7);
  EXPECT_EQ(one.recall_at_100, 0.5);
  EXPECT_EQ(one.keys_scanned, 1.0);
  EXPECT_EQ(one.bytes_read, 32.0);
  EXPECT_FALSE(one.micros_p50.has_value());
  EXPECT_NEAR(EvaluateOracle(trace, reference, 1).error_mean, 0.0, 1e-6);
}

TEST(ReferenceTest, AgreesWithNaiveLoops) {
  const HeadTrace trace = RandomTrace(333, 40, 24, 5, 3);
  const std::vector<int> steps = {0, 2, 4};
  const Reference reference = ComputeReference(trace, steps, {.threads = 1});
  for (size_t s = 0; s < steps.size(); ++s) {
    for (int h = 0; h < trace.group; ++h) {
      const size_t row = s * 3 + static_cast<size_t>(h);
      std::vector<double> out(24, 0.0);
      double sum = 0.0;
      for (int64_t t = 0; t < trace.tokens; ++t) {
        const double weight = std::exp(NaiveScore(trace, steps[s], h, t));
        sum += weight;
        for (size_t d = 0; d < 24; ++d) {
          out[d] +=
              weight * double{kernels::Bf16ToFloat(trace.values[static_cast<size_t>(t) * 24 + d])};
        }
      }
      EXPECT_NEAR(reference.lse[row], std::log(sum), 1e-12);
      for (size_t d = 0; d < 24; ++d) EXPECT_NEAR(reference.out[row * 24 + d], out[d] / sum, 1e-12);
      const int32_t* top = reference.top_keys.data() + row * kRecallKeys;
      const double last = NaiveScore(trace, steps[s], h, top[kRecallKeys - 1]);
      int better = 0;
      for (int64_t t = 0; t < trace.tokens; ++t) better += NaiveScore(trace, steps[s], h, t) > last;
      EXPECT_EQ(better, kRecallKeys - 1);
    }
  }
}

TEST(ReferenceTest, DoesNotDependOnThreads) {
  const HeadTrace trace = RandomTrace(500, 16, 16, 9, 7);
  const std::vector<int> steps = SpreadSteps(9, 0);
  const Reference one = ComputeReference(trace, steps, {.oracle_ks = {450, 20}, .threads = 1});
  const Reference three = ComputeReference(trace, steps, {.oracle_ks = {450, 20}, .threads = 3});
  EXPECT_EQ(one.out, three.out);
  EXPECT_EQ(one.lse, three.lse);
  EXPECT_EQ(one.top_keys, three.top_keys);
  EXPECT_EQ(one.oracles[1].out, three.oracles[1].out);
  EXPECT_EQ(one.oracles[0].keys_read, three.oracles[0].keys_read);
}

TEST(ReferenceTest, AgreesAtEverySimdLevel) {
  const HeadTrace trace = RandomTrace(200, 24, 40, 2, 5);
  const std::vector<int> steps = {0, 1};
  const Reference best = ComputeReference(trace, steps, {});
  for (const std::string& level : kernels::SupportedSimdLevels()) {
    ASSERT_TRUE(kernels::ForceSimdLevel(level));
    const Reference here = ComputeReference(trace, steps, {});
    for (size_t i = 0; i < best.out.size(); ++i) EXPECT_NEAR(here.out[i], best.out[i], 1e-13);
    for (size_t i = 0; i < best.lse.size(); ++i) EXPECT_NEAR(here.lse[i], best.lse[i], 1e-13);
  }
  kernels::ForceSimdLevel("");
}

TEST(ReferenceTest, SumsTheMassOfKeys) {
  const HeadTrace trace = RandomTrace(300, 16, 8, 2, 2);
  const std::vector<int> steps = {0, 1};
  const Reference reference = ComputeReference(trace, steps, {});
  std::vector<int64_t> some;
  double expected = 0.0;
  for (int64_t t = 3; t < 300; t += 2) {
    some.push_back(t);
    expected += std::exp(NaiveScore(trace, 1, 1, t) - reference.lse[3]);
  }
  EXPECT_NEAR(MassOfKeys(trace, 1, reference.lse.data() + 2, some)[1], expected, 1e-12);
  EXPECT_EQ(MassOfKeys(trace, 1, reference.lse.data() + 2, {})[0], 0.0);
}

TEST(EvaluationTest, OracleImprovesWithK) {
  const HeadTrace trace = RandomTrace(2000, 32, 32, 4, 2);
  const Reference reference =
      ComputeReference(trace, SpreadSteps(4, 0), {.oracle_ks = {50, 100, 400, 1600, 2000, 9000}});
  double error = 2.0;
  for (size_t i = 0; i + 1 < reference.oracles.size(); ++i) {
    const Evaluation figures = EvaluateOracle(trace, reference, i);
    EXPECT_LT(figures.error_mean, error);
    EXPECT_EQ(figures.recall_at_100, i == 0 ? 0.5 : 1.0);
    error = figures.error_mean;
  }
  EXPECT_LT(error, 1e-6);  // all keys
  EXPECT_EQ(EvaluateOracle(trace, reference, 5).error_mean, error);
}

/// Answers with the truth about the keys in `read` only; the report claims `claimed` with an
/// interval of 0.1 around it.
SearchFunction AttendTo(const HeadTrace& trace, std::vector<int64_t> read, float claimed) {
  return [&trace, read = std::move(read), claimed](int step, const index::SearchOptions& options) {
    index::SearchResult result;
    const auto group = static_cast<size_t>(trace.group);
    result.out.assign(group * static_cast<size_t>(trace.value_dim), 0.0F);
    for (int h = 0; h < trace.group; ++h) {
      double sum = 0.0;
      std::vector<double> out(static_cast<size_t>(trace.value_dim), 0.0);
      for (const int64_t t : read) {
        const double weight = std::exp(NaiveScore(trace, step, h, t));
        sum += weight;
        for (int d = 0; d < trace.value_dim; ++d) {
          out[static_cast<size_t>(d)] +=
              weight * double{kernels::Bf16ToFloat(
                           trace.values[static_cast<size_t>(t * trace.value_dim + d)])};
        }
      }
      for (int d = 0; d < trace.value_dim; ++d) {
        result.out[static_cast<size_t>(h) * out.size() + static_cast<size_t>(d)] =
            static_cast<float>(out[static_cast<size_t>(d)] / sum);
      }
      result.lse.push_back(static_cast<float>(std::log(sum)));
    }
    if (options.list_read) result.positions = read;
    result.report.keys_scanned = trace.tokens;
    result.report.bytes_touched = 1234;
    result.report.missed_mass.assign(group, claimed);
    const float half = options.audit_samples > 0 ? 0.05F : 0.0F;
    result.report.missed_low.assign(group, claimed - half);
    result.report.missed_high.assign(group, claimed + half);
    return absl::StatusOr<index::SearchResult>(result);
  };
}

TEST(EvaluationTest, MeasuresAnAnswer) {
  const HeadTrace trace = RandomTrace(400, 16, 8, 3, 2);
  const Reference reference = ComputeReference(trace, SpreadSteps(3, 0), {.oracle_ks = {100}});
  // Exactly the first head's true top 100 of step 0, for every step and head.
  std::vector<int64_t> read(reference.top_keys.begin(), reference.top_keys.begin() + 100);
  std::sort(read.begin(), read.end());
  const auto one = EvaluateSearch(trace, reference, AttendTo(trace, read, 0.5F), {});
  ASSERT_TRUE(one.ok()) << one.status();
  EXPECT_GT(one->recall_at_100, 1.0 / 6.0);  // that one is complete
  EXPECT_LT(one->recall_at_100, 0.7);
  EXPECT_EQ(one->keys_scanned, 400.0);
  EXPECT_EQ(one->bytes_read, 1234.0);
  EXPECT_NEAR(*one->missed_estimated, 0.5, 1e-7);
  EXPECT_FALSE(one->interval_cover.has_value());
  EXPECT_FALSE(one->interval_width.has_value());
  EXPECT_TRUE(one->micros_p99.has_value());
  const HeadTrace first = [&] {
    HeadTrace copy = trace;
    copy.steps = 1;
    return copy;
  }();
  const Reference first_reference =
      ComputeReference(first, SpreadSteps(1, 0), {.oracle_ks = {100}});
  const auto same = EvaluateSearch(first, first_reference, AttendTo(first, read, 0.5F), {});
  ASSERT_TRUE(same.ok());
  // Head 0 alone is what the oracle at 100 answers, so the least error is its.
  const double oracle = OutputError(std::vector<float>(first_reference.oracles[0].out.begin(),
                                                       first_reference.oracles[0].out.begin() + 8)
                                        .data(),
                                    first_reference.out.data(), 8);
  EXPECT_LE(oracle, same->error_max + 1e-6);
  const double missed = MassOfKeys(first, 0, first_reference.lse.data(), read)[0];
  EXPECT_NEAR(missed, first_reference.oracles[0].mass[0], 1e-12);
}

TEST(EvaluationTest, JudgesIntervals) {
  const HeadTrace trace = RandomTrace(400, 16, 8, 3, 2);
  const Reference reference = ComputeReference(trace, SpreadSteps(3, 0), {});
  std::vector<int64_t> most;
  for (int64_t t = 0; t < 399; ++t) most.push_back(t);  // next to nothing is missed
  index::SearchOptions audit;
  audit.audit_samples = 8;
  const auto honest = EvaluateSearch(trace, reference, AttendTo(trace, most, 0.04F), audit);
  ASSERT_TRUE(honest.ok());
  EXPECT_EQ(honest->interval_cover, 1.0);
  EXPECT_NEAR(*honest->interval_width, 0.1 / 0.04, 1e-5);
  const auto wrong = EvaluateSearch(trace, reference, AttendTo(trace, most, 0.5F), audit);
  ASSERT_TRUE(wrong.ok());
  EXPECT_EQ(wrong->interval_cover, 0.0);
}

TEST(EvaluationTest, RefusesAnswersThatAreNone) {
  const HeadTrace trace = RandomTrace(50, 16, 8, 1, 1);
  const Reference reference = ComputeReference(trace, SpreadSteps(1, 0), {});
  const auto listing = [&trace](std::vector<int64_t> positions) -> SearchFunction {
    return
        [&trace, positions = std::move(positions)](int step, const index::SearchOptions& options) {
          auto answer = AttendTo(trace, {3}, 0.0F)(step, options);
          answer->positions = positions;
          return answer;
        };
  };
  EXPECT_TRUE(EvaluateSearch(trace, reference, listing({3, 49}), {}).ok());
  EXPECT_FALSE(EvaluateSearch(trace, reference, listing({3, 50}), {}).ok());
  EXPECT_FALSE(EvaluateSearch(trace, reference, listing({3, 3}), {}).ok());
  EXPECT_FALSE(EvaluateSearch(trace, reference, listing({-1, 3}), {}).ok());
  const SearchFunction down =
      [](int, const index::SearchOptions&) -> absl::StatusOr<index::SearchResult> {
    return absl::UnavailableError("down");
  };
  EXPECT_EQ(EvaluateSearch(trace, reference, down, {}).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST(PercentileTest, IsTheNearestRank) {
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 0.5), 2.0);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 0.51), 3.0);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 1.0), 4.0);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 0.0), 1.0);
  EXPECT_EQ(Percentile({}, 0.5), 0.0);
}

TEST(LibrarySearchTest, ThreadsDoNotChangeTheAnswer) {
  const HeadTrace trace = RandomTrace(20 * 1024 + 100, 64, 64, 2, 3);
  const StoredHead head(trace, 2);
  PieceRunner one(1);
  PieceRunner three(3);
  for (const index::KeyIndex* index : {&index::ExactIndex(), &index::LadderIndex()}) {
    for (int step = 0; step < trace.steps; ++step) {
      const auto a = SearchLibrary(trace, head, *index, one)(step, {});
      const auto b = SearchLibrary(trace, head, *index, three)(step, {});
      ASSERT_TRUE(a.ok() && b.ok());
      EXPECT_EQ(a->out, b->out);
      EXPECT_EQ(a->lse, b->lse);
      EXPECT_EQ(a->report.missed_mass, b->report.missed_mass);
    }
  }
}

}  // namespace
}  // namespace kvseek::cli
