// The ladder's kernels: ns a key for what looks at every key, ns a candidate for the 4-bit rung.
// Each level's answer is compared with the scalar level's, or with the reference, before it is
// timed.
//
//   kernels_bench --benchmark_filter='ScanCodes/avx512-vbmi/.*'
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "bench/roof.h"
#include "benchmark/benchmark.h"
#include "kernels/attention_state.h"
#include "kernels/cpu/ladder_codes.h"
#include "kernels/cpu/ladder_fine.h"
#include "kernels/cpu/ladder_scan.h"
#include "kernels/cpu/ladder_select.h"
#include "kernels/cpu/simd_level.h"
#include "kernels/cpu/threshold.h"
#include "tests/kernels/ladder_reference.h"
#include "tests/kernels/reference.h"

namespace kvseek::kernels {
namespace {

constexpr int kDim = 128;
constexpr int kValueDim = 128;
constexpr int kSymbols = Symbols(kDim);
constexpr int kSegmentKeys = 1024;
constexpr int kSegmentBlocks = kSegmentKeys / kScanBlock;
constexpr int kHeadsMax = 8;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
struct AlignedDelete {
  void operator()(T* data) const { ::operator delete (data, std::align_val_t{64}); }
};
template <class T>
using Aligned = std::unique_ptr<T[], AlignedDelete<T>>;

template <class T>
Aligned<T> MakeAligned(size_t count) {
  void* memory = ::operator new (count * sizeof(T), std::align_val_t{64});
  std::memset(memory, 0, count * sizeof(T));
  return Aligned<T>(static_cast<T*>(memory));
}

/// A head cache's codes and the tables of its queries. Segments repeat the first one's codes: that
/// costs memory time all the same.
struct Ladder {
  Ladder() : segments(bench::Tiny() ? 2 : 128) {
    residuals = reference::RandomFloats(1, static_cast<size_t>(kSegmentKeys * kDim), 1.0F);
    values = reference::RandomElements(2, static_cast<size_t>(kSegmentKeys * kValueDim), 1.0F,
                                       DType::kBf16);
    for (int planes = 1; planes <= 2; ++planes) {
      const size_t bytes = SegmentBytes(planes);
      scan[planes - 1] = MakeAligned<uint8_t>(bytes * static_cast<size_t>(segments));
      uint8_t* codes = scan[planes - 1].get();
      noise[planes - 1] = EncodeScanBlocks(residuals.data(), kSegmentBlocks, kDim, planes, codes);
      for (int s = 1; s < segments; ++s)
        std::memcpy(codes + static_cast<size_t>(s) * bytes, codes, bytes);
    }
    const auto record_bytes = static_cast<size_t>(kSegmentKeys * FineRecordBytes(kDim, kValueDim));
    records = MakeAligned<uint8_t>(record_bytes * static_cast<size_t>(segments));
    factors = MakeAligned<FineFactors>(static_cast<size_t>(kSegmentKeys * segments));
    EncodeFine(residuals.data(), values.data(), DType::kBf16, kSegmentKeys, kDim, kValueDim,
               records.get(), factors.get());
    for (int s = 1; s < segments; ++s) {
      std::memcpy(records.get() + static_cast<size_t>(s) * record_bytes, records.get(),
                  record_bytes);
      std::memcpy(factors.get() + s * kSegmentKeys, factors.get(),
                  kSegmentKeys * sizeof(FineFactors));
    }
    const auto queries = reference::RandomFloats(3, kHeadsMax * kDim, 1.0F);
    tables = MakeAligned<int8_t>(static_cast<size_t>(kHeadsMax * kSymbols * kTableSize));
    BuildTables(queries.data(), kHeadsMax, kDim, tables.get(), units);
    quantised = MakeAligned<int8_t>(kHeadsMax * kDim);
    float fine_units[kHeadsMax];
    QuantiseQueries(queries.data(), kHeadsMax, kDim, quantised.get(), fine_units);
    const float scale = 1.0F / std::sqrt(static_cast<float>(kDim));
    for (int h = 0; h < kHeadsMax; ++h) {
      slopes.push_back(scale * fine_units[h] * kFourBitStep / 2.0F);
    }
    for (uint32_t i = 0; i < kSegmentKeys; i += 32) chosen.push_back(i + i / 32 * 7 % 32);
  }

  static size_t SegmentBytes(int planes) {
    return static_cast<size_t>(kSegmentBlocks * ScanBlockBytes(kSymbols, planes));
  }

  /// Heads that choose 1 % of the keys each, or none.
  std::vector<ScanHead> ScanHeads(int planes, bool none_chosen) const {
    const float scale = 1.0F / std::sqrt(static_cast<float>(kDim));
    std::vector<ScanHead> heads;
    for (const float unit : units) {
      const float sum_unit = planes == 2 ? unit * kTwoBitStep / 2.0F : unit;
      heads.push_back(
          {0.0F, scale * sum_unit, noise[planes - 1], none_chosen ? kInfinity : 2.6F, 3.0F});
    }
    return heads;
  }

  int segments;
  std::vector<float> residuals;
  std::vector<uint16_t> values;
  Aligned<uint8_t> scan[2];
  float noise[2];
  Aligned<uint8_t> records;
  Aligned<FineFactors> factors;
  Aligned<int8_t> tables;
  float units[kHeadsMax];
  Aligned<int8_t> quantised;
  std::vector<float> slopes;     // of the 4-bit rung
  std::vector<uint32_t> chosen;  // 32 of a segment
};

const Ladder& TheLadder() {
  static const auto* ladder = new Ladder();
  return *ladder;
}

void BenchScan(benchmark::State& state, const std::string& level, int heads, int planes) {
  const Ladder& ladder = TheLadder();
  if (!ForceSimdLevel(level)) return state.SkipWithError("level not supported");
  const auto sums = MakeAligned<int16_t>(kHeadsMax * kSegmentKeys);
  const uint8_t* codes = ladder.scan[planes - 1].get();
  const auto scan = [&](int segment) {
    ScanCodes(codes + static_cast<size_t>(segment) * Ladder::SegmentBytes(planes), kSegmentBlocks,
              kSymbols, planes, ladder.tables.get(), heads, sums.get(), kSegmentKeys);
  };
  scan(0);
  const auto expected =
      reference::ScanSums(codes, kSegmentBlocks, kSymbols, planes, ladder.tables.get(), heads);
  if (!std::equal(expected.begin(), expected.end(), sums.get())) {
    return state.SkipWithError("differs from the reference");
  }
  for (auto _ : state) {
    for (int s = 0; s < ladder.segments; ++s) scan(s);
    benchmark::ClobberMemory();
  }
  bench::Report(state, static_cast<double>(Ladder::SegmentBytes(planes)) * ladder.segments,
                kSegmentKeys * ladder.segments);
}

/// Selects 1 % of the keys for each head, or none: with none, what merely looking costs. One block
/// in `weighed_step` is weighed.
void BenchSelect(benchmark::State& state, const std::string& level, int heads, bool none_chosen,
                 int weighed_step) {
  const WeighedBlocks weighed = {0, weighed_step};
  const Ladder& ladder = TheLadder();
  const int planes = 2;
  const auto sums = MakeAligned<int16_t>(kHeadsMax * kSegmentKeys);
  const uint8_t* codes = ladder.scan[planes - 1].get();
  ScanCodes(codes, kSegmentBlocks, kSymbols, planes, ladder.tables.get(), heads, sums.get(),
            kSegmentKeys);
  const std::vector<ScanHead> scan_heads = ladder.ScanHeads(planes, none_chosen);
  std::vector<uint32_t> chosen(kSegmentKeys);
  std::vector<float> weights(static_cast<size_t>(heads * kSegmentBlocks));
  const auto select = [&] {
    return SelectAndWeigh(sums.get(), kSegmentKeys, codes, kSegmentBlocks, weighed, kSymbols,
                          planes, scan_heads.data(), heads, 0, chosen.data(), weights.data(),
                          kSegmentBlocks);
  };
  ForceSimdLevel("scalar");
  const int expected_count = select();
  const std::vector<float> expected = weights;
  if (!ForceSimdLevel(level)) return state.SkipWithError("level not supported");
  bool right = select() == expected_count;
  for (size_t i = 0; i < weights.size(); ++i) {
    right = right && std::abs(weights[i] - expected[i]) <= 1e-3F * expected[i];
  }
  if (!right) return state.SkipWithError("differs from the scalar level");
  for (auto _ : state) benchmark::DoNotOptimize(select());
  state.counters["chosen"] = expected_count / static_cast<double>(kSegmentKeys);
  bench::Report(state, 2.0 * heads * kSegmentKeys, kSegmentKeys);
}

/// 32 candidates of each segment, as a search has them. With one segment they stay in the cache.
void BenchFine(benchmark::State& state, const std::string& level, int heads, bool cached,
               bool values) {
  const Ladder& ladder = TheLadder();
  const int count = static_cast<int>(ladder.chosen.size());
  const int record_bytes = FineRecordBytes(kDim, kValueDim);
  const auto scores = MakeAligned<float>(static_cast<size_t>(heads * count));
  std::vector<float> storage(static_cast<size_t>(GroupStateFloats(heads, kValueDim)));
  const GroupState attended = BindState(storage.data(), heads, kValueDim);
  std::vector<FineRow> rows(static_cast<size_t>(count));
  const auto find = [&](int segment) {
    const int first = segment * kSegmentKeys;
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto key = static_cast<ptrdiff_t>(ladder.chosen[i]) + first;
      rows[i] = {ladder.records.get() + key * record_bytes, ladder.factors.get() + key};
    }
  };
  const auto score = [&](int segment) {
    find(segment);
    std::fill_n(scores.get(), heads * count, 0.0F);
    ScoreFine(rows.data(), count, record_bytes, ladder.quantised.get(), kDim, ladder.slopes.data(),
              heads, scores.get(), count);
  };
  const auto accumulate = [&](int segment) {
    find(segment);
    AccumulateFine(rows.data(), count, FineValueOffset(kDim), scores.get(), count, attended);
  };
  const auto answer = [&] {
    ResetState(attended);
    score(0);
    accumulate(0);
    std::vector<float> out(static_cast<size_t>(heads * kValueDim + heads));
    FinishState(attended, out.data(), out.data() + heads * kValueDim);
    return out;
  };
  ForceSimdLevel("scalar");
  const std::vector<float> expected = answer();
  if (!ForceSimdLevel(level)) return state.SkipWithError("level not supported");
  const std::vector<float> out = answer();
  for (size_t i = 0; i < out.size(); ++i) {
    if (!(std::abs(out[i] - expected[i]) < 1e-4F))
      return state.SkipWithError("differs from the scalar level");
  }
  const int segments = cached ? 1 : ladder.segments;
  for (auto _ : state) {
    for (int s = 0; s < segments; ++s) values ? accumulate(s) : score(s);
    benchmark::ClobberMemory();
  }
  bench::Report(state, 64.0 * count * segments, static_cast<double>(count) * segments);
}

void BenchEncode(benchmark::State& state, const std::string& level, int bits) {
  const Ladder& ladder = TheLadder();
  if (!ForceSimdLevel(level)) return state.SkipWithError("level not supported");
  const auto codes = MakeAligned<uint8_t>(Ladder::SegmentBytes(2));
  const auto records =
      MakeAligned<uint8_t>(static_cast<size_t>(kSegmentKeys * FineRecordBytes(kDim, kValueDim)));
  std::vector<FineFactors> factors(kSegmentKeys);
  const auto encode = [&] {
    return bits == 4
               ? EncodeFine(ladder.residuals.data(), ladder.values.data(), DType::kBf16,
                            kSegmentKeys, kDim, kValueDim, records.get(), factors.data())
               : EncodeScanBlocks(ladder.residuals.data(), kSegmentBlocks, kDim, bits, codes.get());
  };
  double noise = 0.0;
  for (int key = 0; key < kSegmentKeys; ++key) {
    const float* residual = ladder.residuals.data() + key * kDim;
    noise += (bits == 4 ? reference::FineCode(residual, kDim)
                        : reference::ScanCode(residual, kDim, bits))
                 .noise /
             kSegmentKeys;
  }
  if (std::abs(static_cast<double>(encode()) - noise) > 1e-4)
    return state.SkipWithError("differs from the reference");
  for (auto _ : state) benchmark::DoNotOptimize(encode());
  bench::Report(state, 4.0 * kDim * kSegmentKeys, kSegmentKeys);
}

void BenchTables(benchmark::State& state, const std::string& level, int heads) {
  if (!ForceSimdLevel(level)) return state.SkipWithError("level not supported");
  const auto queries = reference::RandomFloats(3, kHeadsMax * kDim, 1.0F);
  const auto tables = MakeAligned<int8_t>(static_cast<size_t>(kHeadsMax * kSymbols * kTableSize));
  float units[kHeadsMax];
  BuildTables(queries.data(), heads, kDim, tables.get(), units);
  if (!std::equal(tables.get(), tables.get() + heads * kSymbols * kTableSize,
                  TheLadder().tables.get())) {
    return state.SkipWithError("differs from another level");
  }
  for (auto _ : state) {
    BuildTables(queries.data(), heads, kDim, tables.get(), units);
    benchmark::ClobberMemory();
  }
}

/// One head's threshold from a sample of 64 blocks: `rank` values reach it.
void BenchThreshold(benchmark::State& state, const std::string& level, int rank) {
  constexpr int kSample = 64 * kScanBlock;
  if (!ForceSimdLevel(level)) return state.SkipWithError("level not supported");
  const auto estimates = reference::RandomFloats(4, kSample, 3.0F);
  std::vector<int32_t> work(kSample);
  const auto threshold = [&] {
    return RankThreshold(estimates.data(), kSample, rank, work.data());
  };
  const float found = threshold();
  const auto reach = std::count_if(estimates.begin(), estimates.end(),
                                   [found](float estimate) { return estimate >= found; });
  if (reach != rank) return state.SkipWithError("others reach it");
  for (auto _ : state) benchmark::DoNotOptimize(threshold());
  bench::Report(state, sizeof(float) * kSample, kSample);
}

template <class Function, class... Args>
void Register(const std::string& name, Function function, Args... args) {
  benchmark::RegisterBenchmark(name.c_str(), function, args...)->Unit(benchmark::kMicrosecond);
}

bool RegisterLadder() {
  for (const std::string& level : SupportedSimdLevels()) {
    for (const int heads : {1, 4, 6, 8}) {
      const std::string line = "/" + level + "/heads:" + std::to_string(heads);
      Register("ScanCodes" + line + "/planes:1", BenchScan, level, heads, 1);
      Register("ScanCodes" + line + "/planes:2", BenchScan, level, heads, 2);
      Register("SelectAndWeigh" + line, BenchSelect, level, heads, false, 1);
      Register("SelectAndWeigh" + line + "/weighed:4", BenchSelect, level, heads, false, 4);
      Register("SelectAndWeighNone" + line, BenchSelect, level, heads, true, 1);
      Register("ScoreFine" + line, BenchFine, level, heads, true, false);
      Register("ScoreFineScattered" + line, BenchFine, level, heads, false, false);
      Register("AccumulateFine" + line, BenchFine, level, heads, true, true);
      Register("AccumulateFineScattered" + line, BenchFine, level, heads, false, true);
      Register("BuildTables" + line, BenchTables, level, heads);
    }
    for (const int rank : {17, 129}) {
      Register("RankThreshold/" + level + "/rank:" + std::to_string(rank), BenchThreshold, level,
               rank);
    }
    for (const int bits : {1, 2, 4}) {
      Register("Encode/" + level + "/bits:" + std::to_string(bits), BenchEncode, level, bits);
    }
  }
  return true;
}

[[maybe_unused]] const bool kRegistered = RegisterLadder();

}  // namespace
}  // namespace kvseek::kernels
