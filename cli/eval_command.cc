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
#include "cli/build_index.h"
#include "cli/commands.h"
#include "cli/connect.h"
#include "cli/daemon_search.h"
#include "cli/eval_results.h"
#include "cli/evaluation.h"
#include "cli/library_search.h"
#include "cli/policy_flags.h"
#include "cli/trace_flags.h"
#include "index/product_index.h"
#include "kernels/cpu/simd_level.h"

namespace kvseek::cli {
namespace {

using Json = nlohmann::ordered_json;

struct EvalFlags {
  std::vector<std::string> kv;
  std::string queries;
  std::vector<std::string> heads;
  std::vector<std::string> indexes = {"exact", "ladder"};
  std::vector<std::string> scans = {"sign2"};
  std::vector<int> sketches = {kernels::kSketchDim};
  std::vector<int> candidates = {4096};
  std::vector<int64_t> exact = {64};
  std::vector<std::string> summaries = {"minmax"};
  int audit = 128;
  int steps = 0;
  uint64_t seed = 0;
  BuildSettings build;
  bool no_estimate = false;
  bool per_head = false;
  int exact_top = 0;
  PolicyFlags policy;
  int64_t stop_after_us = 0;
  int threads = 1;
  ConnectFlags connect;
  std::string format = "text";
  std::string plot;

  bool Asks(const std::string& index) const {
    return std::find(indexes.begin(), indexes.end(), index) != indexes.end();
  }
};

/// A ladder's scan code: sign codes of so many bits, or product codes of so many sub-spaces.
struct ScanName {
  std::string name;
  int sign_bits;  ///< 0: product
  int subspaces;
};

constexpr int kDefaultScanBits = 2;  // of heads whose sign codes are not read

const std::vector<ScanName>& ScanNames() {
  static const std::vector<ScanName> names = {
      {"sign1", 1, 0}, {"sign2", 2, 0}, {"pq11", 0, 11}, {"pq22", 0, 22}};
  return names;
}

const ScanName& FindScan(const std::string& name) {
  return *std::find_if(ScanNames().begin(), ScanNames().end(),
                       [&](const ScanName& scan) { return scan.name == name; });
}

bool IsBuilt(const std::string& index) {
  return index == "landmark" || index == "cluster" || index == "graph";
}

constexpr char kHelp[] =
    "Reads stored keys and values (tensors `k`, `v` [tokens, head_dim] in bf16, fp16 or fp32; fp32 "
    "is\n"
    "rounded to bf16 for storage) and decode queries (`HEAD.q_decode` [steps, group, head_dim],\n"
    "unscaled; every step sees all stored keys), asks each index for attention over all keys, and\n"
    "compares with full attention over the stored rows in double precision.\n"
    "\n"
    "Indexes:\n"
    "  exact   every key and value exactly\n"
    "  ladder  --scan codes of all keys, --candidates keys a group at 4 bits, --exact rows a head\n"
    "          exactly, an estimate of the rest. sign1, sign2: signs of 1 or 2 bits a dimension; "
    "pq11,\n"
    "          pq22: product codes of so many sub-spaces, trained on the head's prefill queries, "
    "with\n"
    "          --sketch components of a value (0: means of blocks of 64)\n"
    "  landmark  blocks of --block consecutive keys, taken in order of their --summary (minmax: an "
    "upper\n"
    "          bound of their scores, as Quest; mean: mean score plus spread) until --candidates "
    "keys "
    "of\n"
    "          the group are read; the others' share is estimated from their means\n"
    "  cluster  the same with clusters of --keys-per-cluster keys that are alike to the head's "
    "prefill\n"
    "          queries, which the queries file may hold (`HEAD.q_prefill`, `prefill_positions`)\n"
    "  graph   a walk over a graph of keys with up to --degree neighbours each, built from the "
    "head's\n"
    "          prefill queries; scores up to --candidates keys of the group, fewer with --beta, "
    "and\n"
    "          reads them; the others' share is estimated from stretches of 64 keys\n"
    "  oracle  each query head's true top --exact keys and nothing else, softmax renormalised "
    "over\n"
    "          them: what a perfect top-k could do. One result for each number of --exact; a "
    "ladder\n"
    "          beside it takes the first number. It has no time: it is told the answer.\n"
    "\n"
    "What the numbers mean (each over all steps and query heads):\n"
    "  output_error   ||o - o*|| / ||o*||: distance of the attention output from the true one\n"
    "  recall_at_100  share of each head's true top 100 keys among those read at 4 bits or better\n"
    "  keys_scanned   keys of the group of which anything was read in a step (oracle: the rows "
    "that it\n"
    "                 attends to, as if it knew them without a look)\n"
    "  bytes_read     codes and rows read for the group in a step\n"
    "  searches_skipped  share of steps answered from an earlier step's selection (--reuse)\n"
    "  missed_mass    softmax mass of keys not read at 4 bits or better: as the answers estimate "
    "it,\n"
    "                 and the truth; unless --audit is 0, share of true values inside the answers' "
    "95 %\n"
    "                 intervals (interval_cover), and the intervals' median width over the "
    "estimate\n"
    "  micros         time of one step's answer, for the whole group, without audit\n"
    "  build_core_seconds, index_bytes  of landmark, cluster, graph and product codes\n"
    "\n"
    "Examples:\n"
    "  kvseek eval --kv code8.layer15.kv1.safetensors --queries code8.queries.safetensors \\\n"
    "      --head layer15.kv1 --index ladder --scan sign2 --candidates 4096 --exact 64 --format "
    "json\n"
    "  kvseek eval --kv code8.layer15.kv1.safetensors --queries code8.queries.safetensors \\\n"
    "      --index ladder --scan sign2,pq11 --candidates 512,1024,2048 --audit 256 --steps 64\n"
    "  kvseek eval --kv code8.layer15.kv1.safetensors --queries code8.queries.safetensors \\\n"
    "      --index oracle --exact 256,1024,4096\n"
    "  kvseek eval --kv code8.layer15.kv1.safetensors --queries code8.queries.safetensors \\\n"
    "      --index landmark,cluster --candidates 512,1024 --no-estimate\n"
    "  kvseek eval --kv code8.layer15.kv1.safetensors --queries code8.queries.safetensors \\\n"
    "      --index graph --per-head --candidates 240,480,960\n"
    "  kvseek eval --kv code8.layer15.kv1.safetensors --queries code8.queries.safetensors \\\n"
    "      --index exact,ladder,landmark,cluster,graph,oracle --scan sign2,pq11 --summary "
    "minmax,mean "
    "\\\n"
    "      --candidates 256,512,1024,2048 --exact 64,256,1024 --plot layer15.svg";

void CheckFlags(const EvalFlags& flags) {
  CheckHeadFlags(flags.kv, flags.heads);
  if (flags.exact.size() > 1 && !flags.Asks("oracle")) {
    FailUsage("--exact: several numbers are for --index oracle; ladder takes one");
  }
  const auto least = std::min_element(flags.exact.begin(), flags.exact.end());
  if (*least < 1 && flags.Asks("oracle")) FailUsage("--exact: oracle needs 1 or more");
  if (flags.Asks("ladder") && flags.exact[0] > index::kMaxExactRows) {
    FailUsage(absl::StrCat("--exact: ladder takes at most ", index::kMaxExactRows));
  }
  const bool built = std::any_of(flags.indexes.begin(), flags.indexes.end(), IsBuilt);
  const bool bounds = flags.summaries == std::vector<std::string>{"minmax"};
  if (built && !flags.connect.via.empty() && !(flags.build == BuildSettings{} && bounds)) {
    FailUsage("--via: the daemon builds with its own settings; leave those of the build out");
  }
  const bool daemons = flags.scans == std::vector<std::string>{"pq11"} &&
                       flags.sketches == std::vector<int>{kernels::kSketchDim};
  const bool trains = std::any_of(flags.scans.begin(), flags.scans.end(),
                                  [](const auto& scan) { return FindScan(scan).sign_bits == 0; });
  if (trains && !flags.connect.via.empty() && !daemons) {
    FailUsage("--via: the daemon trains product codes of 11 sub-spaces with a sketch only");
  }
  if (flags.exact_top > 0 && !bounds) {
    FailUsage("--exact-top: needs --summary minmax");
  }
  if (!flags.connect.via.empty() && flags.policy.HereOnly()) {
    FailUsage(
        "--via: the daemon checks a reuse in its own way; leave --reuse-samples and "
        "--reuse-tolerance out");
  }
  if (!flags.connect.via.empty() && flags.threads != 1) {
    FailUsage("--threads: the daemon has its own; leave it out with --via");
  }
}

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
                           (*remote)->Search(IndexKind::kProduct));
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
    absl::Status status = EvaluateProduct(scan.name, layout.sketch,
                                          flags_.policy.Search(trace_, stored, *built, runner_));
    for (size_t i = first; i < results_.size(); ++i) {
      results_[i].build_core_seconds = built->build_core_seconds();
      results_[i].index_bytes = static_cast<double>(built->Bytes());
    }
    return status;
  }

  absl::Status EvaluateProduct(const std::string& scan, bool sketch, const SearchFunction& search) {
    for (const int count : flags_.candidates) {
      const index::SearchOptions options = LadderOptions(count);
      Json settings = LadderSettings(scan, options);
      settings["sketch"] = sketch ? kernels::kSketchDim : 0;
      absl::Status status = Evaluate("ladder", settings, search, options);
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
    SearchFunction search;
    if (client_ != nullptr) {
      absl::StatusOr<std::unique_ptr<DaemonHead>> opened =
          DaemonHead::Open(*client_, trace_, scan_bits);
      if (!opened.ok()) return opened.status();
      remote = *std::move(opened);
      search = flags_.policy.Search(*remote, exact ? IndexKind::kExact : IndexKind::kLadder);
    } else {
      stored.emplace(trace_, scan_bits);
      search = flags_.policy.Search(trace_, *stored,
                                    exact ? index::ExactIndex() : index::LadderIndex(), runner_);
    }
    if (exact) {
      index::SearchOptions options;
      options.audit_samples = flags_.audit;
      options.seed = flags_.seed;
      return Evaluate(index, Json::object(), search, options);
    }
    for (const int count : flags_.candidates) {
      const index::SearchOptions options = LadderOptions(count);
      absl::Status status = Evaluate(index, LadderSettings(scan->name, options), search, options);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::Status RunBuilt(const std::string& name, const BuildSettings& build) {
    if (client_ != nullptr) {
      const IndexKind kind = name == "landmark"  ? IndexKind::kLandmark
                             : name == "cluster" ? IndexKind::kCluster
                                                 : IndexKind::kGraph;
      auto remote = DaemonHead::Open(*client_, trace_, kDefaultScanBits, kind);
      if (!remote.ok()) return remote.status();
      return EvaluateBuilt(name, build, flags_.policy.Search(**remote, kind));
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
    absl::Status status =
        EvaluateBuilt(name, build, flags_.policy.Search(trace_, stored, *built, runner_));
    for (size_t i = first; i < results_.size(); ++i) {
      results_[i].build_core_seconds = built->build_core_seconds();
      results_[i].index_bytes = static_cast<double>(built->Bytes());
    }
    return status;
  }

  absl::Status EvaluateBuilt(const std::string& name, const BuildSettings& build,
                             const SearchFunction& answer) {
    const SearchFunction search = [&](int step, index::SearchOptions options) {
      if (flags_.stop_after_us > 0) {
        options.stop_at =
            std::chrono::steady_clock::now() + std::chrono::microseconds(flags_.stop_after_us);
      }
      return answer(step, options);
    };
    index::SearchOptions options;
    options.audit_samples = flags_.audit;
    options.seed = flags_.seed;
    options.estimate_rest = !flags_.no_estimate;
    if (name == "landmark") options.exact_top = flags_.exact_top;
    for (const int count : flags_.candidates) {
      options.candidates = count;
      absl::Status status = Evaluate(name, BuiltSettings(name, build, options), search, options);
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

  absl::Status Evaluate(const std::string& index, const Json& settings,
                        const SearchFunction& search, const index::SearchOptions& options) {
    index::SearchOptions with_policy = options;
    flags_.policy.Apply(with_policy);
    absl::StatusOr<Evaluation> figures = EvaluateSearch(trace_, reference_, search, with_policy);
    if (!figures.ok()) return figures.status();
    Add(index, settings, *figures);
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

void AddBuildOptions(CLI::App& command, EvalFlags& flags) {
  command.add_option("--block", flags.build.block, "landmark: keys of a block")
      ->check(CLI::IsMember({16, 32, 64, 128, 256}))
      ->capture_default_str();
  command.add_option("--summary", flags.summaries, "landmark: minmax, mean or minmax,mean")
      ->delimiter(',')
      ->check(CLI::IsMember({"minmax", "mean"}))
      ->capture_default_str();
  command
      .add_option("--keys-per-cluster", flags.build.keys_per_cluster, "cluster: keys of one, mean")
      ->check(CLI::Range(4, 256))
      ->capture_default_str();
  command.add_option("--degree", flags.build.degree, "graph: neighbours of a key, at most")
      ->check(CLI::Range(index::kGraphDegreeMin, index::kGraphDegreeMax))
      ->capture_default_str();
  command.add_flag("--per-head", flags.per_head,
                   "Search for each query head by itself, instead of once for the group");
  command.add_flag("--no-estimate", flags.no_estimate,
                   "landmark, cluster, graph: leave unread keys out of the answer");
  command
      .add_option("--exact-top", flags.exact_top,
                  "landmark: read on until each head's best so many keys are proven to be read")
      ->check(CLI::Range(0, index::kMaxK))
      ->capture_default_str();
  command
      .add_option("--stop-after", flags.stop_after_us,
                  "landmark, cluster: microseconds after which no more keys are chosen; 0: none")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40))
      ->capture_default_str();
}

}  // namespace

void AddEvalCommand(CLI::App& program, Action& action) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* command = program.add_subcommand("eval", "Measure indexes on recorded attention heads");
  command->footer(kHelp);
  AddTraceFlags(*command, flags->kv, flags->queries, flags->heads);
  command
      ->add_option("--index", flags->indexes,
                   "Comma list of exact, ladder, landmark, cluster, graph, oracle")
      ->delimiter(',')
      ->check(CLI::IsMember({"exact", "ladder", "landmark", "cluster", "graph", "oracle"}))
      ->capture_default_str();
  command
      ->add_option("--scan", flags->scans,
                   "ladder: scan code of all keys; sign1, sign2, pq11, pq22 or a comma list")
      ->delimiter(',')
      ->check(CLI::IsMember({"sign1", "sign2", "pq11", "pq22"}))
      ->capture_default_str();
  command
      ->add_option("--sketch", flags->sketches,
                   "ladder with product codes: components of a value's sketch; 0, 8 or 0,8")
      ->delimiter(',')
      ->check(CLI::IsMember({0, kernels::kSketchDim}))
      ->capture_default_str();
  command
      ->add_option("--candidates", flags->candidates,
                   "Keys a group read: ladder at 4 bits, landmark, cluster and graph as they are; "
                   "a comma list tries each")
      ->delimiter(',')
      ->check(CLI::Range(1, index::kMaxCandidates))
      ->capture_default_str();
  command
      ->add_option("--exact", flags->exact,
                   "ladder: rows a head read exactly; oracle: keys a head, a comma list")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 24))
      ->capture_default_str();
  command
      ->add_option("--audit", flags->audit, "Unread keys a head sampled for the report's interval")
      ->check(CLI::Range(0, index::kMaxAuditSamples))
      ->capture_default_str();
  command->add_option("--steps", flags->steps, "How many steps, evenly spread; 0: all")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command->add_option("--seed", flags->seed, "Of the audit's sampling")->capture_default_str();
  command->add_option("--threads", flags->threads, "Threads of one search")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  AddBuildOptions(*command, *flags);
  flags->policy.AddOptions(*command);
  AddConnectFlags(*command, flags->connect, /*required=*/false);
  AddFormatFlag(*command, flags->format);
  command->add_option("--plot", flags->plot,
                      "Where to write a picture (SVG): error and recall against bytes and time");
  command->callback([flags, &action] {
    CheckFlags(*flags);
    action = [flags] { return RunEval(*flags); };
  });
}

}  // namespace kvseek::cli
