// The kernels of product codes: ns a key for what looks at every key, and for encoding. Each
// level's answer is compared with the scalar level's before it is timed.
//
//   kernels_bench --benchmark_filter='Products/avx512-vbmi/.*'
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench/roof.h"
#include "benchmark/benchmark.h"
#include "kernels/cpu/product_codes.h"
#include "kernels/cpu/product_scan.h"
#include "kernels/cpu/simd_level.h"
#include "kernels/cpu/value_sketch.h"
#include "tests/kernels/reference.h"

namespace kvseek::kernels {
namespace {

constexpr int kDim = 128;
constexpr int kSegmentBlocks = 16;
constexpr int kSegmentKeys = kSegmentBlocks * kScanBlock;
constexpr int kHeadsMax = 8;
constexpr size_t kLine = 64;

template <class T>
T* Align(std::vector<T>& storage) {
  const auto address = reinterpret_cast<uintptr_t>(storage.data());
  return storage.data() + (kLine - address % kLine) % kLine / sizeof(T);
}

/// A segment of random codes with tables for random queries.
struct Products {
  explicit Products(int subspaces)
      : layout{subspaces, true},
        code_storage(static_cast<size_t>(kSegmentBlocks * layout.BlockBytes()) + kLine),
        sketch_storage(static_cast<size_t>(kSegmentBlocks * kSketchBlockBytes) + kLine),
        sum_storage(kHeadsMax * kSegmentKeys + kLine),
        weight_storage(kHeadsMax * kSegmentKeys + kLine),
        centroids(reference::RandomElements(1, kDim * kCentroids, 1.0F, DType::kBf16)),
        queries(reference::RandomFloats(2, kHeadsMax * kDim, 0.15F)),
        entries(static_cast<size_t>(kHeadsMax * layout.Symbols() * kTableSize)),
        tables(kHeadsMax) {
    std::mt19937 random(3);
    for (uint8_t& byte : code_storage) byte = static_cast<uint8_t>(random());
    for (uint8_t& byte : sketch_storage) byte = static_cast<uint8_t>(random());
    codes = Align(code_storage);
    sketches = Align(sketch_storage);
    sums = Align(sum_storage);
    weights = Align(weight_storage);
    for (int g = 0; g <= subspaces; ++g) {
      starts.push_back(static_cast<uint32_t>(g * kDim / subspaces));
    }
    for (int c = 0; c < kCentroids; ++c) errors.push_back(0.5F + 0.05F * static_cast<float>(c));
    BuildTables(kHeadsMax);
    Scan(kHeadsMax);
  }

  void BuildTables(int heads) {
    BuildProductTables(queries.data(), heads, kDim, centroids.data(), starts.data(), errors.data(),
                       layout, entries.data(), tables.data());
  }
  void Scan(int heads) {
    ScanProducts(codes, kSegmentBlocks, layout, entries.data(), heads, sums, kSegmentKeys);
  }
  int Select(int heads, bool by_block) {
    ProductHead all[kHeadsMax];
    for (int h = 0; h < heads; ++h) all[h] = {&tables[static_cast<size_t>(h)], 0.0F, 4.5F, 3.0F};
    block_weights.resize(static_cast<size_t>(heads * kSegmentBlocks));
    units.resize(static_cast<size_t>(heads));
    segment_weights.resize(static_cast<size_t>(heads));
    chosen.resize(kSegmentKeys);
    return SelectProducts(
        sums, kSegmentKeys, codes, kSegmentBlocks, weighed, layout, all, heads, 0,
        {chosen.data(), weights, kSegmentKeys, units.data(), segment_weights.data(),
         by_block ? block_weights.data() : nullptr, kSegmentBlocks});
  }
  std::vector<float> Sketches(int heads) {
    std::vector<float> components(static_cast<size_t>(heads * kSketchDim));
    AddSketches(sketches, kSegmentBlocks, weighed, weights, kSegmentKeys, units.data(), heads,
                components.data());
    return components;
  }

  ProductLayout layout;
  WeighedBlocks weighed{};
  std::vector<uint8_t> code_storage;
  std::vector<uint8_t> sketch_storage;
  std::vector<uint8_t> sum_storage;
  std::vector<uint8_t> weight_storage;
  std::vector<uint16_t> centroids;
  std::vector<float> queries;
  std::vector<float> errors;
  std::vector<uint32_t> starts;
  std::vector<uint8_t> entries;
  std::vector<ProductTables> tables;
  std::vector<float> block_weights;
  std::vector<float> segment_weights;
  std::vector<uint32_t> chosen;
  std::vector<float> units;
  uint8_t* codes;
  uint8_t* sketches;
  uint8_t* sums;
  uint8_t* weights;
};

/// Made at the scalar level.
std::unique_ptr<Products> MakeProducts(int subspaces) {
  ForceSimdLevel("scalar");
  return std::make_unique<Products>(subspaces);
}

bool Near(const std::vector<float>& a, const std::vector<float>& b, float share) {
  float most = 0.0F;
  for (const float x : b) most = std::max(most, std::abs(x));
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) <= share * most)) return false;
  }
  return a.size() == b.size();
}

void BenchScanProducts(benchmark::State& state, const std::string& level, int heads,
                       int subspaces) {
  const auto products = MakeProducts(subspaces);
  const std::vector<uint8_t> expected(products->sums, products->sums + heads * kSegmentKeys);
  if (!ForceSimdLevel(level)) return state.SkipWithError("level not supported");
  products->Scan(heads);
  if (!std::equal(expected.begin(), expected.end(), products->sums)) {
    return state.SkipWithError("differs from the scalar level");
  }
  for (auto _ : state) {
    products->Scan(heads);
    benchmark::ClobberMemory();
  }
  const int bytes = products->layout.BlockBytes() * kSegmentBlocks;
  bench::Report(state, bytes, kSegmentKeys);
}

/// `by_block`: with the weights of each block; one in `weighed_step` of which is weighed.
void BenchSelectProducts(benchmark::State& state, const std::string& level, int heads,
                         bool by_block, int weighed_step) {
  const auto products = MakeProducts(11);
  products->weighed.step = weighed_step;
  const int expected = products->Select(heads, by_block);
  const std::vector<float> block_weights = products->block_weights;
  const std::vector<float> weights = products->segment_weights;
  if (!ForceSimdLevel(level)) return state.SkipWithError("level not supported");
  if (products->Select(heads, by_block) != expected ||
      !Near(products->block_weights, block_weights, 1e-4F) ||
      !Near(products->segment_weights, weights, 1e-4F)) {
    return state.SkipWithError("differs from the scalar level");
  }
  for (auto _ : state) benchmark::DoNotOptimize(products->Select(heads, by_block));
  state.counters["chosen"] = expected / static_cast<double>(kSegmentKeys);
  bench::Report(state, 2.0 * heads * kSegmentKeys, kSegmentKeys);
}

void BenchAddSketches(benchmark::State& state, const std::string& level, int heads,
                      int weighed_step) {
  const auto products = MakeProducts(11);
  products->weighed.step = weighed_step;
  products->Select(heads, false);
  const std::vector<float> expected = products->Sketches(heads);
  if (!ForceSimdLevel(level)) return state.SkipWithError("level not supported");
  if (!Near(products->Sketches(heads), expected, 1e-4F)) {
    return state.SkipWithError("differs from the scalar level");
  }
  for (auto _ : state) benchmark::DoNotOptimize(products->Sketches(heads));
  bench::Report(state, (1.0 * heads + kSketchDim / 2.0) * kSegmentKeys, kSegmentKeys);
}

void BenchProductTables(benchmark::State& state, const std::string& level, int heads) {
  const auto products = MakeProducts(11);
  const float base = products->tables[0].base;
  if (!ForceSimdLevel(level)) return state.SkipWithError("level not supported");
  products->BuildTables(heads);
  if (!(std::abs(products->tables[0].base - base) <= 1e-4F)) {
    return state.SkipWithError("differs from the scalar level");
  }
  for (auto _ : state) {
    products->BuildTables(heads);
    benchmark::ClobberMemory();
  }
}

void BenchNearest(benchmark::State& state, const std::string& level) {
  constexpr int kSubspaceDim = 12;
  const auto points = reference::RandomFloats(5, kSegmentKeys * kSubspaceDim, 1.0F);
  const auto centroids = reference::RandomFloats(6, kSubspaceDim * kCentroids, 1.0F);
  std::vector<uint8_t> symbols(kSegmentKeys);
  const auto assign = [&] {
    std::vector<float> squares(kSegmentKeys, 0.0F);
    NearestCentroids(points.data(), kSubspaceDim, kSegmentKeys, centroids.data(), kSubspaceDim,
                     symbols.data(), 1, squares.data());
    return squares;
  };
  ForceSimdLevel("scalar");
  const std::vector<float> expected = assign();
  if (!ForceSimdLevel(level)) return state.SkipWithError("level not supported");
  if (!Near(assign(), expected, 1e-4F)) {
    return state.SkipWithError("differs from the scalar level");
  }
  for (auto _ : state) benchmark::DoNotOptimize(assign());
  bench::Report(state, 4.0 * kSubspaceDim * kSegmentKeys, kSegmentKeys);
}

template <class Function, class... Args>
void Register(const std::string& name, Function function, Args... args) {
  benchmark::RegisterBenchmark(name.c_str(), function, args...)->Unit(benchmark::kMicrosecond);
}

bool RegisterProducts() {
  for (const std::string& level : SupportedSimdLevels()) {
    for (const int heads : {1, 4, 6, 8}) {
      const std::string line = "/" + level + "/heads:" + std::to_string(heads);
      Register("ScanProducts" + line + "/subspaces:11", BenchScanProducts, level, heads, 11);
      Register("ScanProducts" + line + "/subspaces:22", BenchScanProducts, level, heads, 22);
      Register("SelectProducts" + line, BenchSelectProducts, level, heads, false, 1);
      Register("SelectProducts" + line + "/by_block", BenchSelectProducts, level, heads, true, 1);
      Register("SelectProducts" + line + "/weighed:4", BenchSelectProducts, level, heads, false, 4);
      Register("AddSketches" + line, BenchAddSketches, level, heads, 1);
      Register("AddSketches" + line + "/weighed:4", BenchAddSketches, level, heads, 4);
      Register("BuildProductTables" + line, BenchProductTables, level, heads);
    }
    Register("NearestCentroids/" + level, BenchNearest, level);
  }
  return true;
}

[[maybe_unused]] const bool kRegistered = RegisterProducts();

}  // namespace
}  // namespace kvseek::kernels
