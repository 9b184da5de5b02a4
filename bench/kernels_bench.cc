// Exact attention's kernels against the memory roof. Every line reports the rows' bytes as GB/s,
// and of_roof, their ratio to what one thread can read from memory here (measured first). Each
// kernel's answer is compared with the double-precision reference before it is timed.
//
//   kernels_bench --benchmark_filter=AttendRows/avx2
//
// KVSEEK_BENCH_TINY=1 makes everything small, to see that it runs; its numbers mean nothing.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/roof.h"
#include "benchmark/benchmark.h"
#include "kernels/attention_state.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/rotation.h"
#include "kernels/cpu/simd_level.h"
#include "tests/kernels/reference.h"

namespace kvseek::kernels {
namespace {

constexpr int kDim = 128;
constexpr int kChecked = 200;    // rows of the comparison with the reference
constexpr int kGathered = 4096;  // rows of one gathered call

/// A group's head cache, larger than the caches unless tiny.
struct HeadCache {
  HeadCache() : tokens(bench::Tiny() ? 1024 : 128 * 1024) {
    // Distinct random rows would take seconds to draw; repeating some costs memory time all the
    // same.
    const auto row_elements = static_cast<size_t>(kDim);
    const auto some_keys = reference::RandomElements(1, 1024 * row_elements, 1.0F, DType::kBf16);
    const auto some_values = reference::RandomElements(2, 1024 * row_elements, 1.0F, DType::kBf16);
    for (int t = 0; t < tokens; t += 1024) {
      keys.insert(keys.end(), some_keys.begin(), some_keys.end());
      values.insert(values.end(), some_values.begin(), some_values.end());
    }
    queries = reference::RandomFloats(3, 64 * row_elements, 0.2F);
    std::vector<int> order(static_cast<size_t>(tokens));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(4));
    for (const int t : order) {
      key_rows.push_back(keys.data() + static_cast<size_t>(t) * row_elements);
      value_rows.push_back(values.data() + static_cast<size_t>(t) * row_elements);
    }
  }

  int tokens;
  std::vector<uint16_t> keys;
  std::vector<uint16_t> values;
  std::vector<float> queries;
  std::vector<const uint16_t*> key_rows;  // in random order
  std::vector<const uint16_t*> value_rows;
};

const HeadCache& Cache() {
  static const auto* cache = new HeadCache();
  return *cache;
}

/// Largest difference of scores (group, count) from the reference's, over the rows given.
double ScoreError(const std::vector<float>& scores, int group, int count,
                  const std::function<const uint16_t*(int)>& row) {
  double error = 0;
  for (int t = 0; t < count; ++t) {
    const std::vector<double> expected =
        reference::Scores(Cache().queries.data(), group, row(t), DType::kBf16, 1, kDim);
    for (int h = 0; h < group; ++h) {
      const auto actual = static_cast<double>(scores[static_cast<size_t>(h * count + t)]);
      error = std::max(error, std::fabs(actual - expected[static_cast<size_t>(h)]));
    }
  }
  return error;
}

double AttendError(int group) {
  const HeadCache& cache = Cache();
  std::vector<float> storage(static_cast<size_t>(GroupStateFloats(group, kDim)));
  const GroupState attended = BindState(storage.data(), group, kDim);
  ResetState(attended);
  AttendRows(cache.queries.data(), cache.keys.data(), cache.values.data(), DType::kBf16, kChecked,
             kDim, attended);
  const auto scores = reference::Scores(cache.queries.data(), group, cache.keys.data(),
                                        DType::kBf16, kChecked, kDim);
  const auto error = reference::Compare(
      reference::Attend(scores, group, cache.values.data(), DType::kBf16, kChecked, kDim),
      attended);
  return std::max(error.out, error.lse);
}

/// Sets the level, or marks the line as failed.
bool Begin(benchmark::State& state, const std::string& level, double (*error)(int), int group) {
  if (!ForceSimdLevel(level)) {
    state.SkipWithError("level not supported");
    return false;
  }
  if (!(error(group) < 1e-4)) {
    state.SkipWithError("differs from the reference");
    return false;
  }
  return true;
}

void BenchScoreRows(benchmark::State& state, const std::string& level, int group) {
  const HeadCache& cache = Cache();
  const auto error = [](int heads) {
    std::vector<float> scores(static_cast<size_t>(heads * kChecked));
    ScoreRows(Cache().queries.data(), heads, Cache().keys.data(), DType::kBf16, kChecked, kDim,
              scores.data(), kChecked);
    return ScoreError(scores, heads, kChecked,
                      [](int t) { return Cache().keys.data() + t * kDim; });
  };
  if (!Begin(state, level, error, group)) return;
  std::vector<float> scores(static_cast<size_t>(group) * static_cast<size_t>(cache.tokens));
  for (auto _ : state) {
    ScoreRows(cache.queries.data(), group, cache.keys.data(), DType::kBf16, cache.tokens, kDim,
              scores.data(), cache.tokens);
    benchmark::ClobberMemory();
  }
  bench::Report(state, static_cast<double>(cache.keys.size()) * 2, cache.tokens);
}

void BenchScoreGathered(benchmark::State& state, const std::string& level, int group) {
  const HeadCache& cache = Cache();
  const auto error = [](int heads) {
    std::vector<float> scores(static_cast<size_t>(heads * kChecked));
    ScoreGathered(Cache().queries.data(), heads, Cache().key_rows.data(), DType::kBf16, kChecked,
                  kDim, scores.data(), kChecked);
    return ScoreError(scores, heads, kChecked,
                      [](int t) { return Cache().key_rows[static_cast<size_t>(t)]; });
  };
  if (!Begin(state, level, error, group)) return;
  const int count = std::min(kGathered, cache.tokens);
  std::vector<float> scores(static_cast<size_t>(group * count));
  int first = 0;  // every call gathers other rows, so that they come from memory
  for (auto _ : state) {
    ScoreGathered(cache.queries.data(), group, cache.key_rows.data() + first, DType::kBf16, count,
                  kDim, scores.data(), count);
    benchmark::ClobberMemory();
    first = (first + count) % cache.tokens;
  }
  bench::Report(state, 2.0 * kDim * count, count);
}

void BenchAttendRows(benchmark::State& state, const std::string& level, int group) {
  if (!Begin(state, level, AttendError, group)) return;
  const HeadCache& cache = Cache();
  std::vector<float> storage(static_cast<size_t>(GroupStateFloats(group, kDim)));
  const GroupState attended = BindState(storage.data(), group, kDim);
  for (auto _ : state) {
    ResetState(attended);
    AttendRows(cache.queries.data(), cache.keys.data(), cache.values.data(), DType::kBf16,
               cache.tokens, kDim, attended);
    benchmark::ClobberMemory();
  }
  bench::Report(state, static_cast<double>(cache.keys.size()) * 4, cache.tokens);
}

/// Scores, then attends to rows in random places: what reading candidates exactly costs.
void AttendGathered(int group, const uint16_t* const* key_rows, const uint16_t* const* value_rows,
                    int count, float* scores, const GroupState& attended) {
  ScoreGathered(Cache().queries.data(), group, key_rows, DType::kBf16, count, kDim, scores, count);
  AccumulateScoredGathered(scores, count, value_rows, DType::kBf16, count, attended);
}

double AttendGatheredError(int group) {
  const HeadCache& cache = Cache();
  std::vector<float> storage(static_cast<size_t>(GroupStateFloats(group, kDim)));
  std::vector<float> scores(static_cast<size_t>(group * kChecked));
  const GroupState attended = BindState(storage.data(), group, kDim);
  ResetState(attended);
  AttendGathered(group, cache.key_rows.data(), cache.value_rows.data(), kChecked, scores.data(),
                 attended);
  std::vector<uint16_t> keys;
  std::vector<uint16_t> values;
  for (size_t t = 0; t < kChecked; ++t) {
    keys.insert(keys.end(), cache.key_rows[t], cache.key_rows[t] + kDim);
    values.insert(values.end(), cache.value_rows[t], cache.value_rows[t] + kDim);
  }
  const auto expected = reference::Attend(
      reference::Scores(cache.queries.data(), group, keys.data(), DType::kBf16, kChecked, kDim),
      group, values.data(), DType::kBf16, kChecked, kDim);
  const auto error = reference::Compare(expected, attended);
  return std::max(error.out, error.lse);
}

void BenchAttendGathered(benchmark::State& state, const std::string& level, int group) {
  if (!Begin(state, level, AttendGatheredError, group)) return;
  const HeadCache& cache = Cache();
  const int count = std::min(kGathered, cache.tokens);
  std::vector<float> storage(static_cast<size_t>(GroupStateFloats(group, kDim)));
  std::vector<float> scores(static_cast<size_t>(group * count));
  const GroupState attended = BindState(storage.data(), group, kDim);
  int first = 0;
  for (auto _ : state) {
    ResetState(attended);
    AttendGathered(group, cache.key_rows.data() + first, cache.value_rows.data() + first, count,
                   scores.data(), attended);
    benchmark::ClobberMemory();
    first = (first + count) % cache.tokens;
  }
  bench::Report(state, 4.0 * kDim * count, count);
}

void BenchRotate(benchmark::State& state, const std::string& level, int dim) {
  const auto error = [](int checked_dim) {
    const auto in = reference::RandomFloats(5, static_cast<size_t>(checked_dim), 1.0F);
    std::vector<float> out(static_cast<size_t>(PaddedDim(checked_dim)));
    Rotate(in.data(), 1, checked_dim, out.data());
    const std::vector<double> expected = reference::Rotate(in.data(), checked_dim);
    double largest = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      largest = std::max(largest, std::fabs(static_cast<double>(out[i]) - expected[i]));
    }
    return largest;
  };
  if (!Begin(state, level, error, dim)) return;
  constexpr int kRows = 1024;
  const auto in = reference::RandomFloats(6, static_cast<size_t>(kRows * dim), 1.0F);
  std::vector<float> out(static_cast<size_t>(kRows * PaddedDim(dim)));
  for (auto _ : state) {
    Rotate(in.data(), kRows, dim, out.data());
    benchmark::ClobberMemory();
  }
  bench::Report(state, 4.0 * kRows * (dim + PaddedDim(dim)), kRows);
}

using GroupBench = void (*)(benchmark::State&, const std::string&, int);

void RegisterAttention() {
  const struct {
    const char* name;
    GroupBench bench;
  } kBenches[] = {{"ScoreRows", BenchScoreRows},
                  {"ScoreGathered", BenchScoreGathered},
                  {"AttendRows", BenchAttendRows},
                  {"AttendGathered", BenchAttendGathered}};
  for (const auto& [name, bench] : kBenches) {
    for (const std::string& level : SupportedSimdLevels()) {
      for (const int group : {4, 6}) {
        const std::string line =
            std::string(name) + "/" + level + "/group:" + std::to_string(group);
        benchmark::RegisterBenchmark(line.c_str(), bench, level, group)
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
  for (const std::string& level : SupportedSimdLevels()) {
    for (const int dim : {96, 128}) {
      const std::string line = "Rotate/" + level + "/dim:" + std::to_string(dim);
      benchmark::RegisterBenchmark(line.c_str(), BenchRotate, level, dim)
          ->Unit(benchmark::kMicrosecond);
    }
  }
}

}  // namespace
}  // namespace kvseek::kernels

int main(int argc, char** argv) {
  std::vector<char*> arguments(argv, argv + argc);
  std::string brief = "--benchmark_min_time=0.001";
  if (kvseek::bench::Tiny()) arguments.insert(arguments.begin() + 1, brief.data());
  int count = static_cast<int>(arguments.size());
  arguments.push_back(nullptr);
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 1;
  kvseek::kernels::RegisterAttention();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
