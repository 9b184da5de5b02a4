// kvseek bench: measures a daemon under an open-loop load, or asked by clients that wait.
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "cli/bench.h"
#include "cli/commands.h"
#include "cli/connect.h"
#include "cli/daemon_process.h"
#include "cli/memory_roof.h"
#include "cli/percentile.h"
#include "cli/table.h"
#include "index/key_index.h"
#include "service/daemon.h"

namespace kvseek::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kMemoryShare = 0.8;  // of what is available; the rest is for everything else
constexpr uint64_t kMemoryExtra = uint64_t{256} << 20;
constexpr int kConnections = 4;  // of requests at a rate

const std::map<std::string, ModelShape>& Presets() {
  static const std::map<std::string, ModelShape> presets = {
      {"llama3-8b", {.layers = 32, .kv_heads = 8, .query_heads = 32}},
      {"qwen2.5-1.5b", {.layers = 28, .kv_heads = 2, .query_heads = 12}}};
  return presets;
}

const std::map<std::string, IndexKind>& Indexes() {
  static const std::map<std::string, IndexKind> indexes = {
      {"auto", IndexKind::kAuto},       {"exact", IndexKind::kExact},
      {"ladder", IndexKind::kLadder},   {"landmark", IndexKind::kLandmark},
      {"cluster", IndexKind::kCluster}, {"graph", IndexKind::kGraph},
      {"product", IndexKind::kProduct}};
  return indexes;
}

struct BenchFlags {
  ConnectFlags connect;
  BenchOptions bench;
  std::string preset = "qwen2.5-1.5b";
  std::optional<uint32_t> layers;
  std::optional<uint32_t> kv_heads;
  std::optional<uint32_t> query_heads;
  std::optional<uint32_t> head_dim;
  std::string op = "attend";
  std::string index = "ladder";
  std::vector<std::string> build;
  uint32_t candidates = 4096;
  uint32_t exact_rows = 64;
  std::optional<int> connections;
  int workers = 0;
  std::string format = "text";
};

constexpr char kHelp[] =
    "Fills --sessions with --tokens synthetic keys and values in every layer (seeded; means, "
    "drift,\n"
    "spectrum and spread of scores resemble real heads; quality is measured by `kvseek eval` on "
    "real\n"
    "traces), then sends requests at random times (Poisson) of --rate for --duration seconds. A\n"
    "request is one layer of one session: one query token, all heads. A decode step of a model "
    "sends\n"
    "one for each layer. The loop is open: a slow daemon is not asked less, and a latency counts "
    "from\n"
    "the time at which its request was to leave. With --rate 0 each connection's requests are sent "
    "one\n"
    "after the other, layer by layer, as a decoder does: --connections 1 is one decoder, 4 are "
    "four at\n"
    "the same time. With --batch a request is one layer of all sessions of its connection. Without "
    "--via\n"
    "a daemon is started in this process on a unix socket. Queries travel as bf16, states as fp16, "
    "as a\n"
    "decoder's do.\n"
    "\n"
    "What the numbers mean:\n"
    "  offered, achieved  requests a second sent and answered; where achieved stays behind, the "
    "rate\n"
    "                     is past what the daemon can do and the latencies say nothing\n"
    "  errors             requests that failed, by code: resource_exhausted is a full queue,\n"
    "                     deadline_exceeded an answer later than --deadline-ms\n"
    "  in the daemon      of a latency, from the request read to the answer in place; beside it: "
    "the\n"
    "                     difference of the medians, the way there and back\n"
    "  workers a request  time of the daemon's workers by phase, over all requests; it counts "
    "what other\n"
    "                     clients ask meanwhile, too\n"
    "  of exact           the daemon's own time over that of exact searches of the same layers, "
    "which\n"
    "                     are sent afterwards, one after the other (--exact-duration)\n"
    "  a session          a request's latency over the sessions in it\n"
    "  touched            bytes of codes and rows that searches read: by the clock, and in the "
    "daemon's own\n"
    "                     time (of requests that overlap each counts its time whole), beside what "
    "this\n"
    "                     machine's memory can deliver to as many threads (the roof)\n"
    "\n"
    "Examples:\n"
    "  kvseek bench\n"
    "  kvseek bench --shape llama3-8b --layers 2 --sessions 8 --tokens 32768 --rate 300\n"
    "  kvseek bench --via unix:/run/kvseek.sock --op topk --k 256 --format json\n"
    "  kvseek bench --via unix:/run/kvseek.sock --shape llama3-8b --layers 8 --tokens 131072 "
    "--rate 0\n"
    "  kvseek bench --shape llama3-8b --layers 2 --sessions 16 --tokens 32768 --rate 0 --batch";

void ResolveFlags(BenchFlags& flags) {
  BenchOptions& bench = flags.bench;
  bench.shape = Presets().at(flags.preset);
  bench.shape.layers = flags.layers.value_or(bench.shape.layers);
  bench.shape.kv_heads = flags.kv_heads.value_or(bench.shape.kv_heads);
  bench.shape.query_heads = flags.query_heads.value_or(bench.shape.query_heads);
  bench.shape.key_dim = flags.head_dim.value_or(bench.shape.key_dim);
  bench.shape.value_dim = bench.shape.key_dim;
  if (bench.shape.query_heads % bench.shape.kv_heads != 0 ||
      bench.shape.Group() > static_cast<uint32_t>(index::kMaxGroup)) {
    FailUsage(absl::StrCat("--query-heads: must be a multiple of --kv-heads, at most ",
                           index::kMaxGroup, " times as many"));
  }
  if (bench.shape.key_dim % 8 != 0) FailUsage("--head-dim: must be a multiple of 8");
  if (!flags.connect.via.empty() && flags.workers != 0) {
    FailUsage("--workers: is for the daemon started here; leave it out with --via");
  }
  flags.connections =
      flags.connections.value_or(bench.rate > 0.0 && !bench.batch ? kConnections : 1);
  if ((bench.rate <= 0.0 || bench.batch) &&
      static_cast<uint32_t>(*flags.connections) > bench.sessions) {
    FailUsage("--connections: with --rate 0 or --batch no more than --sessions");
  }
  bench.poll = flags.connect.spin_us > 0;
  bench.topk = flags.op == "topk";
  bench.search.index = Indexes().at(flags.index);
  for (const std::string& name : flags.build) bench.build.push_back(Indexes().at(name));
  const bool built = bench.search.index >= IndexKind::kLandmark;
  if (built &&
      std::find(flags.build.begin(), flags.build.end(), flags.index) == flags.build.end()) {
    FailUsage(absl::StrCat("--index: ", flags.index, " needs --build ", flags.index));
  }
  bench.search.candidates = flags.candidates;
  bench.search.exact_rows = flags.exact_rows;
}

/// The daemon to be measured, and connections to it; a daemon of this process goes with it.
struct Subject {
  std::unique_ptr<TemporaryDirectory> directory;
  std::unique_ptr<service::Daemon> daemon;
  std::vector<std::unique_ptr<KvClient>> clients;
};

absl::Status TooLarge(uint64_t need, uint64_t have, const std::string& whose) {
  return absl::ResourceExhaustedError(
      absl::StrCat("the sessions need ", ShortBytes(static_cast<double>(need)), ", but ", whose,
                   " has ", ShortBytes(static_cast<double>(have)),
                   " free; ask for fewer --sessions, --tokens or --layers"));
}

/// Starts a daemon that has just enough memory.
absl::Status StartHere(BenchFlags& flags, Subject& subject) {
  const uint64_t need = BenchMemoryBytes(flags.bench) + kMemoryExtra;
  const auto have =
      static_cast<uint64_t>(kMemoryShare * static_cast<double>(AvailableMemoryBytes()));
  if (have != 0 && need > have) return TooLarge(need, have, "this machine");
  absl::StatusOr<std::unique_ptr<TemporaryDirectory>> directory = TemporaryDirectory::Make();
  if (!directory.ok()) return directory.status();
  subject.directory = *std::move(directory);
  spdlog::set_default_logger(spdlog::stderr_logger_mt("kvseekd"));
  spdlog::set_level(spdlog::level::warn);
  service::DaemonOptions options;
  flags.connect.via = absl::StrCat("unix:", (subject.directory->path() / "kvseek.sock").string());
  options.listen = {flags.connect.via};
  options.memory_limit_bytes = need;
  options.workers = flags.workers;
  absl::StatusOr<std::unique_ptr<service::Daemon>> daemon = service::Daemon::Start(options);
  if (!daemon.ok()) return daemon.status();
  subject.daemon = *std::move(daemon);
  return absl::OkStatus();
}

absl::Status ConnectAll(const BenchFlags& flags, Subject& subject) {
  for (int i = 0; i < *flags.connections; ++i) {
    absl::StatusOr<std::unique_ptr<KvClient>> client = Connect(flags.connect);
    if (!client.ok()) return client.status();
    subject.clients.push_back(*std::move(client));
  }
  if (subject.daemon != nullptr) return absl::OkStatus();
  const absl::StatusOr<DaemonStats> stats = subject.clients[0]->Stats(/*with_sessions=*/false);
  if (!stats.ok()) return stats.status();
  const uint64_t need = BenchMemoryBytes(flags.bench);
  const uint64_t have =
      stats->memory_limit_bytes - std::min(stats->memory_limit_bytes, stats->memory_used_bytes);
  return need > have ? TooLarge(need, have, "the daemon") : absl::OkStatus();
}

Json ShapeJson(const ModelShape& shape) {
  return {{"layers", shape.layers},
          {"kv_heads", shape.kv_heads},
          {"query_heads", shape.query_heads},
          {"head_dim", shape.key_dim}};
}

/// What the median request took beyond the daemon's own time: the way there and back.
double BesideDaemon(const BenchResult& result) {
  return Percentile(result.micros, 0.5) - Percentile(result.daemon_micros, 0.5);
}

/// What a request brought on average, and how fast the daemon read it in its own time.
struct PerRequest {
  double sessions = 0.0;
  double bytes_touched = 0.0;
  double bytes_per_second = 0.0;
};

PerRequest MeanRequest(const BenchResult& result) {
  const auto answered = static_cast<double>(std::max<uint64_t>(1, result.answered));
  const auto touched = static_cast<double>(result.bytes_touched);
  const double daemon_seconds = 1e-6 * answered * Mean(result.daemon_micros);
  return {.sessions = static_cast<double>(result.sessions_answered) / answered,
          .bytes_touched = touched / answered,
          .bytes_per_second = daemon_seconds > 0.0 ? touched / daemon_seconds : 0.0};
}

/// A request's median latency over the sessions in it.
double MicrosPerSession(const BenchResult& result) {
  return Percentile(result.micros, 0.5) / std::max(1.0, MeanRequest(result).sessions);
}

/// What a request took of the daemon's workers, in a phase.
double PhaseMicros(const BenchResult& result, size_t phase) {
  return result.phase_micros[phase] / static_cast<double>(std::max<uint64_t>(1, result.sent));
}

Json PhasesJson(const BenchResult& result) {
  Json phases;
  for (size_t p = 0; p < index::kSearchPhases; ++p) {
    phases[std::string(index::NameOf(static_cast<index::SearchPhase>(p)))] = PhaseMicros(result, p);
  }
  return phases;
}

/// In the daemon, over that of an exact search; none where that was not measured.
std::optional<double> OfExact(const BenchResult& result) {
  if (result.exact_daemon_micros.empty()) return std::nullopt;
  return Percentile(result.daemon_micros, 0.5) / Percentile(result.exact_daemon_micros, 0.5);
}

void PrintJson(const BenchFlags& flags, const BenchResult& result, std::optional<double> roof) {
  const BenchOptions& bench = flags.bench;
  const double seconds = result.seconds;
  const auto per_second = [&](uint64_t count) { return static_cast<double>(count) / seconds; };
  const PerRequest request = MeanRequest(result);
  std::cout
      << Json{{"settings",
               {{"shape", ShapeJson(bench.shape)},
                {"sessions", bench.sessions},
                {"tokens", bench.tokens},
                {"op", flags.op},
                {"index", flags.index},
                {"scan_bits", bench.scan_bits},
                {"candidates", flags.candidates},
                {"exact", flags.exact_rows},
                {"rate", bench.rate},
                {"batch", bench.batch},
                {"connections", *flags.connections},
                {"duration_s", bench.duration_s},
                {"seed", bench.seed}}},
              {"fill_seconds", result.fill_seconds},
              {"offered_per_second", static_cast<double>(result.offered) / bench.duration_s},
              {"achieved_per_second", per_second(result.answered)},
              {"answered", result.answered},
              {"errors", result.errors},
              {"micros",
               {{"p50", Percentile(result.micros, 0.5)},
                {"p99", Percentile(result.micros, 0.99)},
                {"p999", Percentile(result.micros, 0.999)}}},
              {"request",
               {{"sessions", request.sessions},
                {"micros_per_session_p50", MicrosPerSession(result)},
                {"bytes_touched", request.bytes_touched},
                {"daemon_bytes_per_second", request.bytes_per_second},
                {"of_roof", roof.has_value() ? Json(request.bytes_per_second / *roof) : Json()}}},
              {"building",
               {{"indexes", flags.build},
                {"p50", Percentile(result.micros_building, 0.5)},
                {"p99", Percentile(result.micros_building, 0.99)},
                {"published", result.built_meanwhile},
                {"seconds", result.build_seconds}}},
              {"daemon_micros_p50", Percentile(result.daemon_micros, 0.5)},
              {"beside_daemon_micros_p50", BesideDaemon(result)},
              {"worker_micros_a_request", PhasesJson(result)},
              {"exact_daemon_micros_p50", Percentile(result.exact_daemon_micros, 0.5)},
              {"of_exact", OfExact(result).has_value() ? Json(*OfExact(result)) : Json()},
              {"wire_bytes", {{"sent", result.bytes_sent}, {"received", result.bytes_received}}},
              {"keys_scanned_per_second", per_second(result.keys_scanned)},
              {"bytes_touched_per_second", per_second(result.bytes_touched)},
              {"memory_roof_bytes_per_second", roof.has_value() ? Json(*roof) : Json()}}
             .dump(2)
      << '\n';
}

void PrintText(const BenchFlags& flags, const BenchResult& result, std::optional<double> roof) {
  const BenchOptions& bench = flags.bench;
  const double seconds = result.seconds;
  const auto answered = static_cast<double>(std::max<uint64_t>(1, result.answered));
  const double touched = static_cast<double>(result.bytes_touched) / seconds;
  const PerRequest request = MeanRequest(result);
  Table table({flags.op + ", " + flags.index, ""});
  table.Add({"sessions x tokens", absl::StrCat(bench.sessions, " x ", bench.tokens)});
  table.Add({"layers, KV heads, query heads, dim",
             absl::StrCat(bench.shape.layers, ", ", bench.shape.kv_heads, ", ",
                          bench.shape.query_heads, ", ", bench.shape.key_dim)});
  table.Add({"memory", ShortBytes(static_cast<double>(BenchMemoryBytes(bench)))});
  table.Add({"offered", Digits(static_cast<double>(result.offered) / bench.duration_s) + " /s"});
  table.Add({"achieved", Digits(static_cast<double>(result.answered) / seconds) + " /s"});
  for (const auto& [code, count] : result.errors)
    table.Add({"errors, " + code, absl::StrCat(count)});
  table.Add({"latency p50", Digits(Percentile(result.micros, 0.5)) + " us"});
  table.Add({"latency p99", Digits(Percentile(result.micros, 0.99)) + " us"});
  table.Add({"latency p99.9", Digits(Percentile(result.micros, 0.999)) + " us"});
  table.Add({"sessions a request", Digits(request.sessions)});
  table.Add({"a session p50", Digits(MicrosPerSession(result)) + " us"});
  if (!flags.build.empty()) {
    table.Add(
        {"p50 while indexes were built", Digits(Percentile(result.micros_building, 0.5)) + " us"});
    table.Add(
        {"p99 while indexes were built", Digits(Percentile(result.micros_building, 0.99)) + " us"});
    table.Add({"indexes published meanwhile", absl::StrCat(result.built_meanwhile)});
    table.Add({"all built after", Digits(result.build_seconds) + " s"});
  }
  table.Add({"in the daemon p50", Digits(Percentile(result.daemon_micros, 0.5)) + " us"});
  table.Add({"beside it p50", Digits(BesideDaemon(result)) + " us"});
  for (size_t p = 0; p < index::kSearchPhases; ++p) {
    table.Add(
        {absl::StrCat("workers a request, ", index::NameOf(static_cast<index::SearchPhase>(p))),
         Digits(PhaseMicros(result, p)) + " us"});
  }
  if (const auto of_exact = OfExact(result); of_exact.has_value()) {
    table.Add(
        {"exact, in the daemon p50", Digits(Percentile(result.exact_daemon_micros, 0.5)) + " us"});
    table.Add({"of exact", Digits(*of_exact)});
  }
  table.Add({"sent a request", ShortBytes(static_cast<double>(result.bytes_sent) / answered)});
  table.Add({"received", ShortBytes(static_cast<double>(result.bytes_received) / answered)});
  table.Add({"keys scanned", Short(static_cast<double>(result.keys_scanned) / seconds) + " /s"});
  table.Add({"touched a request", ShortBytes(request.bytes_touched)});
  table.Add({"touched", Digits(touched / 1e9) + " GB/s"});
  table.Add({"touched in the daemon's own time", Digits(request.bytes_per_second / 1e9) + " GB/s"});
  if (roof.has_value()) {
    table.Add({"memory-read roof", Digits(*roof / 1e9) + " GB/s"});
    table.Add({"touched of the roof", Digits(100.0 * touched / *roof) + " %"});
    table.Add({"of it in the daemon's own time",
               Digits(100.0 * request.bytes_per_second / *roof) + " %"});
  }
  std::cout << table.Text();
}

/// Whether the daemon runs on this machine.
bool IsLocal(const std::string& via) { return !absl::StartsWith(via, "tcp:"); }

absl::Status RunBenchCommand(BenchFlags flags) {
  Progress progress(/*quiet=*/flags.format == "json");
  Subject subject;
  std::optional<double> roof;
  if (flags.connect.via.empty()) {
    if (absl::Status status = StartHere(flags, subject); !status.ok()) return status;
  }
  if (IsLocal(flags.connect.via)) {
    const auto cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
    roof = MeasureMemoryRoof(flags.workers > 0 ? flags.workers : cores);
  }
  if (absl::Status status = ConnectAll(flags, subject); !status.ok()) return status;
  const absl::StatusOr<BenchResult> result = RunBench(subject.clients, flags.bench, progress);
  if (!result.ok()) return result.status();
  if (flags.format == "json") {
    PrintJson(flags, *result, roof);
  } else {
    PrintText(flags, *result, roof);
  }
  if (result->answered == 0) return absl::UnavailableError("no request was answered");
  return absl::OkStatus();
}

void AddLoadFlags(CLI::App& command, BenchFlags& flags) {
  BenchOptions& bench = flags.bench;
  command.add_option("--sessions", bench.sessions, "Sessions to fill")
      ->check(CLI::Range(1U, 1U << 16))
      ->capture_default_str();
  command.add_option("--tokens", bench.tokens, "Tokens of each session, in every layer")
      ->check(CLI::Range(1U, 1U << 24))
      ->capture_default_str();
  std::vector<std::string> names;
  for (const auto& [name, shape] : Presets()) names.push_back(name);
  command.add_option("--shape", flags.preset, "Model whose shape to take")
      ->check(CLI::IsMember(names))
      ->capture_default_str();
  command.add_option("--layers", flags.layers, "Layers, instead of the shape's")
      ->check(CLI::Range(1U, 512U));
  command.add_option("--kv-heads", flags.kv_heads, "KV heads, instead of the shape's")
      ->check(CLI::Range(1U, 1024U));
  command.add_option("--query-heads", flags.query_heads, "Query heads, instead of the shape's")
      ->check(CLI::Range(1U, 65536U));
  command.add_option("--head-dim", flags.head_dim, "Elements of a row, instead of the shape's")
      ->check(CLI::Range(8U, 512U));
  command
      .add_option("--rate", bench.rate,
                  "Requests a second; 0: over each connection one after the other")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  command.add_flag("--batch", bench.batch, "A request carries all sessions of its connection");
  command.add_option("--duration", bench.duration_s, "Seconds that are counted")
      ->check(CLI::Range(0.1, 86400.0))
      ->capture_default_str();
  command
      .add_option("--exact-duration", bench.exact_s,
                  "Seconds of exact searches afterwards, to compare with; 0: none")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  command.add_option("--warmup", bench.warmup_s, "Seconds before, not counted")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  command.add_option("--deadline-ms", bench.deadline_ms, "Deadline of each request")
      ->check(CLI::Range(1, 600000))
      ->capture_default_str();
  command.add_option("--seed", bench.seed, "Of keys, queries and times")->capture_default_str();
}

void AddSearchFlags(CLI::App& command, BenchFlags& flags) {
  command
      .add_option("--op", flags.op, "attend: finished attention; topk: rows and the rest's state")
      ->check(CLI::IsMember({"attend", "topk"}))
      ->capture_default_str();
  command.add_option("--index", flags.index, "Which index answers")
      ->check(CLI::IsMember({"auto", "exact", "ladder", "landmark", "cluster", "graph", "product"}))
      ->capture_default_str();
  command
      .add_option(
          "--build", flags.build,
          "Comma list of landmark, cluster, graph, product: sessions are opened with them, and "
          "requests sent while the daemon builds them and again when it has")
      ->delimiter(',')
      ->check(CLI::IsMember({"landmark", "cluster", "graph", "product"}));
  command
      .add_option("--scan-bits", flags.bench.scan_bits, "ladder: bits a dimension of the scan code")
      ->check(CLI::Range(1U, 2U))
      ->capture_default_str();
  command.add_option("--candidates", flags.candidates, "ladder: keys a group read at 4 bits")
      ->check(CLI::Range(1U, static_cast<uint32_t>(index::kMaxCandidates)))
      ->capture_default_str();
  command.add_option("--exact", flags.exact_rows, "ladder: rows a head read exactly")
      ->check(CLI::Range(0U, static_cast<uint32_t>(index::kMaxExactRows)))
      ->capture_default_str();
  command.add_option("--k", flags.bench.k, "topk: rows of each KV head")
      ->check(CLI::Range(1U, static_cast<uint32_t>(index::kMaxK)))
      ->capture_default_str();
}

}  // namespace

void AddBenchCommand(CLI::App& program, Action& action) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* command = program.add_subcommand("bench", "Measure a daemon under load");
  command->footer(kHelp);
  AddLoadFlags(*command, *flags);
  AddSearchFlags(*command, *flags);
  command
      ->add_option("--connections", flags->connections,
                   "Connections that share the sessions (4; with --rate 0 or --batch 1)")
      ->check(CLI::Range(1, 256));
  command
      ->add_option("--workers", flags->workers,
                   "Compute threads of the daemon started here; 0: one a core")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  AddConnectFlags(*command, flags->connect, /*required=*/false);
  AddSpinFlag(*command, flags->connect);
  AddFormatFlag(*command, flags->format);
  command->callback([flags, &action] {
    ResolveFlags(*flags);
    action = [flags] { return RunBenchCommand(*flags); };
  });
}

}  // namespace kvseek::cli
