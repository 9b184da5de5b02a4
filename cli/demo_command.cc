// kvseek demo: starts a daemon of its own and shows what its answers are worth on recorded
// attention.
#include <CLI/CLI.hpp>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "cli/connect.h"
#include "cli/daemon_process.h"
#include "cli/demo.h"
#include "cli/plot.h"
#include "cli/table.h"

namespace kvseek::cli {
namespace {

using Json = nlohmann::ordered_json;

struct DemoFlags {
  DemoOptions demo = {.data = "tests/data"};
  std::string daemon;
  std::string plot = "demo.svg";
  std::string format = "text";
};

constexpr char kHelp[] =
    "Starts kvseekd on a unix socket in a temporary directory, appends two recorded heads of\n"
    "Qwen2.5-Coder-1.5B-Instruct (7680 tokens, 6 query heads each) as one layer of one session, "
    "and\n"
    "answers decode steps in four ways through the C++ client:\n"
    "\n"
    "  full attention    on this side, in double precision: the truth, and what it costs to have "
    "it\n"
    "  Attend, exact     the daemon reads every key and value\n"
    "  Attend, ladder    codes of all keys, --candidates at 4 bits, the best rows exactly, an "
    "estimate\n"
    "                    of the rest\n"
    "  TopK with rows    the daemon sends the --k best rows of each KV head and the state of the "
    "rest;\n"
    "                    this side attends to the rows, as a GPU would, and merges\n"
    "\n"
    "error is ||o - o*|| / ||o*|| over steps and query heads. Keys, bytes and time are of one step "
    "of\n"
    "the layer, both KV heads. The picture shows the error against the bytes that the daemon reads "
    "for\n"
    "128 to 4096 candidates, beside a perfect top-k that forgets the rest.\n"
    "\n"
    "Example:\n"
    "  kvseek demo --daemon build/release/bin/kvseekd --data tests/data --plot demo.svg";

/// kvseekd beside this program.
std::string DefaultDaemon() {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? "kvseekd" : (self.parent_path() / "kvseekd").string();
}

Plot MakePlot(const DemoResult& result) {
  Plot plot{.title = absl::StrCat("Attention error against bytes read, ", result.tokens, " tokens"),
            .x_label = "bytes read a step (layer of 2 KV heads, 12 query heads)",
            .y_label = "relative output error, mean",
            .series = {{"ladder, through the daemon", {}}, {"perfect top-k, rest forgotten", {}}}};
  for (const DemoBudget& point : result.ladder) {
    plot.series[0].points.push_back(
        {point.bytes_read, point.error_mean, absl::StrCat(point.budget)});
  }
  for (const DemoBudget& point : result.oracle) {
    plot.series[1].points.push_back(
        {point.bytes_read, point.error_mean, absl::StrCat("k=", point.budget)});
  }
  return plot;
}

void PrintText(const DemoResult& result, const Plot& plot) {
  Table table({"a decode step", "error mean", "p90", "max", "scanned", "4-bit", "exact", "read",
               "on the wire", "us p50", "us p99"});
  for (const DemoRow& row : result.rows) {
    table.Add({row.name, Digits(row.error_mean), Digits(row.error_p90), Digits(row.error_max),
               Short(row.keys_scanned), Short(row.keys_fine), Short(row.keys_exact),
               ShortBytes(row.bytes_read), ShortBytes(row.bytes_wire), Digits(row.micros_p50),
               Digits(row.micros_p99)});
  }
  std::cout << "\n"
            << result.steps << " decode steps over " << result.tokens
            << " tokens, one layer, 2 KV heads, 12 query heads\n\n"
            << table.Text() << "\n"
            << RenderText(plot, 60, 14);
}

Json Budgets(const std::vector<DemoBudget>& budgets) {
  Json list = Json::array();
  for (const DemoBudget& point : budgets) {
    list.push_back({{"budget", point.budget},
                    {"bytes_read", point.bytes_read},
                    {"error_mean", point.error_mean}});
  }
  return list;
}

void PrintJson(const DemoResult& result) {
  Json rows = Json::array();
  for (const DemoRow& row : result.rows) {
    rows.push_back({{"name", row.name},
                    {"output_error",
                     {{"mean", row.error_mean}, {"p90", row.error_p90}, {"max", row.error_max}}},
                    {"keys_scanned", row.keys_scanned},
                    {"keys_fine", row.keys_fine},
                    {"keys_exact", row.keys_exact},
                    {"bytes_read", row.bytes_read},
                    {"bytes_wire", row.bytes_wire},
                    {"micros", {{"p50", row.micros_p50}, {"p99", row.micros_p99}}}});
  }
  std::cout << Json{{"tokens", result.tokens},
                    {"steps", result.steps},
                    {"append_tokens_per_second", result.append_tokens_per_second},
                    {"rows", rows},
                    {"ladder", Budgets(result.ladder)},
                    {"oracle", Budgets(result.oracle)}}
                   .dump(2)
            << '\n';
}

absl::Status RunDemoCommand(const DemoFlags& flags) {
  const bool text = flags.format == "text";
  Progress progress(/*quiet=*/!text);
  progress.Begin(absl::StrCat("starting ", flags.daemon), 1);
  absl::StatusOr<std::unique_ptr<DaemonProcess>> daemon =
      DaemonProcess::Start(flags.daemon, {"--memory", "1GiB"});
  if (!daemon.ok()) return daemon.status();
  progress.End(absl::StrCat("process ", (*daemon)->pid(), " serves"));
  absl::StatusOr<DemoResult> result = absl::UnknownError("not run");
  {
    absl::StatusOr<std::unique_ptr<KvClient>> client =
        Connect({.via = (*daemon)->address(), .token_file = ""});
    if (!client.ok()) return client.status();
    result = RunDemo(**client, flags.demo, progress);
  }
  if (!result.ok()) return result.status();
  progress.Begin("stopping the daemon", 1);
  if (absl::Status status = (*daemon)->Stop(); !status.ok()) return status;
  progress.End("exit code 0");
  const Plot plot = MakePlot(*result);
  std::ofstream file(flags.plot);
  file << RenderSvg(plot);
  file.close();
  if (!file) return absl::UnavailableError(absl::StrCat(flags.plot, ": cannot be written"));
  if (!text) {
    PrintJson(*result);
    return absl::OkStatus();
  }
  PrintText(*result, plot);
  std::cout << "\nThe picture is in " << flags.plot << ".\n";
  return absl::OkStatus();
}

}  // namespace

void AddDemoCommand(CLI::App& program, Action& action) {
  auto flags = std::make_shared<DemoFlags>();
  flags->daemon = DefaultDaemon();
  CLI::App* command = program.add_subcommand(
      "demo", "Start a daemon and compare its answers on recorded attention");
  command->footer(kHelp);
  command->add_option("--daemon", flags->daemon, "Path of kvseekd; default: beside this program");
  command->add_option("--data", flags->demo.data, "Directory of the code8.* traces")
      ->capture_default_str();
  command->add_option("--plot", flags->plot, "Where to write the picture (SVG)")
      ->capture_default_str();
  command->add_option("--steps", flags->demo.steps, "Decode steps, evenly spread over the trace")
      ->check(CLI::Range(1, 512))
      ->capture_default_str();
  command->add_option("--candidates", flags->demo.candidates, "Keys of each KV head read at 4 bits")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--k", flags->demo.k, "Rows of each KV head that TopK returns")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  AddFormatFlag(*command, flags->format);
  command->callback([flags, &action] { action = [flags] { return RunDemoCommand(*flags); }; });
}

}  // namespace kvseek::cli
