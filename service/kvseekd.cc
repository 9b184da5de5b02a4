// The daemon's program: command line, logging, signals. Exit codes: 0 stopped by a signal, 1
// failure, 2 bad usage.
#include <google/protobuf/stubs/logging.h>
#include <pthread.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

#include "kernels/cpu/simd_level.h"
#include "proto/head_plan_file.h"
#include "service/daemon.h"

namespace {

constexpr int kFailure = 1;
constexpr int kBadUsage = 2;

struct Arguments {
  kvseek::service::DaemonOptions options;
  uint64_t lease_ms = 0;
  uint32_t io_spin_us = 0;
  uint32_t worker_spin_us = 0;
  uint32_t doorbell_spin_us = 0;
  std::string token_file;
  std::string plan_file;
  std::string log_level = "info";
  std::string numa = "auto";
  bool print_ready = false;
};

/// A socket that only this user can reach.
std::string DefaultAddress() {
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");
  if (runtime != nullptr && *runtime != '\0')
    return std::string("unix:") + runtime + "/kvseek.sock";
  return "unix:/tmp/kvseek-" + std::to_string(getuid()) + ".sock";
}

void Declare(CLI::App& app, Arguments& arguments) {
  kvseek::service::DaemonOptions& options = arguments.options;
  arguments.lease_ms = static_cast<uint64_t>(options.lease_default.count());
  app.set_version_flag("--version", "kvseekd " KVSEEK_VERSION);
  app.set_config("--config", "", "Read options from a file of name = value lines");
  app.add_option("--listen", options.listen,
                 "Where to listen: unix:/path or tcp://host:port (0: any free port); repeatable. "
                 "Default: " +
                     DefaultAddress());
  app.add_option("--memory", options.memory_limit_bytes,
                 "Memory for keys, values and codes of all sessions, e.g. 64GiB")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true))
      ->capture_default_str();
  app.add_option("--prefault", options.prefault_bytes,
                 "Of --memory, take so much from the system at the start and keep it, e.g. 48GiB: "
                 "prefills are then not slowed by the system clearing it")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true))
      ->capture_default_str();
  app.add_option("--shared-memory", options.shared_memory_bytes_max,
                 "Memory for the connections of clients on this host that ask for it (shm:), "
                 "2 MiB each, and for doorbells; 0: none is granted")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true))
      ->capture_default_str();
  app.add_option("--workers", options.workers, "Compute threads; 0: one a core")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_option("--build-threads", options.build_threads,
                 "Threads that build indexes where a core is idle; 0: none are built")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_flag("--pin", options.pin_workers, "Pin each compute thread to a core of its own");
  app.add_option("--numa", arguments.numa,
                 "auto: with several NUMA nodes each KV head lies on one and is searched there; "
                 "off: as if there were one")
      ->check(CLI::IsMember({"auto", "off"}))
      ->capture_default_str();
  app.add_option("--io-threads", options.io_threads,
                 "Threads that read requests and write what workers could not; one moves several "
                 "GB/s of many connections")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  constexpr uint32_t kSpinMaxUs = 1'000'000;
  app.add_option("--io-spin-us", arguments.io_spin_us,
                 "Microseconds that the socket thread looks for work before it sleeps")
      ->check(CLI::Range(0U, kSpinMaxUs))
      ->capture_default_str();
  app.add_option("--worker-spin-us", arguments.worker_spin_us,
                 "Microseconds that a compute thread looks for work before it sleeps")
      ->check(CLI::Range(0U, kSpinMaxUs))
      ->capture_default_str();
  arguments.doorbell_spin_us = static_cast<uint32_t>(options.doorbell_spin.count());
  app.add_option("--doorbell-spin-us", arguments.doorbell_spin_us,
                 "Microseconds after a question through a doorbell that the thread which looks for "
                 "them goes without sleep")
      ->check(CLI::Range(0U, kSpinMaxUs))
      ->capture_default_str();
  app.add_option("--audit-share", options.audit_share,
                 "Share of Attend requests that are also answered exactly where a core is idle")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--plan", arguments.plan_file,
                 "File of `kvseek plan`: index, candidates and threshold of each KV head, for "
                 "sessions that are "
                 "opened without a plan and that it fits")
      ->check(CLI::ExistingFile);
  app.add_option("--error-target", options.error_target,
                 "Mean output error that audits plan KV heads for, in sessions that name none; 0: "
                 "they plan nothing; needs --audit-share")
      ->check(CLI::Range(0.0F, 10.0F))
      ->capture_default_str();
  app.add_option("--queue-limit", options.queue_limit,
                 "Requests waiting or under way; more are refused")
      ->check(CLI::Range(1U, 1U << 20))
      ->capture_default_str();
  const std::map<std::string, uint64_t> units = {
      {"ms", 1}, {"s", 1000}, {"min", 60'000}, {"h", 3'600'000}};
  app.add_option("--lease", arguments.lease_ms,
                 "Close a session that is unused for so long, e.g. 10min (ms, s, min, h)")
      ->transform(CLI::AsNumberWithUnit(units, CLI::AsNumberWithUnit::UNIT_REQUIRED))
      ->check(CLI::PositiveNumber);
  app.add_option("--token-file", arguments.token_file,
                 "Serve only clients that know the secret in this file")
      ->check(CLI::ExistingFile);
  app.add_option("--log-level", arguments.log_level, "What to log on stderr")
      ->check(CLI::IsMember({"debug", "info", "warn", "error", "off"}))
      ->capture_default_str();
  app.add_flag("--print-ready", arguments.print_ready,
               "Print one line, \"ready ADDRESS...\", on stdout once it serves");
}

bool ReadToken(const std::string& path, std::string& token) {
  std::ifstream file(path);
  token.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  while (!token.empty() && (token.back() == '\n' || token.back() == '\r')) token.pop_back();
  return !file.bad() && !token.empty();
}

int Serve(const Arguments& arguments, const sigset_t& signals) {
  const auto daemon = kvseek::service::Daemon::Start(arguments.options);
  if (!daemon.ok()) {
    spdlog::error("cannot start: {}", daemon.status().ToString());
    return daemon.status().code() == absl::StatusCode::kInvalidArgument ? kBadUsage : kFailure;
  }
  if (arguments.print_ready) {
    std::string line = "ready";
    for (const std::string& address : (*daemon)->addresses()) line += " " + address;
    std::puts(line.c_str());
    std::fflush(stdout);
  }
  int signal = 0;
  sigwait(&signals, &signal);
  spdlog::info("stopping on signal {}", signal);
  (*daemon)->Stop();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("kvseekd stores attention keys and values and answers searches over them.",
               "kvseekd");
  Arguments arguments;
  Declare(app, arguments);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kBadUsage;
  }
  spdlog::set_default_logger(spdlog::stderr_logger_mt("kvseekd"));
  spdlog::set_level(spdlog::level::from_str(arguments.log_level));
  // It writes a line for every string that is not UTF-8: a client could fill the log.
  google::protobuf::SetLogHandler(nullptr);
  if (!arguments.token_file.empty() && !ReadToken(arguments.token_file, arguments.options.token)) {
    spdlog::error("no token in {}", arguments.token_file);
    return kBadUsage;
  }
  if (!arguments.plan_file.empty()) {
    auto plan = kvseek::proto::ReadHeadPlan(arguments.plan_file);
    if (!plan.ok()) {
      spdlog::error("--plan: {}", std::string(plan.status().message()));
      return kBadUsage;
    }
    arguments.options.plan = std::make_shared<const kvseek::proto::HeadPlan>(*std::move(plan));
  }
  if (!kvseek::kernels::ApplySimdLevelFromEnvironment()) {
    spdlog::error("KVSEEK_SIMD names no level that this machine has");
    return kBadUsage;
  }
  arguments.options.io_spin = std::chrono::microseconds(arguments.io_spin_us);
  arguments.options.worker_spin = std::chrono::microseconds(arguments.worker_spin_us);
  arguments.options.doorbell_spin = std::chrono::microseconds(arguments.doorbell_spin_us);
  arguments.options.numa = arguments.numa == "auto";
  arguments.options.lease_default = std::chrono::milliseconds(arguments.lease_ms);
  if (arguments.options.lease_max < arguments.options.lease_default) {
    arguments.options.lease_max = arguments.options.lease_default;
  }
  if (arguments.options.listen.empty()) arguments.options.listen.push_back(DefaultAddress());

  // Blocked before any thread starts, so that all inherit it and only sigwait sees them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return Serve(arguments, signals);
}
