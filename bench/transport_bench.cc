// Round trips through each transport, side by side in one run: an empty request, and one of a
// layer's size. A process of its own answers, with the daemon's server and nothing behind it.
//
//   transport_bench [--transport unix,tcp,shm,doorbell] [--spin-us 100000] [--request-bytes 8192]
//                   [--answer-bytes 17408] [--sweep-bytes 0] [--rounds 20000]
//
// One line of JSON for each transport and kind of request; times in us. With --sweep-bytes the
// answering side reads so much memory before it answers, as a search does; that time is taken out.
// A doorbell's question has 32 query heads of 128 dimensions, 8192 bytes, and its answer 8320,
// whatever the options say; the time that it says it took, its copy of the answer included, is
// taken out.
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cli/daemon_process.h"
#include "cli/percentile.h"
#include "client/channel.h"
#include "client/doorbell.h"
#include "service/doorbells.h"
#include "service/memory_budget.h"
#include "service/server.h"
#include "service/session_store.h"

namespace {

using kvseek::client::Answer;
using kvseek::client::Channel;
using kvseek::client::Clock;
using kvseek::client::Message;
using kvseek::proto::Op;

struct Flags {
  std::vector<std::string> transports = {"unix", "tcp", "shm", "doorbell"};
  uint32_t spin_us = 100'000;
  size_t request_bytes = 8192;
  size_t answer_bytes = 17408;
  size_t sweep_bytes = 0;
  int rounds = 20'000;
};

constexpr kvseek::ModelShape kShape{.layers = 1, .kv_heads = 8, .query_heads = 32};
constexpr size_t kStateBytes = 32 * (128 * sizeof(uint16_t) + sizeof(float));
constexpr uint64_t kSessionId = 1;  ///< the first of a store

double Micros(Clock::duration time) {
  return std::chrono::duration<double, std::micro>(time).count();
}

[[noreturn]] void Fail(const std::string& what) {
  std::cerr << "transport_bench: " << what << "\n";
  std::exit(1);
}

/// Answers empty requests with nothing and others with answer_bytes; the metadata is what sweeping
/// took.
class Echo {
 public:
  explicit Echo(const Flags& flags)
      : answer_bytes_(flags.answer_bytes), swept_(flags.sweep_bytes) {}

  void operator()(const kvseek::service::Request& request,
                  const std::function<void(kvseek::service::Response)>& done) {
    kvseek::service::Response response;
    if (request.payload.bytes != 0) {
      const auto begin = Clock::now();
      sum_ += std::accumulate(swept_.begin(), swept_.end(), uint64_t{0});
      const size_t bytes = request.attend == nullptr ? answer_bytes_ : kStateBytes;
      response.payload = kvseek::service::MakePayload(bytes);
      std::memset(response.payload.data.get(), static_cast<int>(sum_ | 1), bytes);
      const double took = Micros(Clock::now() - begin);
      response.metadata.assign(reinterpret_cast<const char*>(&took), sizeof(took));
    }
    done(std::move(response));
  }

 private:
  const size_t answer_bytes_;
  std::vector<uint8_t> swept_;
  uint64_t sum_ = 0;
};

/// Serves until it is killed. Writes its TCP address to `pipe`.
[[noreturn]] void Serve(const Flags& flags, const std::string& path, int pipe) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  kvseek::service::DaemonOptions options;
  options.listen = {"unix:" + path, "tcp://127.0.0.1:0"};
  options.io_spin = std::chrono::microseconds(flags.spin_us);
  options.doorbell_spin = options.io_spin;
  auto echo = std::make_shared<Echo>(flags);
  const auto answer = [echo](const kvseek::service::Request& request, auto done) {
    (*echo)(request, done);
  };
  kvseek::service::MemoryBudget budget(options.memory_limit_bytes, options.retry_after);
  kvseek::service::SessionStore store(options, budget);
  kvseek::service::SessionSettings settings;
  settings.layers = kShape.layers;
  settings.kv_heads = kShape.kv_heads;
  settings.query_heads = kShape.query_heads;
  settings.kv.key_dim = settings.kv.value_dim = static_cast<int>(kShape.key_dim);
  const auto session = store.Open(std::move(settings), 0, Clock::now());
  if (!session.ok() || (*session)->id() != kSessionId) Fail("the session");
  kvseek::service::Doorbells doorbells(options, store, answer);
  auto server = kvseek::service::Server::Start(options, {}, answer, &doorbells);
  if (!server.ok()) Fail(server.status().ToString());
  const std::string& tcp = (*server)->addresses()[1];
  if (write(pipe, tcp.c_str(), tcp.size() + 1) < 0) std::exit(1);
  for (;;) pause();
}

/// One round trip; what the other side says it took is not in it.
double RoundTrip(Channel& channel, const Flags& flags, const std::vector<uint8_t>& payload) {
  Message message;
  message.op = payload.empty() ? Op::kHealth : Op::kAttend;
  message.payload = payload;
  absl::StatusOr<Answer> answer = absl::UnknownError("none");
  std::atomic<bool> answered{false};
  const auto begin = Clock::now();
  channel.Start(std::move(message), begin + std::chrono::seconds(10), [&](auto got) {
    answer = std::move(got);
    answered.store(true);
    answered.notify_one();
  });
  if (flags.spin_us == 0) {
    answered.wait(false);
  } else {
    while (!answered.load()) channel.Poll();
  }
  double took = Micros(Clock::now() - begin);
  if (!answer.ok()) Fail(answer.status().ToString());
  if (payload.empty()) return took;
  double other = 0;
  if (answer->payload_bytes != flags.answer_bytes || answer->metadata.size() != sizeof(other)) {
    Fail("not the answer");
  }
  std::memcpy(&other, answer->metadata.data(), sizeof(other));
  return took - other;
}

/// The same through a doorbell; without queries nobody is asked.
double RoundTrip(kvseek::Doorbell& doorbell, bool asks, const std::vector<uint8_t>& queries) {
  const kvseek::transport::DoorbellItem item{.session_id = asks ? kSessionId : 0};
  const auto begin = Clock::now();
  const auto number = doorbell.Ring(0, 1, {&item, 1}, queries);
  if (!number.ok()) Fail(number.status().ToString());
  const auto states = doorbell.Await(0, *number, begin + std::chrono::seconds(10));
  const double took = Micros(Clock::now() - begin);
  if (!states.ok()) Fail(states.status().ToString());
  return took - (asks ? 1e-3 * static_cast<double>(states->daemon_ns) : 0.0);
}

void Run(const Flags& flags) {
  auto directory = kvseek::cli::TemporaryDirectory::Make();
  if (!directory.ok()) Fail(directory.status().ToString());
  const std::string path = ((*directory)->path() / "s").string();
  int ends[2];
  if (pipe(ends) != 0) Fail("pipe");
  const pid_t child = fork();
  if (child == 0) Serve(flags, path, ends[1]);
  char tcp[256] = {};
  if (read(ends[0], tcp, sizeof(tcp) - 1) <= 0) Fail("the server did not start");

  std::map<std::string, std::unique_ptr<Channel>> channels;
  std::unique_ptr<kvseek::Doorbell> doorbell;
  for (const std::string& transport : flags.transports) {
    if (transport == "doorbell") {
      auto opened = kvseek::Doorbell::Open({.address = "unix:" + path}, {.shape = kShape});
      if (!opened.ok()) Fail(opened.status().ToString());
      doorbell = *std::move(opened);
      continue;
    }
    kvseek::ClientOptions options;
    options.address = transport == "tcp" ? tcp : transport + ":" + path;
    options.spin = std::chrono::microseconds(flags.spin_us);
    channels[transport] = std::make_unique<Channel>(options);
    const absl::Status connected = channels[transport]->Connect();
    if (!connected.ok()) Fail(connected.ToString());
  }
  const std::vector<std::vector<uint8_t>> payloads = {{},
                                                      std::vector<uint8_t>(flags.request_bytes, 7)};
  const std::vector<uint8_t> queries(32 * 128 * sizeof(uint16_t));
  std::map<std::pair<std::string, size_t>, std::vector<double>> times;
  constexpr int kBlock = 200;  // of one kind at a time, so that all see the machine's moods
  for (int done = -kBlock; done < flags.rounds; done += kBlock) {
    for (const std::string& transport : flags.transports) {
      for (const std::vector<uint8_t>& payload : payloads) {
        for (int i = 0; i < kBlock; ++i) {
          const double took = transport == "doorbell"
                                  ? RoundTrip(*doorbell, !payload.empty(), queries)
                                  : RoundTrip(*channels[transport], flags, payload);
          if (done >= 0) times[{transport, payload.size()}].push_back(took);
        }
      }
    }
  }
  for (const auto& [key, samples] : times) {
    const size_t answer_bytes = key.first == "doorbell" ? kStateBytes : flags.answer_bytes;
    const nlohmann::ordered_json line = {{"transport", key.first},
                                         {"request_bytes", key.second},
                                         {"answer_bytes", key.second == 0 ? 0 : answer_bytes},
                                         {"spin_us", flags.spin_us},
                                         {"sweep_bytes", flags.sweep_bytes},
                                         {"rounds", samples.size()},
                                         {"p1_us", kvseek::cli::Percentile(samples, 0.01)},
                                         {"p50_us", kvseek::cli::Percentile(samples, 0.5)},
                                         {"p99_us", kvseek::cli::Percentile(samples, 0.99)}};
    std::cout << line.dump() << "\n";
  }
  channels.clear();
  doorbell.reset();
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Round trips through each transport.", "transport_bench");
  Flags flags;
  app.add_option("--transport", flags.transports, "unix, tcp, shm, doorbell")
      ->delimiter(',')
      ->check(CLI::IsMember({"unix", "tcp", "shm", "doorbell"}));
  app.add_option("--spin-us", flags.spin_us, "Both sides look so long before they sleep");
  app.add_option("--request-bytes", flags.request_bytes)->check(CLI::PositiveNumber);
  app.add_option("--answer-bytes", flags.answer_bytes)->check(CLI::PositiveNumber);
  app.add_option("--sweep-bytes", flags.sweep_bytes);
  app.add_option("--rounds", flags.rounds)->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  Run(flags);
  return 0;
}
