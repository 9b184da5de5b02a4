#include "bench/roof.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <vector>

namespace kvseek::bench {
namespace {

std::vector<uint64_t> MakeBuffer() {
  const size_t bytes = Tiny() ? size_t{1} << 20 : size_t{256} << 20;
  return std::vector<uint64_t>(bytes / sizeof(uint64_t), 1);
}

/// Reads every cache line once; eight independent sums, so that additions do not limit it.
void ReadBuffer(const std::vector<uint64_t>& buffer) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i + 8 <= buffer.size(); i += 8) {
    for (size_t s = 0; s < 8; ++s) sums[s] += buffer[i + s];
  }
  benchmark::DoNotOptimize(sums);
}

void MemoryRead(benchmark::State& state) {
  const std::vector<uint64_t> buffer = MakeBuffer();
  for (auto _ : state) ReadBuffer(buffer);
  const double bytes = static_cast<double>(buffer.size() * sizeof(uint64_t));
  Report(state, bytes, bytes / 256);  // a key of 128 bf16 elements
}

BENCHMARK(MemoryRead)->Unit(benchmark::kMillisecond);

}  // namespace

bool Tiny() { return std::getenv("KVSEEK_BENCH_TINY") != nullptr; }

double Roof() {
  static const double roof = [] {
    const std::vector<uint64_t> buffer = MakeBuffer();
    const double bytes = static_cast<double>(buffer.size() * sizeof(uint64_t));
    double best = 0;
    for (int pass = 0; pass < 8; ++pass) {
      // Processor time, as the lines' own rates have it: another program's share is not ours.
      const std::clock_t start = std::clock();
      ReadBuffer(buffer);
      const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
      best = std::max(best, bytes / std::max(seconds, 1e-6));
    }
    return best;
  }();
  return roof;
}

void Report(benchmark::State& state, double bytes, double keys) {
  using benchmark::Counter;
  const auto iterations = static_cast<double>(state.iterations());
  state.counters["GB/s"] = Counter(iterations * bytes / 1e9, Counter::kIsRate);
  state.counters["of_roof"] = Counter(iterations * bytes / Roof(), Counter::kIsRate);
  state.counters["ns/key"] = Counter(iterations * keys / 1e9, Counter::kIsRate | Counter::kInvert);
}

}  // namespace kvseek::bench
