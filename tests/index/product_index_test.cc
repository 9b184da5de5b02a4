#include "index/product_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cli/evaluation.h"
#include "index/reuse.h"
#include "kernels/cpu/simd_level.h"
#include "tests/index/random_trace.h"

namespace kvseek::index {
namespace {

using kernels::ProductLayout;

/// A head with queries of 70 tokens to train on.
cli::HeadTrace TrainedTrace(const TraceShape& shape, int samples = 70) {
  cli::HeadTrace trace = RandomTrace(shape);
  TraceShape training = shape;
  training.tokens = 1;
  training.steps = samples;
  training.seed = shape.seed + 1;
  trace.prefill_queries = RandomTrace(training).queries;
  for (int i = 0; i < samples; ++i) {
    trace.prefill_positions.push_back(shape.tokens * (i + 1) / samples - 1);
  }
  return trace;
}

BuildInput InputOf(const cli::HeadTrace& trace, const KvView& view) {
  return {.view = view,
          .group = trace.group,
          .queries = trace.prefill_queries,
          .query_positions = trace.prefill_positions};
}

/// The first segments of a head, without its tail.
KvView Part(const cli::StoredHead& head, size_t segments) {
  KvView view = head.view();
  view.segments = view.segments.subspan(0, segments);
  view.tail = {};
  view.tail_tokens = 0;
  return view;
}

double MeanError(const cli::HeadTrace& trace, const SearchResult& result,
                 const SearchResult& exact) {
  double sum = 0.0;
  for (int h = 0; h < trace.group; ++h) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(h) * trace.value_dim;
    const std::vector<double> truth(exact.out.begin() + at,
                                    exact.out.begin() + at + trace.value_dim);
    sum += cli::OutputError(result.out.data() + at, truth.data(), trace.value_dim);
  }
  return sum / trace.group;
}

TEST(ProductIndexTest, AllRowsExactIsExact) {
  for (const TraceShape& shape :
       {TraceShape{.tokens = 2300, .key_dim = 128, .group = 4},
        TraceShape{.tokens = 3100, .key_dim = 80, .value_dim = 96, .group = 1},
        TraceShape{.tokens = 1500, .key_dim = 8, .value_dim = 8, .group = 7},
        TraceShape{.tokens = 2100,
        .key_dim = 256,
        .value_dim = 40,
        .group = 3,
        .dtype = kernels::DType::kFp16}}) {
    for (const ProductLayout& layout : {ProductLayout{11, true}, ProductLayout{22, false}}) {
      const cli::HeadTrace trace = TrainedTrace(shape);
      const cli::StoredHead head(trace, 2);
      const auto built = ProductIndex::Build(InputOf(trace, head.view()), layout);
      ASSERT_NE(built, nullptr);
      EXPECT_EQ(built->covered(), shape.tokens / kSegmentTokens * kSegmentTokens);
      Scratch scratch;
      const SearchOptions options{.candidates = 100000, .exact_rows = 4096};
      const SearchResult exact =
          ExactIndex().Search(head.view(), WholeRange(trace, 0), {}, scratch);
      const SearchResult result =
          built->Search(head.view(), WholeRange(trace, 0), options, scratch);
      EXPECT_LE(MeanError(trace, result, exact), 5e-5);
      EXPECT_EQ(result.report.keys_exact, shape.tokens);
    }
  }
}

// On keys without structure 11 symbols say less than two bits a dimension, but not nothing.
TEST(ProductIndexTest, FindsTheHeaviestKeys) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 6500, .key_dim = 32, .group = 3});
  const cli::StoredHead head(trace, 2);
  const auto built = ProductIndex::Build(InputOf(trace, head.view()), {});
  Scratch scratch;
  for (int step = 0; step < trace.steps; ++step) {
    const SearchQuery query = WholeRange(trace, step);
    const SearchResult exact = ExactIndex().Search(head.view(), query, {}, scratch);
    const SearchResult all = built->Search(head.view(), query, {.candidates = 2000}, scratch);
    EXPECT_LE(MeanError(trace, all, exact), 0.2);
    for (size_t h = 0; h < exact.lse.size(); ++h) EXPECT_NEAR(all.lse[h], exact.lse[h], 0.1);
    const SearchResult best = ExactIndex().Search(head.view(), query, {.k = 16}, scratch);
    const SearchResult found =
        built->Search(head.view(), query, {.k = 16, .candidates = 2000}, scratch);
    std::vector<int64_t> both;
    std::set_intersection(best.positions.begin(), best.positions.end(), found.positions.begin(),
                          found.positions.end(), std::back_inserter(both));
    EXPECT_GE(both.size(), 11U) << "4 bits order those at the end otherwise";
  }
}

TEST(ProductIndexTest, RangesAndTailsAreCovered) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 5 * kSegmentTokens + 500, .key_dim = 32});
  const cli::StoredHead head(trace, 2);
  // Built before the last two segments came.
  const auto built = ProductIndex::Build(InputOf(trace, Part(head, 3)), {});
  Scratch scratch;
  for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 0}, {0, 1}, {1000, 1030}, {70, 2777}, {0, 5620}, {3000, 5620}, {3072, 4096}}) {
    const SearchQuery query{trace.StepQueries(0), trace.group, begin, end};
    const SearchResult exact = ExactIndex().Search(head.view(), query, {}, scratch);
    const SearchOptions options{.candidates = 800, .list_read = true};
    const SearchResult result = built->Search(head.view(), query, options, scratch);
    for (size_t h = 0; h < exact.lse.size(); ++h) {
      if (end == begin) {
        EXPECT_EQ(result.lse[h], exact.lse[h]);
      } else {
        EXPECT_NEAR(result.lse[h], exact.lse[h], 0.1) << begin;
      }
    }
    for (const int64_t position : result.positions) {
      EXPECT_TRUE(position >= begin && position < end);
    }
    if (begin >= built->covered()) {
      EXPECT_EQ(result.out, exact.out);
      EXPECT_EQ(static_cast<int64_t>(result.positions.size()), end - begin);
    }
  }
}

TEST(ProductIndexTest, NeedsSealedKeysAndQueries) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 2100, .key_dim = 16}, 63);
  const cli::StoredHead head(trace, 2);
  EXPECT_EQ(ProductIndex::Build(InputOf(trace, head.view()), {}), nullptr);
  EXPECT_EQ(ProductIndex::Build({.view = head.view(), .group = trace.group}, {}), nullptr);
  const cli::HeadTrace few = TrainedTrace({.tokens = 1000, .key_dim = 16});
  const cli::StoredHead small(few, 2);
  EXPECT_EQ(ProductIndex::Build(InputOf(few, small.view()), {}), nullptr);
  BuildInput input = InputOf(few, head.view());
  input.give_up = [] { return true; };
  EXPECT_EQ(ProductIndex::Build(input, {}), nullptr);
}

TEST(ProductIndexTest, TheSameInputGivesTheSameAnswers) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 20000, .key_dim = 32, .group = 5});
  const cli::StoredHead head(trace, 2);
  const auto a = ProductIndex::Build(InputOf(trace, head.view()), {});
  const auto b = ProductIndex::Build(InputOf(trace, head.view()), {});
  Scratch scratch;
  Scratch other;
  const SearchOptions options{.candidates = 500, .audit_samples = 32, .seed = 3};
  const SearchResult forward = a->Search(head.view(), WholeRange(trace, 0), options, scratch);
  const KvView view = head.view();
  const auto plan = b->Plan(view, WholeRange(trace, 0), options, other);
  do {
    for (int i = plan->pieces() - 1; i >= 0; --i) plan->Run(i, i % 2 == 0 ? scratch : other);
  } while (plan->NextStep(other));
  SearchResult backward;
  plan->Finish(backward, other);
  EXPECT_EQ(forward.out, backward.out);
  EXPECT_EQ(forward.lse, backward.lse);
  EXPECT_EQ(forward.report.missed_high, backward.report.missed_high);
}

// Two codebooks, whose tables are pieces of the first step beside the exact part.
TEST(ProductIndexTest, TablesArePiecesOfTheirOwn) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 85 * kSegmentTokens + 300,
                                             .key_dim = 8,
                                             .value_dim = 8,
                                             .group = 2,
                                             .value_drift = 2.0F});
  const cli::StoredHead head(trace, 2);
  const KvView view = head.view();
  const auto built = ProductIndex::Build(InputOf(trace, view), {});
  ASSERT_NE(built->stretches()[0]->codebook, built->stretches()[1]->codebook);
  Scratch scratch;
  Scratch other;
  const SearchOptions options{.candidates = 2000};
  for (const auto& [end, books, exact_parts] : std::vector<std::array<int64_t, 3>>{
           {trace.tokens, 2, 2}, {view.SealedTokens(), 2, 0}, {60 * kSegmentTokens, 1, 0}}) {
    const SearchQuery query{trace.StepQueries(0), trace.group, 0, end};
    const SearchResult forward = built->Search(view, query, options, scratch);
    const auto plan = built->Plan(view, query, options, other);
    std::vector<int> pieces;  // of each step
    do {
      EXPECT_NE(plan->phase(), SearchPhase::kPlan);
      pieces.push_back(plan->pieces());
      for (int i = plan->pieces() - 1; i >= 0; --i) plan->Run(i, i % 2 == 0 ? scratch : other);
    } while (plan->NextStep(other));
    EXPECT_THAT(pieces, testing::ElementsAre(books + exact_parts, 4, testing::Ge(4), trace.group));
    SearchResult backward;
    plan->Finish(backward, other);
    EXPECT_EQ(forward.out, backward.out);
    EXPECT_EQ(forward.lse, backward.lse);
    const SearchResult exact = ExactIndex().Search(view, query, {}, scratch);
    EXPECT_LE(MeanError(trace, forward, exact), 0.3);
    for (size_t h = 0; h < exact.lse.size(); ++h) EXPECT_NEAR(forward.lse[h], exact.lse[h], 0.1);
  }
}

TEST(ProductIndexTest, LevelsAgree) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 6000, .key_dim = 64});
  const cli::StoredHead head(trace, 2);
  const auto built = ProductIndex::Build(InputOf(trace, head.view()), {});
  Scratch scratch;
  const SearchOptions options{.candidates = 700};
  const SearchResult usual = built->Search(head.view(), WholeRange(trace, 0), options, scratch);
  for (const std::string& level : kernels::SupportedSimdLevels()) {
    ASSERT_TRUE(kernels::ForceSimdLevel(level));
    const SearchResult result = built->Search(head.view(), WholeRange(trace, 0), options, scratch);
    EXPECT_LE(MeanError(trace, result, usual), 0.03) << level;
    for (size_t h = 0; h < usual.lse.size(); ++h) {
      EXPECT_NEAR(result.lse[h], usual.lse[h], 0.01) << level;
    }
  }
  kernels::ForceSimdLevel("");
}

TEST(ProductIndexTest, GrowsByWhatIsNew) {
  const cli::HeadTrace trace =
      TrainedTrace({.tokens = 90 * kSegmentTokens, .key_dim = 8, .value_dim = 8, .group = 1});
  const cli::StoredHead head(trace, 2);
  const auto build = [&](size_t segments, std::shared_ptr<const ProductIndex> previous) {
    const KvView view = Part(head, segments);
    BuildInput input = InputOf(trace, view);
    input.previous = std::move(previous);
    return ProductIndex::Build(input, {});
  };
  const auto book = [](const ProductIndex& index, size_t stretch) {
    return index.stretches()[stretch]->codebook;
  };
  const auto first = build(8, nullptr);
  const auto more = build(15, first);
  EXPECT_EQ(book(*more, 0), book(*first, 0)) << "not yet twice as many";
  EXPECT_EQ(more->covered(), 15 * kSegmentTokens);
  EXPECT_EQ(std::memcmp(more->stretches()[0]->codes, first->stretches()[0]->codes,
                        size_t{8 * 16} * static_cast<size_t>(first->layout().BlockBytes())),
            0);
  const auto twice = build(16, more);
  EXPECT_NE(book(*twice, 0), book(*more, 0));
  EXPECT_EQ(book(*twice, 0)->trained_segments, 16);
  const auto next = build(70, build(40, twice));
  ASSERT_EQ(next->stretches().size(), 2U);
  EXPECT_EQ(book(*next, 0)->trained_segments, 40);
  EXPECT_EQ(book(*next, 1), book(*next, 0)) << "too few of its own";
  const auto last = build(85, next);
  EXPECT_EQ(last->stretches()[0], next->stretches()[0]);
  EXPECT_EQ(book(*last, 1)->trained_segments, 21);
  EXPECT_EQ(build(85, last)->stretches()[1], last->stretches()[1]);
  // What is new is encoded as the rest is.
  Scratch scratch;
  const SearchQuery query{trace.StepQueries(0), 1, 0, 85 * kSegmentTokens};
  const SearchResult grown = last->Search(head.view(), query, {.candidates = 3000}, scratch);
  const SearchResult exact = ExactIndex().Search(head.view(), query, {}, scratch);
  EXPECT_NEAR(grown.lse[0], exact.lse[0], 0.05);
}

TEST(ProductIndexTest, KeepsForTheNextStep) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 9000, .key_dim = 32, .steps = 2});
  const cli::StoredHead head(trace, 2);
  const auto built = ProductIndex::Build(InputOf(trace, head.view()), {});
  Scratch scratch;
  const SearchOptions plain{.candidates = 500};
  SearchOptions keeping = plain;
  keeping.keep = 1500;
  const SearchResult a = built->Search(head.view(), WholeRange(trace, 0), plain, scratch);
  const SearchResult b = built->Search(head.view(), WholeRange(trace, 0), keeping, scratch);
  EXPECT_EQ(a.out, b.out) << "to keep changes nothing";
  ASSERT_NE(b.last, nullptr);
  EXPECT_NEAR(static_cast<double>(b.last->positions.size()), 1500.0, 600.0);
  SelectionReuse reuse({.keep = 1500, .every = 2});
  reuse.Remember(b);
  const KvView view = head.view();
  const auto plan = reuse.Plan(view, WholeRange(trace, 0), plain, scratch);
  ASSERT_NE(plan, nullptr);
  const SearchResult again = RunAll(*plan, scratch);
  const SearchResult exact = ExactIndex().Search(head.view(), WholeRange(trace, 0), {}, scratch);
  EXPECT_LE(MeanError(trace, again, exact), MeanError(trace, a, exact) * 1.2);
}

// Equal keys, equal values, queries of one direction: nothing to learn from.
TEST(ProductIndexTest, DegenerateHeads) {
  cli::HeadTrace trace = TrainedTrace({.tokens = 2100, .key_dim = 16, .value_dim = 16});
  for (const bool zero_queries : {false, true}) {
    std::fill(trace.keys.begin(), trace.keys.end(), kernels::FloatToBf16(0.5F));
    std::fill(trace.values.begin(), trace.values.end(), kernels::FloatToBf16(2.0F));
    if (zero_queries) {
      std::fill(trace.prefill_queries.begin(), trace.prefill_queries.end(), 0.0F);
    }
    const cli::StoredHead head(trace, 2);
    const auto built = ProductIndex::Build(InputOf(trace, head.view()), {});
    ASSERT_NE(built, nullptr);
    Scratch scratch;
    const SearchResult result =
        built->Search(head.view(), WholeRange(trace, 0), {.candidates = 100}, scratch);
    for (const float x : result.out) EXPECT_NEAR(x, 2.0F, 0.02F);
    const SearchResult exact = ExactIndex().Search(head.view(), WholeRange(trace, 0), {}, scratch);
    for (size_t h = 0; h < exact.lse.size(); ++h) EXPECT_NEAR(result.lse[h], exact.lse[h], 0.05);
  }
}

}  // namespace
}  // namespace kvseek::index
