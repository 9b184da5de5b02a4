#include "bench/roof.h"

#include <cstdlib>

#include "cli/memory_roof.h"

namespace kvseek::bench {

bool Tiny() { return std::getenv("KVSEEK_BENCH_TINY") != nullptr; }

double Roof() {
  static const double roof = cli::MeasureMemoryRoof(1);
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
