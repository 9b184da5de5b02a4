// kvseek ping, stats and sessions: what a running daemon says of itself.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "cli/commands.h"
#include "cli/connect.h"
#include "cli/percentile.h"
#include "cli/table.h"
#include "client/head_plan.h"

namespace kvseek::cli {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

struct DaemonFlags {
  ConnectFlags connect;
  std::string format = "text";
  int count = 1000;
  std::string plan_of;  ///< a session's id, as listed

  bool AsJson() const { return format == "json"; }
};

double Micros(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

std::string Id(uint64_t id) { return absl::StrFormat("%016x", id); }

std::string Seconds(std::chrono::milliseconds time) {
  return absl::StrFormat("%.1f s", static_cast<double>(time.count()) / 1000.0);
}

absl::Status RunPing(const DaemonFlags& flags) {
  const Clock::time_point begin = Clock::now();
  const absl::StatusOr<std::unique_ptr<KvClient>> client = Connect(flags.connect);
  if (!client.ok()) return client.status();
  const double hello = Micros(begin);
  std::vector<double> micros;
  for (int i = 0; i < flags.count; ++i) {
    const Clock::time_point sent = Clock::now();
    if (absl::Status status = (*client)->Health(); !status.ok()) return status;
    micros.push_back(Micros(sent));
  }
  const DaemonInfo info = (*client)->info();
  const double p50 = Percentile(micros, 0.5);
  const double p99 = Percentile(micros, 0.99);
  const double max = Percentile(micros, 1.0);
  if (flags.AsJson()) {
    std::cout << Json{{"server", info.server},
                      {"boot_id", Id(info.boot_id)},
                      {"simd_level", info.simd_level},
                      {"hello_micros", hello},
                      {"count", flags.count},
                      {"health_micros", {{"p50", p50}, {"p99", p99}, {"max", max}}}}
                     .dump(2)
              << '\n';
    return absl::OkStatus();
  }
  std::cout << info.server << ", boot id " << Id(info.boot_id) << ", SIMD level " << info.simd_level
            << "\nconnect and hello: " << Digits(hello) << " us\n"
            << flags.count << " health round trips: p50 " << Digits(p50) << " us, p99 "
            << Digits(p99) << " us, max " << Digits(max) << " us\n";
  return absl::OkStatus();
}

Json SessionJson(const SessionStats& session) {
  const ModelShape& shape = session.session.shape;
  return {{"session_id", Id(session.session.session_id)},
          {"name", session.name},
          {"shape",
           {{"layers", shape.layers},
            {"kv_heads", shape.kv_heads},
            {"query_heads", shape.query_heads},
            {"key_dim", shape.key_dim},
            {"value_dim", shape.value_dim},
            {"dtype", kernels::DTypeName(shape.dtype)},
            {"softmax_scale", shape.softmax_scale}}},
          {"tokens", session.tokens},
          {"bytes", session.bytes},
          {"idle_ms", session.idle.count()},
          {"lease_ms", session.lease.count()},
          {"scan_bits", session.scan_bits},
          {"error_target", session.error_target},
          {"model", session.model},
          {"planner_audits", session.planner_audits}};
}

void PrintStats(const std::string& address, const DaemonStats& stats) {
  Table table({"daemon", address});
  table.Add({"uptime", Seconds(stats.uptime)});
  table.Add({"memory used", ShortBytes(static_cast<double>(stats.memory_used_bytes))});
  table.Add({"memory limit", ShortBytes(static_cast<double>(stats.memory_limit_bytes))});
  table.Add({"sessions open", absl::StrCat(stats.sessions_open)});
  table.Add({"connections open", absl::StrCat(stats.connections_open)});
  table.Add({"queue depth", absl::StrCat(stats.queue_depth)});
  table.Add({"queue limit", absl::StrCat(stats.queue_limit)});
  table.Add({"workers", absl::StrCat(stats.workers)});
  table.Add({"SIMD level", stats.simd_level});
  for (const auto& [name, value] : stats.counters) table.Add({name, absl::StrCat(value)});
  std::cout << table.Text();
}

absl::Status RunStats(const DaemonFlags& flags) {
  const absl::StatusOr<std::unique_ptr<KvClient>> client = Connect(flags.connect);
  if (!client.ok()) return client.status();
  const absl::StatusOr<DaemonStats> stats = (*client)->Stats(/*with_sessions=*/false);
  if (!stats.ok()) return stats.status();
  if (!flags.AsJson()) {
    PrintStats(flags.connect.via, *stats);
    return absl::OkStatus();
  }
  std::cout << Json{{"uptime_ms", stats->uptime.count()},
                    {"memory_used_bytes", stats->memory_used_bytes},
                    {"memory_limit_bytes", stats->memory_limit_bytes},
                    {"sessions_open", stats->sessions_open},
                    {"connections_open", stats->connections_open},
                    {"queue_depth", stats->queue_depth},
                    {"queue_limit", stats->queue_limit},
                    {"workers", stats->workers},
                    {"simd_level", stats->simd_level},
                    {"counters", stats->counters}}
                   .dump(2)
            << '\n';
  return absl::OkStatus();
}

/// "8192", or "0..8192" where layers hold different numbers.
std::string TokensText(const std::vector<uint64_t>& tokens) {
  if (tokens.empty()) return "0";
  const auto [least, most] = std::minmax_element(tokens.begin(), tokens.end());
  return *least == *most ? absl::StrCat(*most) : absl::StrCat(*least, "..", *most);
}

/// The file of `kvseek plan`, whatever the format.
absl::Status PrintPlan(KvClient& client, const std::string& id) {
  Session session{.boot_id = client.info().boot_id};
  if (!absl::SimpleHexAtoi(id, &session.session_id) || session.session_id == 0) {
    return absl::InvalidArgumentError(absl::StrCat("--plan: \"", id, "\" is no session's id"));
  }
  const absl::StatusOr<HeadPlan> plan = client.PlanOf(session);
  if (!plan.ok()) return plan.status();
  const absl::StatusOr<std::string> text = FormatHeadPlan(*plan);
  if (!text.ok()) return text.status();
  std::cout << *text;
  return absl::OkStatus();
}

absl::Status RunSessions(const DaemonFlags& flags) {
  const absl::StatusOr<std::unique_ptr<KvClient>> client = Connect(flags.connect);
  if (!client.ok()) return client.status();
  if (!flags.plan_of.empty()) return PrintPlan(**client, flags.plan_of);
  const absl::StatusOr<DaemonStats> stats = (*client)->Stats(/*with_sessions=*/true);
  if (!stats.ok()) return stats.status();
  if (flags.AsJson()) {
    Json list = Json::array();
    for (const SessionStats& session : stats->sessions) list.push_back(SessionJson(session));
    std::cout << Json{{"sessions", list}}.dump(2) << '\n';
    return absl::OkStatus();
  }
  Table table({"session", "name", "layers", "kv heads", "query heads", "dim", "dtype", "scan bits",
               "tokens", "memory", "idle", "lease"});
  for (const SessionStats& session : stats->sessions) {
    const ModelShape& shape = session.session.shape;
    table.Add({Id(session.session.session_id), session.name.empty() ? "-" : session.name,
               absl::StrCat(shape.layers), absl::StrCat(shape.kv_heads),
               absl::StrCat(shape.query_heads), absl::StrCat(shape.key_dim),
               kernels::DTypeName(shape.dtype), absl::StrCat(session.scan_bits),
               TokensText(session.tokens), ShortBytes(static_cast<double>(session.bytes)),
               Seconds(session.idle), Seconds(session.lease)});
  }
  std::cout << table.Text();
  return absl::OkStatus();
}

CLI::App* AddCommand(CLI::App& program, Action& action, const std::string& name,
                     const std::string& about, const std::string& help,
                     absl::Status (*run)(const DaemonFlags&),
                     const std::shared_ptr<DaemonFlags>& flags) {
  CLI::App* command = program.add_subcommand(name, about);
  command->footer(help);
  AddConnectFlags(*command, flags->connect, /*required=*/true);
  AddFormatFlag(*command, flags->format);
  command->callback([flags, run, &action] { action = [flags, run] { return run(*flags); }; });
  return command;
}

}  // namespace

void AddDaemonCommands(CLI::App& program, Action& action) {
  auto ping = std::make_shared<DaemonFlags>();
  CLI::App* ping_command = AddCommand(
      program, action, "ping", "Say hello to a daemon and time round trips",
      "Health requests go one after another and do no work: what is left is the socket, two "
      "threads\nand the frames. A decoder pays it once for each layer and step.\n\nExample:\n"
      "  kvseek ping --via unix:/run/kvseek.sock --count 1000",
      RunPing, ping);
  ping_command->add_option("--count", ping->count, "Round trips")
      ->check(CLI::Range(1, 10'000'000))
      ->capture_default_str();
  AddSpinFlag(*ping_command, ping->connect);
  AddCommand(
      program, action, "stats", "Show a daemon's memory, queue and counters",
      "Counters count since the daemon's start; docs/operations.md explains each.\n\nExample:\n"
      "  kvseek stats --via tcp://127.0.0.1:7400 --format json",
      RunStats, std::make_shared<DaemonFlags>());
  auto sessions = std::make_shared<DaemonFlags>();
  AddCommand(program, action, "sessions", "List a daemon's open sessions",
             "Memory counts segments that a fork shares in each session that holds them. An idle "
             "session is\nclosed when its lease has run out.\n\nExamples:\n"
             "  kvseek sessions --via unix:/run/kvseek.sock\n"
             "  kvseek sessions --via unix:/run/kvseek.sock --plan 0000000000000001 > plan.json",
             RunSessions, sessions)
      ->add_option(
          "--plan", sessions->plan_of,
          "Print this session's head plan instead, as it is now (the JSON of kvseek plan)");
}

}  // namespace kvseek::cli
