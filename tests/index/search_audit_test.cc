#include "index/search_audit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/index/double_attention.h"
#include "tests/index/random_trace.h"

namespace kvseek::index {
namespace {

struct Case {
  TraceShape shape;
  int64_t begin;
  int64_t end;
};

class SearchAuditTest : public ::testing::TestWithParam<Case> {};

TEST_P(SearchAuditTest, AgreesWithDoublePrecision) {
  const Case& param = GetParam();
  const cli::HeadTrace trace = RandomTrace(param.shape);
  const cli::StoredHead head(trace, 2);
  Scratch scratch;
  for (int step = 0; step < trace.steps; ++step) {
    const SearchQuery query{trace.StepQueries(step), trace.group, param.begin, param.end};
    const SearchAudit audit(head.view(), query, scratch);
    SearchOptions options;
    options.candidates = 128;
    options.exact_rows = 8;
    options.list_read = true;
    const SearchResult result = LadderIndex().Search(head.view(), query, options, scratch);
    const AuditFigures figures = audit.Compare(result);
    ASSERT_EQ(figures.output_error.size(), static_cast<size_t>(trace.group));
    for (int h = 0; h < trace.group; ++h) {
      DoubleState all(trace.value_dim);
      double read = 0.0;
      std::vector<std::pair<double, int64_t>> scores;
      for (int64_t t = param.begin; t < param.end; ++t) {
        const double score = ScoreOf(trace, step, h, t);
        all.Add(score, ValueOf(trace, t));
        scores.emplace_back(-score, t);
        if (std::binary_search(result.positions.begin(), result.positions.end(), t)) {
          read += std::exp(score);
        }
      }
      const std::vector<double> truth = all.Out();
      double difference = 0.0;
      double norm = 0.0;
      for (size_t d = 0; d < truth.size(); ++d) {
        const double delta =
            double{result.out[static_cast<size_t>(h) * truth.size() + d]} - truth[d];
        difference += delta * delta;
        norm += truth[d] * truth[d];
      }
      const auto head_at = static_cast<size_t>(h);
      EXPECT_NEAR(figures.output_error[head_at], std::sqrt(difference / norm), 1e-4);
      EXPECT_NEAR(figures.missed[head_at], std::max(0.0, 1.0 - read / all.Mass()), 1e-4);
      std::sort(scores.begin(), scores.end());
      const size_t top = std::min<size_t>(kAuditTopKeys, scores.size());
      double found = 0.0;
      for (size_t i = 0; i < top; ++i) {
        found +=
            std::binary_search(result.positions.begin(), result.positions.end(), scores[i].second)
                ? 1.0
                : 0.0;
      }
      EXPECT_NEAR(figures.recall[head_at], found / static_cast<double>(top), 0.011);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranges, SearchAuditTest,
                         ::testing::Values(Case{{}, 0, 3000},
                                           Case{{.tokens = 2500, .group = 1, .seed = 2}, 17, 2301},
                                           Case{{.tokens = 1100,
                                                 .key_dim = 80,
                                                 .value_dim = 96,
                                                 .group = 7,
                                                 .dtype = kernels::DType::kFp16,
                                                 .seed = 3},
                                                0,
                                                1100},
                                           Case{{.tokens = 90, .seed = 4}, 3, 50}));

TEST(SearchAuditTest, TheExactAnswerIsRight) {
  const cli::HeadTrace trace = RandomTrace({});
  const cli::StoredHead head(trace, 1);
  Scratch scratch;
  const SearchQuery query{trace.StepQueries(0), trace.group, 0, trace.tokens};
  const SearchAudit audit(head.view(), query, scratch);
  SearchOptions options;
  options.list_read = true;
  const AuditFigures figures =
      audit.Compare(ExactIndex().Search(head.view(), query, options, scratch));
  for (size_t h = 0; h < static_cast<size_t>(trace.group); ++h) {
    EXPECT_EQ(figures.output_error[h], 0.0F);
    EXPECT_EQ(figures.recall[h], 1.0F);
    EXPECT_EQ(figures.missed[h], 0.0F);
  }
  EXPECT_EQ(audit.exact_bytes(), trace.tokens * 4 * 64);
}

TEST(SearchAuditTest, AnEmptyRangeHasNothingToMiss) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 1500});
  const cli::StoredHead head(trace, 1);
  Scratch scratch;
  const SearchQuery query{trace.StepQueries(0), trace.group, 40, 40};
  const SearchAudit audit(head.view(), query, scratch);
  SearchOptions options;
  options.list_read = true;
  const AuditFigures figures =
      audit.Compare(LadderIndex().Search(head.view(), query, options, scratch));
  EXPECT_EQ(figures.output_error, std::vector<float>(3, 0.0F));
  EXPECT_EQ(figures.recall, std::vector<float>(3, 1.0F));
  EXPECT_EQ(figures.missed, std::vector<float>(3, 0.0F));
}

}  // namespace
}  // namespace kvseek::index
