#include "cli/eval_flags.h"

#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "cli/trace_flags.h"
#include "index/key_index.h"

namespace kvseek::cli {
namespace {

const std::vector<ScanName>& ScanNames() {
  static const std::vector<ScanName> names = {
      {"sign1", 1, 0}, {"sign2", 2, 0}, {"pq11", 0, 11}, {"pq22", 0, 22}};
  return names;
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
    "          bound of their scores, as Quest; mean: mean score plus spread; given: score of a "
    "key of\n"
    "          the client's, as of a trained landmark token; here of the block's key that prefill "
    "queries\n"
    "          score highest on average) until --candidates keys of the group are read; the "
    "others'\n"
    "          share is estimated from their means\n"
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
    "  keys_read      keys of the group read at 4 bits or better in a step, the tail's among them\n"
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

void AddBuildOptions(CLI::App& command, EvalFlags& flags) {
  command.add_option("--block", flags.build.block, "landmark: keys of a block")
      ->check(CLI::IsMember({16, 32, 64, 128, 256}))
      ->capture_default_str();
  command.add_option("--summary", flags.summaries, "landmark: minmax, mean, given or a comma list")
      ->delimiter(',')
      ->check(CLI::IsMember({"minmax", "mean", "given"}))
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

const ScanName& FindScan(const std::string& name) {
  return *std::find_if(ScanNames().begin(), ScanNames().end(),
                       [&](const ScanName& scan) { return scan.name == name; });
}

bool IsBuilt(const std::string& index) {
  return index == "landmark" || index == "cluster" || index == "graph";
}

void CheckEvalFlags(const EvalFlags& flags) {
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
  BuildSettings build = flags.build;
  build.block = BuildSettings().block;
  if (built && !flags.connect.via.empty() && !(build == BuildSettings())) {
    FailUsage("--via: the daemon builds clusters and graphs with settings of its own");
  }
  const auto asks = [&](const std::string& scan) {
    return std::find(flags.scans.begin(), flags.scans.end(), scan) != flags.scans.end();
  };
  const bool sketched = flags.sketches == std::vector<int>{kernels::kSketchDim};
  if (!flags.connect.via.empty() && (asks("pq22") || (asks("pq11") && !sketched))) {
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
  if (!flags.connect.via.empty() && flags.policy.CalibratedKeys() > 0) {
    FailUsage("--via: a threshold is calibrated here; give the daemon its number");
  }
  if (!flags.connect.via.empty() && flags.threads != 1) {
    FailUsage("--threads: the daemon has its own; leave it out with --via");
  }
}

void AddEvalFlags(CLI::App& command, EvalFlags& flags) {
  command.footer(kHelp);
  AddTraceFlags(command, flags.kv, flags.queries, flags.heads);
  command
      .add_option("--index", flags.indexes,
                  "Comma list of exact, ladder, landmark, cluster, graph, oracle")
      ->delimiter(',')
      ->check(CLI::IsMember({"exact", "ladder", "landmark", "cluster", "graph", "oracle"}))
      ->capture_default_str();
  command
      .add_option("--scan", flags.scans,
                  "ladder: scan code of all keys; sign1, sign2, pq11, pq22 or a comma list")
      ->delimiter(',')
      ->check(CLI::IsMember({"sign1", "sign2", "pq11", "pq22"}))
      ->capture_default_str();
  command
      .add_option("--sketch", flags.sketches,
                  "ladder with product codes: components of a value's sketch; 0, 8 or 0,8")
      ->delimiter(',')
      ->check(CLI::IsMember({0, kernels::kSketchDim}))
      ->capture_default_str();
  command
      .add_option("--candidates", flags.candidates,
                  "Keys a group read: ladder at 4 bits, landmark, cluster and graph as they are; "
                  "a comma list tries each")
      ->delimiter(',')
      ->check(CLI::Range(1, index::kMaxCandidates))
      ->capture_default_str();
  command
      .add_option("--exact", flags.exact,
                  "ladder: rows a head read exactly; oracle: keys a head, a comma list")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 24))
      ->capture_default_str();
  command
      .add_option("--audit", flags.audit, "Unread keys a head sampled for the report's interval")
      ->check(CLI::Range(0, index::kMaxAuditSamples))
      ->capture_default_str();
  command.add_option("--steps", flags.steps, "How many steps, evenly spread; 0: all")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command.add_option("--seed", flags.seed, "Of the audit's sampling")->capture_default_str();
  command.add_option("--threads", flags.threads, "Threads of one search")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  AddBuildOptions(command, flags);
  flags.policy.AddOptions(command);
  AddConnectFlags(command, flags.connect, /*required=*/false);
  AddFormatFlag(command, flags.format);
  command.add_option("--plot", flags.plot,
                     "Where to write a picture (SVG): error and recall against bytes and time");
}

}  // namespace kvseek::cli
