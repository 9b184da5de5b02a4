// One core, one head cache, one group: the ladder against the exact scan-and-attend, as ratios
// within one run.
//
//   index_bench [--tokens 131072] [--group 4] [--rounds 15] [--level LEVEL] [--only INDEX]
//               [--steps] [--format text|json]
//
// Exact and ladder searches alternate over several heads whose rows are far larger than the caches,
// so that each starts cold. Product codes (with value sketches) are trained on the traces' prefill
// queries. Keys and values are the traces of tests/data, repeated with noise;
// queries are recorded decode queries. Each answer's error against the exact one is printed beside
// its time. --steps adds the times of each search's units, run one after the other as the daemon's
// workers run them side by side, which take as long as the longest. Tokens past a multiple of 1024
// are a tail, which is read exactly. KVSEEK_BENCH_TINY=1 makes everything small, to see that it
// runs.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "bench/roof.h"
#include "bench/search_steps.h"
#include "cli/build_index.h"
#include "cli/evaluation.h"
#include "cli/trace.h"
#include "index/key_index.h"
#include "kernels/cpu/simd_level.h"
#include "nlohmann/json.hpp"

namespace kvseek {
namespace {

struct Options {
  int64_t tokens = 131072;
  int group = 4;
  int rounds = 15;
  int candidates = 4096;
  int exact_rows = 64;
  std::string level;
  std::string format = "text";
  std::string only;
  bool steps = false;
  std::string data = KVSEEK_SOURCE_DIR "/tests/data";
};

/// The trace, repeated up to `tokens` with noise of a tenth of each element's size.
cli::HeadTrace Lengthen(cli::HeadTrace trace, const Options& options) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<float> noise(0.9F, 1.1F);
  const auto lengthen = [&](std::vector<uint16_t>& rows, int dim) {
    const size_t have = rows.size();
    rows.resize(static_cast<size_t>(options.tokens) * static_cast<size_t>(dim));
    for (size_t i = have; i < rows.size(); ++i) {
      rows[i] = kernels::FloatToBf16(kernels::Bf16ToFloat(rows[i % have]) * noise(random));
    }
  };
  lengthen(trace.keys, trace.key_dim);
  lengthen(trace.values, trace.value_dim);
  trace.tokens = options.tokens;
  return trace;
}

struct Contender {
  std::string name;
  const index::KeyIndex* index;  ///< null: product codes of each head
  int scan_bits;
  int subspaces = 0;  ///< of product codes
  std::vector<std::shared_ptr<const index::KeyIndex>> of_heads{};
  std::vector<double> micros{};
  bench::SearchSteps steps{};
  double bytes = 0.0;
  double error = 0.0;
};

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

double MeanError(const index::SearchResult& result, const index::SearchResult& exact, int group,
                 int dim) {
  double sum = 0.0;
  for (int h = 0; h < group; ++h) {
    const auto* truth = exact.out.data() + static_cast<ptrdiff_t>(h) * dim;
    const std::vector<double> expected(truth, truth + dim);
    sum +=
        cli::OutputError(result.out.data() + static_cast<ptrdiff_t>(h) * dim, expected.data(), dim);
  }
  return sum / group;
}

void Measure(const std::vector<cli::HeadTrace>& traces, const Options& options,
             std::vector<Contender>& contenders) {
  std::vector<std::vector<cli::StoredHead>> heads(3);  // by scan bits
  for (const cli::HeadTrace& trace : traces) {
    for (const int bits : {1, 2}) heads[static_cast<size_t>(bits)].emplace_back(trace, bits);
  }
  for (Contender& contender : contenders) {
    for (size_t at = 0; at < traces.size() && contender.index == nullptr; ++at) {
      const cli::BuildSettings settings{.product = {contender.subspaces, true}};
      const index::KvView view = heads[static_cast<size_t>(contender.scan_bits)][at].view();
      contender.of_heads.push_back(cli::BuildIndex("product", traces[at], view, settings));
    }
  }
  index::Scratch scratch;
  const index::SearchOptions search{.candidates = options.candidates,
                                    .exact_rows = options.exact_rows};
  for (int round = -1; round < options.rounds; ++round) {  // the first is for warming up
    const size_t at = static_cast<size_t>(round + 1) % traces.size();
    const cli::HeadTrace& trace = traces[at];
    const int step = (round + 1) * 17 % trace.steps;
    const index::SearchQuery query{trace.StepQueries(step), options.group, 0, trace.tokens};
    index::SearchResult exact;
    for (Contender& contender : contenders) {
      const index::KvView view = heads[static_cast<size_t>(contender.scan_bits)][at].view();
      const index::KeyIndex& index =
          contender.index != nullptr ? *contender.index : *contender.of_heads[at];
      const bool steps = options.steps && round >= 0 && &contender != &contenders.front();
      const auto start = std::chrono::steady_clock::now();
      index::SearchResult result = steps
                                       ? contender.steps.Search(index, view, query, search, scratch)
                                       : index.Search(view, query, search, scratch);
      const std::chrono::duration<double, std::micro> time =
          std::chrono::steady_clock::now() - start;
      if (&contender == &contenders.front()) exact = result;
      if (round < 0) continue;
      contender.micros.push_back(time.count());
      contender.bytes += static_cast<double>(result.report.bytes_touched) / options.rounds;
      contender.error += MeanError(result, exact, options.group, trace.value_dim) / options.rounds;
    }
  }
}

nlohmann::json StepsJson(const Contender& contender) {
  nlohmann::json all = nlohmann::json::array();
  for (const bench::StepTime& step : contender.steps.Times()) {
    all.push_back({{"step", step.name},
                   {"units", step.units},
                   {"unit_micros_p50", step.unit_us},
                   {"unit_micros_best", step.unit_us_best},
                   {"longest_micros_p50", step.longest_us}});
  }
  return all;
}

void PrintSteps(const Contender& contender) {
  for (const bench::StepTime& step : contender.steps.Times()) {
    std::printf("  %-12s %6.0f units %8.1f us each (best %.1f), the longest %.1f\n",
                step.name.c_str(), step.units, step.unit_us, step.unit_us_best, step.longest_us);
  }
}

void Print(const Options& options, const std::vector<Contender>& contenders) {
  const double exact = Median(contenders.front().micros);
  nlohmann::json results = nlohmann::json::array();
  if (options.format == "text") {
    std::printf("%lld tokens, group %d, %s, one thread; roof %.1f GB/s\n",
                static_cast<long long>(options.tokens), options.group, kernels::SimdLevel().c_str(),
                bench::Roof() / 1e9);
    std::printf("%-14s %10s %8s %8s %9s %8s %8s\n", "index", "us", "of exact", "MB", "GB/s",
                "of roof", "error");
  }
  for (const Contender& contender : contenders) {
    const double micros = Median(contender.micros);
    const double rate = contender.bytes / (micros * 1e-6);
    if (options.format == "text") {
      std::printf("%-14s %10.0f %8.3f %8.2f %9.2f %8.2f %8.4f\n", contender.name.c_str(), micros,
                  micros / exact, contender.bytes / 1e6, rate / 1e9, rate / bench::Roof(),
                  contender.error);
      PrintSteps(contender);
    }
    results.push_back({{"index", contender.name},
                       {"micros_p50", micros},
                       {"of_exact", micros / exact},
                       {"bytes_touched", contender.bytes},
                       {"of_roof", rate / bench::Roof()},
                       {"error", contender.error},
                       {"steps", StepsJson(contender)}});
  }
  if (options.format == "json") {
    const nlohmann::json all = {{"tokens", options.tokens},
                                {"group", options.group},
                                {"simd_level", kernels::SimdLevel()},
                                {"roof_bytes_per_second", bench::Roof()},
                                {"results", results}};
    std::printf("%s\n", all.dump(2).c_str());
  }
}

int Run(int argc, char** argv) {
  Options options;
  CLI::App app("The ladder against exact attention, on one core.");
  app.add_option("--tokens", options.tokens)->check(CLI::Range(8192, 1 << 22));
  app.add_option("--group", options.group)->check(CLI::Range(1, 6));
  app.add_option("--rounds", options.rounds)->check(CLI::Range(1, 100000));
  app.add_option("--candidates", options.candidates)->check(CLI::Range(1, 1 << 20));
  app.add_option("--exact", options.exact_rows)->check(CLI::Range(0, 1 << 16));
  app.add_option("--level", options.level, "SIMD level");
  app.add_option("--format", options.format)->check(CLI::IsMember({"text", "json"}));
  app.add_option("--only", options.only, "one index beside exact, e.g. \"product 11\"");
  app.add_flag("--steps", options.steps, "times of each step's units");
  app.add_option("--data", options.data, "folder of the traces");
  CLI11_PARSE(app, argc, argv);
  if (bench::Tiny()) {
    options.tokens = 16384;
    options.rounds = 1;
  }
  if (!kernels::ApplySimdLevelFromEnvironment() || !kernels::ForceSimdLevel(options.level)) {
    std::fprintf(stderr, "index_bench: SIMD level %s is not supported here\n",
                 options.level.c_str());
    return 2;
  }
  std::vector<cli::HeadTrace> traces;
  for (const std::string name : {"layer15.kv1", "layer20.kv0"}) {
    auto trace = cli::LoadHeadTrace(options.data + "/code8." + name + ".safetensors",
                                    options.data + "/code8.queries.safetensors", name);
    if (!trace.ok()) {
      std::fprintf(stderr, "index_bench: %s\n", std::string(trace.status().message()).c_str());
      return 1;
    }
    traces.push_back(Lengthen(*std::move(trace), options));
  }
  std::vector<Contender> contenders = {{"exact", &index::ExactIndex(), 2},
                                       {"ladder 2 bits", &index::LadderIndex(), 2},
                                       {"ladder 1 bit", &index::LadderIndex(), 1},
                                       {"product 22", nullptr, 1, 22},
                                       {"product 11", nullptr, 1, 11}};
  if (!options.only.empty()) {
    std::erase_if(contenders, [&](const Contender& contender) {
      return contender.name != "exact" && contender.name != options.only;
    });
  }
  Measure(traces, options, contenders);
  for (const Contender& contender : contenders) {
    if (!(contender.error < 0.5)) {
      std::fprintf(stderr, "index_bench: %s is off by %.3f\n", contender.name.c_str(),
                   contender.error);
      return 1;
    }
  }
  Print(options, contenders);
  return 0;
}

}  // namespace
}  // namespace kvseek

int main(int argc, char** argv) { return kvseek::Run(argc, argv); }
