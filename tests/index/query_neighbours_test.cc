#include "index/query_neighbours.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "index/selection.h"
#include "kernels/cpu/attention.h"
#include "tests/index/random_trace.h"
#include "tests/index/recorded_trace.h"

namespace kvseek::index {
namespace {

BuildInput InputOf(const cli::HeadTrace& trace, const cli::StoredHead& head, size_t samples) {
  BuildInput input;
  input.view = head.view();
  input.group = trace.group;
  input.queries = trace.prefill_queries;
  input.query_positions = absl::MakeConstSpan(trace.prefill_positions).subspan(0, samples);
  return input;
}

std::vector<uint32_t> BruteForce(const cli::HeadTrace& trace, const float* query, int64_t end,
                                 int count) {
  std::vector<std::pair<double, uint32_t>> scored;
  for (int64_t t = 0; t < end; ++t) {
    double score = 0.0;
    for (int d = 0; d < trace.key_dim; ++d) {
      score += double{query[d]} * kernels::LoadElement(trace.keys.data(), trace.dtype,
                                                       static_cast<size_t>(t * trace.key_dim + d));
    }
    scored.emplace_back(-score, static_cast<uint32_t>(t));
  }
  const auto kept = std::min<size_t>(scored.size(), static_cast<size_t>(count));
  std::partial_sort(scored.begin(), scored.begin() + static_cast<ptrdiff_t>(kept), scored.end());
  std::vector<uint32_t> keys(static_cast<size_t>(count), QueryNeighbours::kNoKey);
  for (size_t i = 0; i < kept; ++i) keys[i] = scored[i].second;
  return keys;
}

/// Share of the keys of `truth` that `found` has too, row by row.
double Shared(const QueryNeighbours& truth, const QueryNeighbours& found) {
  const auto width = static_cast<size_t>(truth.per_query);
  size_t shared = 0;
  size_t all = 0;
  for (size_t at = 0; at < truth.keys.size(); at += width) {
    for (size_t i = 0; i < width && truth.keys[at + i] != QueryNeighbours::kNoKey; ++i, ++all) {
      const auto row = found.keys.begin() + static_cast<ptrdiff_t>(at);
      shared += std::find(row, row + truth.per_query, truth.keys[at + i]) != row + truth.per_query;
    }
  }
  return static_cast<double>(shared) / static_cast<double>(all);
}

TEST(QueryNeighboursTest, ExactEqualsBruteForce) {
  cli::HeadTrace trace = RandomTrace({.tokens = 2100, .key_dim = 80, .group = 3, .steps = 6});
  trace.prefill_queries = trace.queries;
  trace.prefill_positions = {0, 5, 63, 1000, 2050, 2099};
  const cli::StoredHead head(trace, 2);
  const QueryNeighbours found =
      FindQueryNeighbours(InputOf(trace, head, 6), 2048, 20, NeighbourSearch::kExact);
  ASSERT_EQ(found.keys.size(), size_t{6 * 3 * 20});
  for (size_t row = 0; row < 18; ++row) {
    const int64_t end = std::min<int64_t>(trace.prefill_positions[row / 3] + 1, 2048);
    const float* const query = trace.prefill_queries.data() + row * 80;
    const std::vector<uint32_t> got(found.keys.begin() + static_cast<ptrdiff_t>(row * 20),
                                    found.keys.begin() + static_cast<ptrdiff_t>(row * 20 + 20));
    EXPECT_EQ(got, BruteForce(trace, query, end, 20)) << row;
  }
}

TEST(QueryNeighboursTest, CodesFindNearlyAll) {
  const cli::HeadTrace trace = RecordedTrace("layer20.kv0");
  for (const int bits : {1, 2}) {
    const cli::StoredHead head(trace, bits);
    const BuildInput input = InputOf(trace, head, 1024);
    const QueryNeighbours exact = FindQueryNeighbours(input, 7168, 64, NeighbourSearch::kExact);
    const QueryNeighbours codes = FindQueryNeighbours(input, 7168, 64, NeighbourSearch::kCodes);
    EXPECT_GE(Shared(exact, codes), bits == 1 ? 0.9 : 0.97) << bits;
    const QueryNeighbours chosen = FindQueryNeighbours(input, 7168, 64);
    EXPECT_GE(Shared(exact, chosen), Shared(exact, codes)) << bits;
  }
}

TEST(QueryNeighboursTest, EndsWhenTold) {
  cli::HeadTrace trace = RandomTrace({.tokens = 1100});
  trace.prefill_queries = trace.queries;
  trace.prefill_positions = {10, 20, 30, 40};
  const cli::StoredHead head(trace, 2);
  BuildInput input = InputOf(trace, head, 4);
  input.give_up = [] { return true; };
  EXPECT_TRUE(FindQueryNeighbours(input, 1024, 8).keys.empty());
}

}  // namespace
}  // namespace kvseek::index
