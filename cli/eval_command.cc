// kvseek eval: measures indexes on recorded attention heads.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "cli/daemon_search.h"
#include "cli/eval_flags.h"
#include "cli/eval_results.h"
#include "cli/evaluation.h"
#include "cli/library_search.h"
#include "cli/trace_flags.h"
#include "index/product_index.h"
#include "kernels/cpu/simd_level.h"

namespace kvseek::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kDefaultScanBits = 2;  // of heads whose sign codes are not read

/// Evaluates the indexes asked for on one head.
class HeadRun {
 public:
  HeadRun(const EvalFlags& flags, const HeadTrace& trace, KvClient* client, PieceRunner& runner,
          std::vector<EvalResult>& results)
      : flags_(flags), trace_(trace), client_(client), runner_(runner), results_(results) {}

  absl::Status Run() {
    ReferenceOptions options;
    if (flags_.Asks("oracle")) options.oracle_ks = flags_.exact;
    std::vector<int> steps = SpreadSteps(trace_.steps, flags_.steps);
    if (flags_.policy.reuse > 0) std::iota(steps.begin(), steps.end(), 0);
    reference_ = ComputeReference(trace_, steps, options);
    for (const std::string& index : flags_.indexes) {
      if (absl::Status status = RunIndex(index); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

 private:
  /// Who is asked, and where it is an index of this process, which one and what it reads.
  struct Asked {
    SearchFunction search;
    const index::KeyIndex* index = nullptr;
    const StoredHead* stored = nullptr;
  };

  absl::Status RunIndex(const std::string& index) {
    if (index == "oracle") {
      for (size_t i = 0; i < reference_.oracles.size(); ++i) {
        Add(index, {{"exact", reference_.oracles[i].k}}, EvaluateOracle(trace_, reference_, i));
      }
      return absl::OkStatus();
    }
    if (index == "exact") return RunStored(index, nullptr);
    if (index == "landmark") {
      for (const std::string& summary : flags_.summaries) {
        BuildSettings build = flags_.build;
        build.summary = summary;
        if (absl::Status status = RunBuilt(index, build); !status.ok()) return status;
      }
      return absl::OkStatus();
    }
    if (IsBuilt(index)) return RunBuilt(index, flags_.build);
    for (const std::string& name : flags_.scans) {
      const ScanName& scan = FindScan(name);
      absl::Status status = scan.sign_bits > 0 ? RunStored(index, &scan) : RunProduct(scan);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  Json LadderSettings(const std::string& scan, const index::SearchOptions& options) const {
    return {{"scan", scan},
            {"candidates", options.candidates},
            {"exact", options.exact_rows},
            {"audit", flags_.audit},
            {"seed", flags_.seed}};
  }

  index::SearchOptions LadderOptions(int candidates) const {
    index::SearchOptions options;
    options.audit_samples = flags_.audit;
    options.seed = flags_.seed;
    options.candidates = candidates;
    options.exact_rows = static_cast<int>(flags_.exact[0]);
    return options;
  }

  absl::Status RunProduct(const ScanName& scan) {
    for (const int components : flags_.sketches) {
      const kernels::ProductLayout layout = {scan.subspaces, components > 0};
      absl::Status status = client_ != nullptr ? ServeProduct(scan) : RunProduct(scan, layout);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::Status ServeProduct(const ScanName& scan) {
    auto remote = DaemonHead::Open(*client_, trace_, kDefaultScanBits, IndexKind::kProduct);
    if (!remote.ok()) return remote.status();
    return EvaluateProduct(scan.name, kernels::ProductLayout().sketch,
                           {(*remote)->Search(IndexKind::kProduct)});
  }

  absl::Status RunProduct(const ScanName& scan, const kernels::ProductLayout& layout) {
    BuildSettings build;
    build.product = layout;
    const StoredHead stored(trace_, kDefaultScanBits);
    const auto built = BuildIndex("product", trace_, stored.view(), build);
    if (built == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          trace_.name, ": ", scan.name, " needs a full segment of ", index::kSegmentTokens,
          " tokens and prefill queries of ", index::kProductQueriesMin));
    }
    const size_t first = results_.size();
    absl::Status status = EvaluateProduct(scan.name, layout.sketch, AskHere(stored, *built));
    for (size_t i = first; i < results_.size(); ++i) {
      results_[i].build_core_seconds = built->build_core_seconds();
      results_[i].index_bytes = static_cast<double>(built->Bytes());
    }
    return status;
  }

  Asked AskHere(const StoredHead& stored, const index::KeyIndex& index) const {
    return {flags_.policy.Search(trace_, stored, index, runner_), &index, &stored};
  }

  absl::Status EvaluateProduct(const std::string& scan, bool sketch, const Asked& asked) {
    for (const int count : flags_.candidates) {
      const index::SearchOptions options = LadderOptions(count);
      Json settings = LadderSettings(scan, options);
      settings["sketch"] = sketch ? kernels::kSketchDim : 0;
      absl::Status status = Evaluate("ladder", settings, asked, options);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  /// Stores the head, here or in the daemon, and asks with each number of candidates. `scan`: sign
  /// codes; null: the exact index.
  absl::Status RunStored(const std::string& index, const ScanName* scan) {
    const bool exact = scan == nullptr;
    const int scan_bits = exact ? kDefaultScanBits : scan->sign_bits;
    std::optional<StoredHead> stored;
    std::unique_ptr<DaemonHead> remote;
    Asked asked;
    if (client_ != nullptr) {
      absl::StatusOr<std::unique_ptr<DaemonHead>> opened =
          DaemonHead::Open(*client_, trace_, scan_bits);
      if (!opened.ok()) return opened.status();
      remote = *std::move(opened);
      asked = {flags_.policy.Search(*remote, exact ? IndexKind::kExact : IndexKind::kLadder)};
    } else {
      stored.emplace(trace_, scan_bits);
      asked = AskHere(*stored, exact ? index::ExactIndex() : index::LadderIndex());
    }
    if (exact) {
      index::SearchOptions options;
      options.audit_samples = flags_.audit;
      options.seed = flags_.seed;
      return Evaluate(index, Json::object(), asked, options);
    }
    for (const int count : flags_.candidates) {
      const index::SearchOptions options = LadderOptions(count);
      absl::Status status = Evaluate(index, LadderSettings(scan->name, options), asked, options);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::Status RunBuilt(const std::string& name, const BuildSettings& build) {
    if (client_ != nullptr) {
      const IndexKind kind = name == "landmark"  ? IndexKind::kLandmark
                             : name == "cluster" ? IndexKind::kCluster
                                                 : IndexKind::kGraph;
      auto remote = DaemonHead::Open(*client_, trace_, kDefaultScanBits, kind, build);
      if (!remote.ok()) return remote.status();
      return EvaluateBuilt(name, build, {flags_.policy.Search(**remote, kind)});
    }
    const StoredHead stored(trace_, kDefaultScanBits);
    const std::shared_ptr<const index::BuiltIndex> built =
        BuildIndex(name, trace_, stored.view(), build);
    if (built == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat(trace_.name, ": ", name, " needs a full segment of ", index::kSegmentTokens,
                       " tokens", name == "graph" ? " and prefill queries" : ""));
    }
    const size_t first = results_.size();
    absl::Status status = EvaluateBuilt(name, build, AskHere(stored, *built));
    for (size_t i = first; i < results_.size(); ++i) {
      results_[i].build_core_seconds = built->build_core_seconds();
      results_[i].index_bytes = static_cast<double>(built->Bytes());
    }
    return status;
  }

  absl::Status EvaluateBuilt(const std::string& name, const BuildSettings& build,
                             const Asked& asked) {
    Asked timed = asked;
    timed.search = [&](int step, index::SearchOptions options) {
      if (flags_.stop_after_us > 0) {
        options.stop_at =
            std::chrono::steady_clock::now() + std::chrono::microseconds(flags_.stop_after_us);
      }
      return asked.search(step, options);
    };
    index::SearchOptions options;
    options.audit_samples = flags_.audit;
    options.seed = flags_.seed;
    options.estimate_rest = !flags_.no_estimate;
    if (name == "landmark") options.exact_top = flags_.exact_top;
    for (const int count : flags_.candidates) {
      options.candidates = count;
      absl::Status status = Evaluate(name, BuiltSettings(name, build, options), timed, options);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  Json BuiltSettings(const std::string& name, const BuildSettings& build,
                     const index::SearchOptions& options) const {
    Json settings;
    if (name == "landmark") {
      settings["block"] = build.block;
      settings["summary"] = build.summary;
      settings["exact_top"] = options.exact_top;
    } else if (name == "graph") {
      settings["degree"] = build.degree;
    } else {
      settings["keys_per_cluster"] = build.keys_per_cluster;
    }
    settings["candidates"] = options.candidates;
    settings["estimate"] = options.estimate_rest;
    settings["stop_after_us"] = flags_.stop_after_us;
    settings["audit"] = flags_.audit;
    settings["seed"] = flags_.seed;
    return settings;
  }

  absl::Status Evaluate(const std::string& index, Json settings, const Asked& asked,
                        const index::SearchOptions& options) {
    index::SearchOptions with_policy = options;
    flags_.policy.Apply(with_policy);
    if (asked.index != nullptr && index != "exact") {
      absl::Status status =
          flags_.policy.Calibrate(trace_, *asked.stored, *asked.index, with_policy);
      if (!status.ok()) return status;
    }
    if (index != "exact") flags_.policy.DescribeThreshold(with_policy, settings);
    absl::StatusOr<Evaluation> figures =
        EvaluateSearch(trace_, reference_, asked.search, with_policy);
    if (!figures.ok()) return figures.status();
    Add(index, std::move(settings), *figures);
    return absl::OkStatus();
  }

  void Add(const std::string& index, Json settings, const Evaluation& figures) {
    flags_.policy.Describe(settings);
    settings["steps"] = reference_.steps.size();
    settings["threads"] = flags_.threads;
    results_.push_back({trace_.name, index, std::move(settings), figures, {}, {}});
  }

  const EvalFlags& flags_;
  const HeadTrace& trace_;
  KvClient* client_;
  PieceRunner& runner_;
  std::vector<EvalResult>& results_;
  Reference reference_;
};

absl::Status RunEval(EvalFlags flags) {
  if (absl::Status status = ResolveHeads(flags.kv, flags.queries, flags.heads); !status.ok()) {
    return status;
  }
  std::unique_ptr<KvClient> client;
  std::string simd_level = kernels::SimdLevel();
  if (!flags.connect.via.empty()) {
    absl::StatusOr<std::unique_ptr<KvClient>> connected = Connect(flags.connect);
    if (!connected.ok()) return connected.status();
    client = *std::move(connected);
    simd_level = client->info().simd_level;
  }
  PieceRunner runner(flags.threads);
  std::vector<EvalResult> results;
  for (size_t i = 0; i < flags.kv.size(); ++i) {
    const absl::StatusOr<HeadTrace> trace =
        LoadHeadTrace(flags.kv[i], flags.queries, flags.heads[i]);
    if (!trace.ok()) return trace.status();
    if (trace->rounded) {
      std::cerr << flags.kv[i] << ": fp32 keys and values were rounded to bf16 for storage\n";
    }
    for (int head = 0; head < (flags.per_head ? trace->group : 1); ++head) {
      const HeadTrace& asked = flags.per_head ? OneQueryHead(*trace, head) : *trace;
      absl::Status status = HeadRun(flags, asked, client.get(), runner, results).Run();
      if (!status.ok()) return status;
    }
  }
  std::cout << (flags.format == "json" ? EvalJson(results, simd_level)
                                       : EvalTable(results, simd_level));
  if (flags.plot.empty()) return absl::OkStatus();
  std::ofstream file(flags.plot);
  file << RenderSvgPage(EvalPlots(results));
  file.close();
  return file ? absl::OkStatus()
              : absl::UnavailableError(absl::StrCat(flags.plot, ": cannot be written"));
}

}  // namespace

void AddEvalCommand(CLI::App& program, Action& action) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* command = program.add_subcommand("eval", "Measure indexes on recorded attention heads");
  AddEvalFlags(*command, *flags);
  command->callback([flags, &action] {
    CheckEvalFlags(*flags);
    action = [flags] { return RunEval(*flags); };
  });
}

}  // namespace kvseek::cli
