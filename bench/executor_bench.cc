// How well the executor (service/search_executor.h) keeps its workers busy, apart from what units
// compute: they sleep. So one can see on two cores how it hands out units to sixteen.
//
//   executor_bench [--workers 14] [--sessions 1,2,4,8] [--searches 8] [--scale 20] [--seconds 2]
//                  [--format text|json]
//
// A search has the steps of a ladder of 128K tokens, with the times of units measured on 16 cores
// (docs/performance.md, "The service on 16 cores"), times --scale, so that sleeping is accurate;
// all printed times are divided by it again. Each number of sessions, of --searches each, is asked
// for in one request after the other, and by as many clients at the same time, each asking again as
// soon as it is answered.
#include <CLI/CLI.hpp>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <latch>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/percentile.h"
#include "cli/table.h"
#include "service/search_executor.h"

namespace {

using Clock = std::chrono::steady_clock;
using Micros = std::chrono::duration<double, std::micro>;
using Json = nlohmann::ordered_json;
using kvseek::index::Scratch;

/// Of a step: pieces and what each takes, and what the one thread takes that ends the step.
struct Step {
  int pieces;
  double piece_us;
  double end_us;
};
constexpr Step kSteps[] = {{4, 17.0, 27.0}, {16, 44.0, 8.0}, {4, 20.0, 0.0}};
constexpr double kPlanUs = 31.0;
constexpr double kFinishUs = 9.0;

struct Flags {
  int workers = 14;
  std::vector<int> sessions = {1, 2, 4, 8};
  int searches = 8;
  double scale = 20.0;
  double seconds = 2.0;
  std::string format = "text";
};

/// An index whose units sleep; counts them and their time.
class SleepingIndex final : public kvseek::index::KeyIndex {
 public:
  explicit SleepingIndex(double scale) : scale_(scale) {}
  absl::string_view name() const override { return "sleeping"; }
  kvseek::index::PlanPtr Plan(const kvseek::index::KvView&, const kvseek::index::SearchQuery&,
                              const kvseek::index::SearchOptions&, Scratch&) const override {
    Sleep(kPlanUs);
    return kvseek::index::MakePlan<SleepingPlan>(*this);
  }
  /// Since the last call: time slept, in unscaled us.
  double TakeBusyUs() { return static_cast<double>(busy_ns_.exchange(0)) * 1e-3 / scale_; }

 private:
  class SleepingPlan final : public kvseek::index::SearchPlan {
   public:
    SleepingPlan(Scratch&, const SleepingIndex& index) : index_(index) {}
    int pieces() const override { return step_->pieces; }
    void Run(int, Scratch&) override { index_.Sleep(step_->piece_us); }
    bool NextStep(Scratch&) override {
      index_.Sleep(step_->end_us);
      return ++step_ != std::end(kSteps);
    }
    void Finish(kvseek::index::SearchResult&, Scratch&) override { index_.Sleep(kFinishUs); }

   private:
    const SleepingIndex& index_;
    const Step* step_ = std::begin(kSteps);
  };

  void Sleep(double us) const {
    const Clock::time_point begin = Clock::now();
    std::this_thread::sleep_for(Micros(us * scale_));
    busy_ns_ += std::chrono::nanoseconds(Clock::now() - begin).count();
  }

  const double scale_;
  mutable std::atomic<int64_t> busy_ns_{0};
};

/// Runs `searches` searches as one request and waits for them; false: not all were answered.
bool Ask(kvseek::service::ComputePool& pool, const SleepingIndex& index, int searches) {
  std::vector<kvseek::service::SearchTask> tasks(static_cast<size_t>(searches));
  for (kvseek::service::SearchTask& task : tasks) task.index = &index;
  const kvseek::service::GiveUp give_up = {Clock::now() + std::chrono::minutes(10), nullptr,
                                           nullptr};
  bool all = false;
  std::latch done(1);
  pool.Submit([&](Scratch& scratch) {
    kvseek::service::RunSearches(
        pool, tasks, give_up,
        [&](auto results, Scratch&) {
          all = results.ok() && results->size() == static_cast<size_t>(searches);
          done.count_down();
        },
        scratch);
  });
  done.wait();
  return all;
}

struct Row {
  int sessions;
  int clients;
  double request_us;  ///< median
  double session_us;  ///< of the clock, for each session answered
  double busy;        ///< share of the workers' time
};

/// `sessions` in requests of `clients` clients.
Row Measure(const Flags& flags, kvseek::service::ComputePool& pool, SleepingIndex& index,
            int sessions, int clients) {
  std::mutex mutex;
  std::vector<double> micros;
  index.TakeBusyUs();
  const Clock::time_point begin = Clock::now();
  const auto client = [&] {
    while (Clock::now() - begin < std::chrono::duration<double>(flags.seconds)) {
      const Clock::time_point asked = Clock::now();
      if (!Ask(pool, index, flags.searches * sessions / clients)) std::exit(1);
      const double took = Micros(Clock::now() - asked).count() / flags.scale;
      const std::lock_guard lock(mutex);
      micros.push_back(took);
    }
  };
  std::vector<std::thread> others;
  for (int c = 1; c < clients; ++c) others.emplace_back(client);
  client();
  for (std::thread& other : others) other.join();
  const double all_us = Micros(Clock::now() - begin).count() / flags.scale;
  const double answered = static_cast<double>(micros.size()) * sessions / clients;
  return {sessions, clients, kvseek::cli::Percentile(micros, 0.5), all_us / answered,
          index.TakeBusyUs() / (all_us * flags.workers)};
}

}  // namespace

int main(int argc, char** argv) {
  Flags flags;
  CLI::App app("Keeps the executor's workers busy with units that sleep");
  app.add_option("--workers", flags.workers)->check(CLI::Range(1, 256))->capture_default_str();
  app.add_option("--sessions", flags.sessions)->delimiter(',')->check(CLI::Range(1, 64));
  app.add_option("--searches", flags.searches)->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--scale", flags.scale)->check(CLI::Range(0.1, 1e3))->capture_default_str();
  app.add_option("--seconds", flags.seconds)->check(CLI::Range(0.01, 60.0))->capture_default_str();
  app.add_option("--format", flags.format)->check(CLI::IsMember({"text", "json"}));
  CLI11_PARSE(app, argc, argv);

  kvseek::service::DaemonOptions options;
  options.workers = flags.workers;
  kvseek::service::ComputePool pool(options);
  SleepingIndex index(flags.scale);
  kvseek::cli::Table table({"sessions", "clients", "request p50, us", "a session, us", "busy"});
  Json rows = Json::array();
  for (const int sessions : flags.sessions) {
    for (const int clients : {1, sessions}) {
      const Row row = Measure(flags, pool, index, sessions, clients);
      table.Add({absl::StrCat(row.sessions), absl::StrCat(row.clients),
                 kvseek::cli::Digits(row.request_us), kvseek::cli::Digits(row.session_us),
                 kvseek::cli::Digits(row.busy)});
      rows.push_back({{"sessions", row.sessions},
                      {"clients", row.clients},
                      {"request_micros_p50", row.request_us},
                      {"session_micros", row.session_us},
                      {"busy", row.busy}});
      if (sessions == 1) break;
    }
  }
  if (flags.format == "json") {
    std::cout
        << Json{{"workers", flags.workers}, {"searches", flags.searches}, {"rows", rows}}.dump(2)
        << '\n';
  } else {
    std::cout << table.Text();
  }
}
