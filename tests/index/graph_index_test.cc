#include "index/graph_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cli/evaluation.h"
#include "cli/library_search.h"
#include "cli/reference.h"
#include "index/key_index.h"
#include "tests/index/random_trace.h"
#include "tests/index/recorded_trace.h"

namespace kvseek::index {
namespace {

/// A made-up head with training queries at `samples` positions.
cli::HeadTrace TrainedTrace(const TraceShape& shape, int samples) {
  cli::HeadTrace trace = RandomTrace(shape);
  std::mt19937_64 random(shape.seed + 1);
  std::normal_distribution<float> normal;
  for (int i = 0; i < samples; ++i) {
    trace.prefill_positions.push_back(shape.tokens * (i + 1) / samples - 1);
    for (int d = 0; d < shape.group * shape.key_dim; ++d) {
      trace.prefill_queries.push_back(1.5F * normal(random));
    }
  }
  return trace;
}

BuildInput InputOf(const cli::HeadTrace& trace, const cli::StoredHead& head) {
  BuildInput input;
  input.view = head.view();
  input.group = trace.group;
  input.queries = trace.prefill_queries;
  input.query_positions = trace.prefill_positions;
  return input;
}

double MeanError(const cli::HeadTrace& trace, const SearchResult& result,
                 const SearchResult& exact) {
  const auto dim = static_cast<size_t>(trace.value_dim);
  double sum = 0.0;
  for (size_t h = 0; h < static_cast<size_t>(trace.group); ++h) {
    const auto from = exact.out.begin() + static_cast<ptrdiff_t>(h * dim);
    const std::vector<double> truth(from, from + trace.value_dim);
    sum += cli::OutputError(result.out.data() + h * dim, truth.data(), trace.value_dim);
  }
  return sum / trace.group;
}

/// Keys that a walk from `start` along edges comes to.
int64_t Reached(const KeyGraph& graph, uint32_t start) {
  std::vector<char> seen(static_cast<size_t>(graph.Keys()));
  std::vector<uint32_t> todo = {start};
  seen[start] = 1;
  for (size_t i = 0; i < todo.size(); ++i) {
    for (const uint32_t next : graph.Neighbours(todo[i])) {
      if (seen[next] == 0) todo.push_back(next);
      seen[next] = 1;
    }
  }
  return static_cast<int64_t>(todo.size());
}

void ExpectWellFormed(const KeyGraph& graph, int64_t keys, int degree) {
  ASSERT_EQ(graph.Keys(), keys);
  for (uint32_t key = 0; key < keys; ++key) {
    const absl::Span<const uint32_t> neighbours = graph.Neighbours(key);
    ASSERT_LE(neighbours.size(), static_cast<size_t>(degree));
    std::vector<uint32_t> sorted(neighbours.begin(), neighbours.end());
    std::sort(sorted.begin(), sorted.end());
    ASSERT_EQ(std::adjacent_find(sorted.begin(), sorted.end()), sorted.end()) << key;
    ASSERT_FALSE(std::binary_search(sorted.begin(), sorted.end(), key)) << key;
    ASSERT_LT(sorted.back(), keys);
  }
  for (const uint32_t entry : graph.entries) EXPECT_EQ(Reached(graph, entry), keys) << entry;
}

TEST(GraphIndexTest, EveryKeyIsReachable) {
  for (const uint64_t seed : {1, 2, 3}) {
    for (const int degree : {kGraphDegreeMin, 16, kGraphDegree}) {
      const cli::HeadTrace trace = TrainedTrace({.tokens = 3100, .seed = seed}, 40);
      const cli::StoredHead head(trace, 2);
      const auto index = GraphIndex::Build(InputOf(trace, head), degree);
      ASSERT_NE(index, nullptr);
      ExpectWellFormed(index->graph(), 3072, degree);
    }
  }
  for (const char* name : {"layer15.kv1", "layer20.kv0"}) {
    const cli::HeadTrace trace = RecordedTrace(name);
    const cli::StoredHead head(trace, 2);
    const auto index = GraphIndex::Build(InputOf(trace, head));
    ASSERT_NE(index, nullptr);
    ExpectWellFormed(index->graph(), 7168, kGraphDegree);
    EXPECT_LE(index->Bytes(), size_t{7168} * 256);
  }
}

TEST(GraphIndexTest, KeysWithoutQueriesAndEqualKeysAreReachable) {
  // All queries were at the beginning, and half of the keys are one and the same.
  cli::HeadTrace trace = TrainedTrace({.tokens = 4096}, 20);
  for (int64_t& position : trace.prefill_positions) position /= 8;
  for (int64_t t = 2048; t < 4096; ++t) {
    std::copy_n(trace.keys.begin(), trace.key_dim, trace.keys.begin() + t * trace.key_dim);
  }
  const cli::StoredHead head(trace, 2);
  const auto index = GraphIndex::Build(InputOf(trace, head));
  ASSERT_NE(index, nullptr);
  ExpectWellFormed(index->graph(), 4096, kGraphDegree);
}

TEST(GraphIndexTest, BuildIsDeterministic) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 5000, .group = 2}, 64);
  const cli::StoredHead head(trace, 2);
  const auto one = GraphIndex::Build(InputOf(trace, head));
  const auto two = GraphIndex::Build(InputOf(trace, head));
  EXPECT_EQ(one->graph().neighbours, two->graph().neighbours);
  EXPECT_EQ(one->graph().distances, two->graph().distances);
  EXPECT_EQ(one->graph().entries, two->graph().entries);
  Scratch scratch;
  const SearchOptions options{.candidates = 300, .audit_samples = 16, .list_read = true};
  const SearchResult a = one->Search(head.view(), WholeRange(trace, 0), options, scratch);
  const SearchResult b = two->Search(head.view(), WholeRange(trace, 0), options, scratch);
  EXPECT_EQ(a.out, b.out);
  EXPECT_EQ(a.lse, b.lse);
  EXPECT_EQ(a.positions, b.positions);
  EXPECT_EQ(a.report.missed_mass, b.report.missed_mass);
}

TEST(GraphIndexTest, NothingToBuildFrom) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 1500}, 8);
  const cli::StoredHead head(trace, 2);
  BuildInput untrained = InputOf(trace, head);
  untrained.queries = {};
  untrained.query_positions = {};
  EXPECT_EQ(GraphIndex::Build(untrained), nullptr);
  const cli::HeadTrace tiny = TrainedTrace({.tokens = 1000}, 8);
  const cli::StoredHead unsealed(tiny, 2);
  EXPECT_EQ(GraphIndex::Build(InputOf(tiny, unsealed)), nullptr);
}

TEST(GraphIndexTest, GivesUpWheneverAsked) {
  const cli::HeadTrace trace = TrainedTrace({.tokens = 4096}, 64);
  const cli::StoredHead head(trace, 2);
  BuildInput input = InputOf(trace, head);
  int asked = 0;
  input.give_up = [&] {
    ++asked;
    return false;
  };
  ASSERT_NE(GraphIndex::Build(input), nullptr);
  const int times = asked;
  EXPECT_GE(times, 10);
  for (int last = 1; last <= times; ++last) {
    asked = 0;
    input.give_up = [&] { return ++asked == last; };
    EXPECT_EQ(GraphIndex::Build(input), nullptr) << last << " of " << times;
    EXPECT_EQ(asked, last);
  }
}

TEST(GraphIndexTest, AnyShapeAnswersAndKeepsItsBudget) {
  for (const TraceShape& shape :
       {TraceShape{.tokens = 4100, .key_dim = 64, .value_dim = 64, .group = 1},
        TraceShape{.tokens = 3000, .key_dim = 80, .value_dim = 96, .group = 2},
        TraceShape{.tokens = 2500, .key_dim = 256, .value_dim = 64, .group = 7},
        TraceShape{.tokens = 5000,
        .key_dim = 128,
        .value_dim = 128,
        .group = 6,
        .dtype = kernels::DType::kFp16}}) {
    const cli::HeadTrace trace = TrainedTrace(shape, 50);
    const cli::StoredHead head(trace, 2);
    const auto index = GraphIndex::Build(InputOf(trace, head));
    ASSERT_NE(index, nullptr);
    const int64_t tail = trace.tokens - index->covered();
    Scratch scratch;
    for (int step = 0; step < trace.steps; ++step) {
      const SearchQuery query = WholeRange(trace, step);
      const SearchResult exact = ExactIndex().Search(head.view(), query, {}, scratch);
      double last = 1e9;
      for (const int candidates : {1, 37, 500, 100000}) {
        const SearchResult result = index->Search(
            head.view(), query, {.candidates = candidates, .list_read = true}, scratch);
        const int64_t budget = std::min<int64_t>(candidates, index->covered());
        EXPECT_EQ(result.report.keys_scanned, budget + tail);
        EXPECT_EQ(static_cast<int64_t>(result.positions.size()), budget + tail);
        EXPECT_TRUE(std::is_sorted(result.positions.begin(), result.positions.end()));
        for (const float lse : result.lse) EXPECT_TRUE(std::isfinite(lse));
        const double error = MeanError(trace, result, exact);
        EXPECT_LE(error, last * 1.2) << candidates;
        last = error;
      }
      EXPECT_LE(last, 1e-4);  // everything was read
    }
  }
}

TEST(GraphIndexTest, SeesItsRangeOnlyAndWhatCameLater) {
  const cli::HeadTrace whole = TrainedTrace({.tokens = 6000, .key_dim = 128, .group = 3}, 50);
  cli::HeadTrace before = whole;
  before.tokens = 3500;
  const cli::StoredHead then(before, 2);
  const auto index = GraphIndex::Build(InputOf(before, then));
  ASSERT_EQ(index->covered(), 3072);
  const cli::StoredHead now(whole, 2);
  Scratch scratch;
  for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{0, 6000},
                                                                           {0, 3072},
                                                                           {1, 3000},
                                                                           {100, 163},
                                                                           {1000, 4000},
                                                                           {3071, 3073},
                                                                           {3100, 5990},
                                                                           {2000, 2000}}) {
    const SearchQuery query{whole.StepQueries(1), whole.group, begin, end};
    const SearchResult exact = ExactIndex().Search(now.view(), query, {}, scratch);
    const SearchResult result =
        index->Search(now.view(), query, {.candidates = 400, .list_read = true}, scratch);
    for (const int64_t position : result.positions) {
      EXPECT_GE(position, begin);
      EXPECT_LT(position, end);
    }
    const int64_t covered = std::max<int64_t>(std::min<int64_t>(end, 3072) - begin, 0);
    EXPECT_EQ(static_cast<int64_t>(result.positions.size()),
              end - begin - covered + std::min<int64_t>(covered, 400));
    if (covered <= 400) {
      for (size_t h = 0; h < exact.lse.size() && begin < end; ++h) {
        EXPECT_NEAR(result.lse[h], exact.lse[h], 1e-4);
      }
      EXPECT_LE(MeanError(whole, result, exact), 1e-4);
    }
  }
  // Truncated below what the graph covers.
  cli::HeadTrace shorter = whole;
  shorter.tokens = 2100;
  const cli::StoredHead cut(shorter, 2);
  const SearchQuery query{whole.StepQueries(0), whole.group, 0, 2100};
  const SearchResult result =
      index->Search(cut.view(), query, {.candidates = 500, .list_read = true}, scratch);
  EXPECT_EQ(result.positions.size(), size_t{500 + 2100 - 2048});
  EXPECT_LT(result.positions.back(), 2100);
}

TEST(GraphIndexTest, TopKAndBeta) {
  const cli::HeadTrace trace = RecordedTrace("layer20.kv0");
  const cli::StoredHead head(trace, 2);
  const auto index = GraphIndex::Build(InputOf(trace, head));
  Scratch scratch;
  const SearchQuery query = WholeRange(trace, 100);
  const SearchResult top =
      index->Search(head.view(), query, {.k = 64, .candidates = 2000}, scratch);
  EXPECT_EQ(top.positions.size(), 64U);
  // A narrow inner-product range ends the search early and reads little; a wide one changes
  // nothing.
  const SearchResult free =
      index->Search(head.view(), query, {.candidates = 2000, .list_read = true}, scratch);
  SearchOptions options{.candidates = 2000, .list_read = true};
  options.beta = 3.0F;
  const SearchResult narrow = index->Search(head.view(), query, options, scratch);
  options.beta = 1000.0F;
  const SearchResult wide = index->Search(head.view(), query, options, scratch);
  EXPECT_EQ(wide.positions, free.positions);
  EXPECT_LT(narrow.report.keys_scanned, free.report.keys_scanned);
  EXPECT_LT(narrow.positions.size(), free.positions.size());
  EXPECT_LT(narrow.report.bytes_touched, free.report.bytes_touched);
  EXPECT_TRUE(std::includes(free.positions.begin(), free.positions.end(), narrow.positions.begin(),
                            narrow.positions.end()));
}

struct Floor {
  const char* head;
  int candidates;
  double recall_min;
  double error_max;
};

TEST(GraphIndexTest, FloorsOnRealHeads) {
  constexpr Floor kFloors[] = {
      {"layer15.kv1", 256, 0.63, 0.205},
      {"layer15.kv1", 1024, 0.85, 0.115},
      {"layer20.kv0", 256, 0.77, 0.175},
      {"layer20.kv0", 1024, 0.95, 0.078},
  };
  for (const Floor& floor : kFloors) {
    const cli::HeadTrace trace = RecordedTrace(floor.head);
    const cli::StoredHead head(trace, 2);
    const auto index = GraphIndex::Build(InputOf(trace, head));
    cli::PieceRunner runner(1);
    const cli::Reference reference =
        cli::ComputeReference(trace, cli::SpreadSteps(trace.steps, 32), {});
    const auto figures =
        cli::EvaluateSearch(trace, reference, cli::SearchLibrary(trace, head, *index, runner),
                            {.candidates = floor.candidates, .audit_samples = 64});
    ASSERT_TRUE(figures.ok());
    EXPECT_GE(figures->recall_at_100, floor.recall_min) << floor.head << " " << floor.candidates;
    EXPECT_LE(figures->error_mean, floor.error_max) << floor.head << " " << floor.candidates;
    EXPECT_NEAR(figures->missed_true, *figures->missed_estimated, 0.1) << floor.head;
    EXPECT_GE(*figures->interval_cover, 0.85) << floor.head << " " << floor.candidates;
  }
}

}  // namespace
}  // namespace kvseek::index
