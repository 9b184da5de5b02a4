// kvseek plan: finds how each recorded head is best asked, and writes it to a file.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "cli/commands.h"
#include "cli/plan_head.h"
#include "cli/table.h"
#include "cli/trace_flags.h"
#include "client/head_plan.h"

namespace kvseek::cli {
namespace {

using Json = nlohmann::ordered_json;

struct PlanFlags {
  std::vector<std::string> kv;
  std::string queries;
  std::vector<std::string> heads;
  PlanSettings settings;
  std::string out;
  std::string format = "text";
};

struct HeadResult {
  std::string head;
  double far_mass = 0.0;
  std::vector<HeadChoice> choices;  ///< one for each number of scan bits
  PlanFigures best;
};

constexpr char kHelp[] =
    "Plans, for each recorded head, the index and the budget (`candidates`) that meet a target of\n"
    "mean output error at the fewest bytes read, as a planner would from audits of live traffic.\n"
    "Its audits are prefill queries (`HEAD.q_prefill`, `prefill_positions`) of the last part of "
    "the\n"
    "prefix, each over the stored keys that a decoder would ask for at its position; it is tested\n"
    "on decode queries (`HEAD.q_decode`), which it has not seen. docs/planning.md has the rule, "
    "and\n"
    "the form of the file that --out writes.\n"
    "\n"
    "Indexes: exact, always; ladder, landmark, cluster, graph and product as in `kvseek eval`. A "
    "session "
    "has one\n"
    "number of scan bits: the plan takes the one for which all heads together read least.\n"
    "\n"
    "What is printed of each head:\n"
    "  index, candidates   what is planned; the ladder with its scan bits\n"
    "  error, bound        mean output error over the audits, and what it is most likely below\n"
    "  q_decode: error, recall@100, missed est., true, read   of that setting over decode queries\n"
    "  best fixed, read    of all settings the one that meets the target on the decode queries\n"
    "                      themselves at the fewest bytes\n"
    "  ratio               planned bytes over the best fixed setting's, on decode queries\n"
    "  far mass            softmax mass between --sink and --recent tokens, of the query head "
    "that\n"
    "                      has most; below --far-mass it is a streaming head (DuoAttention,\n"
    "                      RazorAttention): mode local, it may ask for nothing\n"
    "\n"
    "Example:\n"
    "  kvseek plan --kv code8.layer15.kv1.safetensors --kv code8.layer20.kv0.safetensors \\\n"
    "      --queries code8.queries.safetensors --target-error 0.1 --out plan.json";

/// "layer15.kv1".
absl::StatusOr<PlannedHead> ParseHeadName(const std::string& name) {
  const std::pair<std::string, std::string> parts = absl::StrSplit(name, absl::MaxSplits('.', 1));
  absl::string_view layer = parts.first;
  absl::string_view kv_head = parts.second;
  PlannedHead head;
  if (!absl::ConsumePrefix(&layer, "layer") || !absl::SimpleAtoi(layer, &head.layer) ||
      !absl::ConsumePrefix(&kv_head, "kv") || !absl::SimpleAtoi(kv_head, &head.kv_head)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--out: head \"", name, "\" is not named as layer2.kv1 is, so its place is not known"));
  }
  return head;
}

/// Index of the scan bits for which the heads that ask for anything read least.
size_t ChooseBits(const std::vector<HeadResult>& results, const PlanSettings& settings) {
  std::vector<double> bytes(settings.scan_bits.size(), 0.0);
  for (const HeadResult& result : results) {
    if (result.far_mass <= settings.far_mass_max) continue;
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] += result.choices[i].audited.bytes;
  }
  return static_cast<size_t>(std::min_element(bytes.begin(), bytes.end()) - bytes.begin());
}

absl::StatusOr<HeadPlan> MakePlan(const std::vector<HeadResult>& results, size_t bits,
                                  const PlanSettings& settings) {
  HeadPlan plan;
  plan.scan_bits = static_cast<uint32_t>(settings.scan_bits[bits]);
  plan.error_target = settings.planner.error_target;
  for (const HeadResult& result : results) {
    absl::StatusOr<PlannedHead> head = ParseHeadName(result.head);
    if (!head.ok()) return head.status();
    const PlanFigures& planned = result.choices[bits].tested;
    head->mode = result.far_mass <= settings.far_mass_max ? HeadMode::kLocal : HeadMode::kAuto;
    head->index = planned.index;
    head->candidates = static_cast<uint32_t>(planned.candidates);
    plan.heads.push_back(*std::move(head));
  }
  std::sort(plan.heads.begin(), plan.heads.end(), [](const auto& a, const auto& b) {
    return std::pair(a.layer, a.kv_head) < std::pair(b.layer, b.kv_head);
  });
  return plan;
}

std::string SettingText(const PlanFigures& figures) {
  if (figures.candidates == 0) return figures.index;
  const std::string bits =
      figures.scan_bits > 0 ? absl::StrCat(" ", figures.scan_bits, " bit") : "";
  return absl::StrCat(figures.index, bits, ", ", figures.candidates);
}

Json ToJson(const PlanFigures& figures) {
  return {
      {"index", figures.index},
      {"scan_bits", figures.scan_bits > 0 ? Json(figures.scan_bits) : Json()},
      {"candidates", figures.candidates},
      {"bytes_read", figures.bytes},
      {"output_error", figures.error},
      {"recall_at_100", figures.recall},
      {"missed_mass", {{"estimated", figures.missed_estimated}, {"true", figures.missed_true}}}};
}

void PrintJson(const std::vector<HeadResult>& results, size_t bits, const PlanSettings& settings) {
  Json list = Json::array();
  for (const HeadResult& result : results) {
    const HeadChoice& choice = result.choices[bits];
    list.push_back({{"head", result.head},
                    {"streaming", result.far_mass <= settings.far_mass_max},
                    {"far_mass", result.far_mass},
                    {"planned", ToJson(choice.tested)},
                    {"audits",
                     {{"count", choice.audits},
                      {"trials", choice.trials},
                      {"output_error", choice.audited.error},
                      {"bound", choice.audited.bound},
                      {"bytes_read", choice.audited.bytes}}},
                    {"best_fixed", ToJson(result.best)},
                    {"bytes_ratio", choice.tested.bytes / result.best.bytes}});
  }
  std::cout << Json{{"error_target", settings.planner.error_target},
                    {"scan_bits", settings.scan_bits[bits]},
                    {"heads", list}}
                   .dump(2)
            << '\n';
}

void PrintText(const std::vector<HeadResult>& results, size_t bits, const PlanSettings& settings) {
  Table table({"head", "planned", "error", "bound", "q_decode: error", "recall@100", "missed est.",
               "true", "read", "best fixed", "read", "ratio", "far mass", "mode"});
  for (const HeadResult& result : results) {
    const HeadChoice& choice = result.choices[bits];
    const PlanFigures& tested = choice.tested;
    table.Add({result.head, SettingText(tested), Digits(choice.audited.error),
               Digits(choice.audited.bound), Digits(tested.error), Digits(tested.recall),
               Digits(tested.missed_estimated), Digits(tested.missed_true),
               ShortBytes(tested.bytes), SettingText(result.best), ShortBytes(result.best.bytes),
               Digits(tested.bytes / result.best.bytes), Digits(result.far_mass),
               result.far_mass <= settings.far_mass_max ? "local" : "auto"});
  }
  std::cout << table.Text() << "\nSessions with " << settings.scan_bits[bits]
            << " scan bits; mean output error of at most " << settings.planner.error_target
            << ". `kvseek plan --help` explains the columns.\n";
}

absl::Status RunPlan(PlanFlags flags) {
  if (absl::Status status = ResolveHeads(flags.kv, flags.queries, flags.heads); !status.ok()) {
    return status;
  }
  std::vector<HeadResult> results;
  for (size_t i = 0; i < flags.kv.size(); ++i) {
    if (!flags.out.empty()) {
      if (const auto head = ParseHeadName(flags.heads[i]); !head.ok()) return head.status();
    }
    const absl::StatusOr<HeadTrace> trace =
        LoadHeadTrace(flags.kv[i], flags.queries, flags.heads[i]);
    if (!trace.ok()) return trace.status();
    const auto planned = PlannedTrace::Make(*trace, flags.settings);
    if (!planned.ok()) return planned.status();
    HeadResult result;
    result.head = trace->name;
    result.far_mass = (*planned)->FarMass();
    for (const int bits : flags.settings.scan_bits) {
      result.choices.push_back((*planned)->Plan(bits));
    }
    result.best = (*planned)->BestFixed();
    results.push_back(std::move(result));
  }
  const size_t bits = ChooseBits(results, flags.settings);
  if (!flags.out.empty()) {
    const absl::StatusOr<HeadPlan> plan = MakePlan(results, bits, flags.settings);
    if (!plan.ok()) return plan.status();
    if (absl::Status status = WriteHeadPlan(*plan, flags.out); !status.ok()) return status;
  }
  if (flags.format == "json") {
    PrintJson(results, bits, flags.settings);
  } else {
    PrintText(results, bits, flags.settings);
  }
  return absl::OkStatus();
}

void AddSettings(CLI::App& command, PlanSettings& settings) {
  command
      .add_option("--target-error", settings.planner.error_target, "Mean output error to be met")
      ->check(CLI::Range(1e-4, 10.0))
      ->capture_default_str();
  command
      .add_option(
          "--index", settings.indexes,
          "Comma list of ladder, landmark, cluster, graph, product: what there is beside exact")
      ->delimiter(',')
      ->check(CLI::IsMember({"ladder", "landmark", "cluster", "graph", "product"}))
      ->capture_default_str();
  command
      .add_option("--scan-bits", settings.scan_bits,
                  "Bits a dimension of the ladder's scan code; 1, 2 or 1,2")
      ->delimiter(',')
      ->check(CLI::Range(1, 2))
      ->capture_default_str();
  command
      .add_option("--audits", settings.audits, "Prefill queries, evenly spread; 0: all late ones")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command
      .add_option("--since", settings.since,
                  "Share of the prefix whose queries are left out: they saw too few keys")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command.add_option("--sink", settings.sink, "First tokens that a decoder keeps")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20))
      ->capture_default_str();
  command
      .add_option("--recent", settings.recent,
                  "Newest tokens that a decoder keeps: an audited query does not ask for them")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  command
      .add_option("--far-mass", settings.far_mass_max,
                  "Mass between sink and recent tokens at which a head is a streaming head")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command.add_option("--steps", settings.steps, "Decode steps to test on, evenly spread; 0: all")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
}

}  // namespace

void AddPlanCommand(CLI::App& program, Action& action) {
  auto flags = std::make_shared<PlanFlags>();
  CLI::App* command =
      program.add_subcommand("plan", "Find index and budget of recorded attention heads");
  command->footer(kHelp);
  AddTraceFlags(*command, flags->kv, flags->queries, flags->heads);
  AddSettings(*command, flags->settings);
  command->add_option("--out", flags->out, "File to write the plan to (JSON)");
  AddFormatFlag(*command, flags->format);
  command->callback([flags, &action] {
    CheckHeadFlags(flags->kv, flags->heads);
    action = [flags] { return RunPlan(*flags); };
  });
}

}  // namespace kvseek::cli
