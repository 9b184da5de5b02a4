// What a memory-bound kernel is measured against, and how its line is reported.
#ifndef KVSEEK_BENCH_ROOF_H_
#define KVSEEK_BENCH_ROOF_H_

#include "benchmark/benchmark.h"

namespace kvseek::bench {

/// Whether KVSEEK_BENCH_TINY asks for small inputs, to see that everything runs. Numbers then mean
/// nothing.
bool Tiny();

/// Bytes a second that one thread reads from memory here. Measured at the first call.
double Roof();

/// Adds GB/s, of_roof (its ratio to Roof) and ns/key to a line whose iterations each touched that
/// many bytes and keys.
void Report(benchmark::State& state, double bytes, double keys);

}  // namespace kvseek::bench

#endif  // KVSEEK_BENCH_ROOF_H_
