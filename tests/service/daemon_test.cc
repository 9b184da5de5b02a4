// A real daemon, in this process and as a program: leases, restarts, command line.
#include "service/daemon.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <future>
#include <sstream>
#include <thread>

#include "absl/strings/str_split.h"
#include "client/kv_client.h"
#include "index/slab_memory.h"
#include "tests/client/raw_socket.h"

namespace kvseek::service {
namespace {

using std::chrono::milliseconds;

constexpr ModelShape kShape{
    .layers = 1, .kv_heads = 1, .query_heads = 2, .key_dim = 8, .value_dim = 8};

class DaemonTest : public testing::Test {
 protected:
  std::string address() const { return "unix:" + dir_.path() + "/s"; }
  DaemonOptions Options() const {
    DaemonOptions options;
    options.listen = {address()};
    options.workers = 1;
    return options;
  }
  std::unique_ptr<KvClient> Connect(const std::string& token = "") const {
    auto client = KvClient::Connect({.address = address(), .token = token});
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? *std::move(client) : nullptr;
  }
  static absl::StatusOr<uint64_t> Append(KvClient& client, const Session& session, uint64_t start,
                                         uint32_t tokens) {
    const std::vector<uint16_t> rows(size_t{tokens} * 8, kernels::FloatToBf16(1.0F));
    return client.Append(session, 0, start, tokens, rows, rows);
  }

  test::TempDir dir_;
};

TEST_F(DaemonTest, OptionsThatMakeNoSense) {
  DaemonOptions options = Options();
  options.io_threads = 0;
  EXPECT_EQ(Daemon::Start(options).status().code(), absl::StatusCode::kInvalidArgument);
  options = Options();
  options.prefault_bytes = options.memory_limit_bytes + 1;
  EXPECT_EQ(Daemon::Start(options).status().code(), absl::StatusCode::kInvalidArgument);
  options = Options();
  options.scan_bits = 3;
  EXPECT_EQ(Daemon::Start(options).status().code(), absl::StatusCode::kInvalidArgument);
  options = Options();
  options.listen.clear();
  EXPECT_EQ(Daemon::Start(options).status().code(), absl::StatusCode::kInvalidArgument);
  for (const uint64_t bytes : {uint64_t{1}, uint64_t{5000}, uint64_t{1} << 31}) {
    options = Options();
    options.shared_ring_bytes = bytes;
    EXPECT_EQ(Daemon::Start(options).status().code(), absl::StatusCode::kInvalidArgument) << bytes;
  }
}

TEST_F(DaemonTest, UnusedSessionsAreClosedAfterTheirLease) {
  const auto daemon = Daemon::Start(Options());
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  const auto client = Connect();
  const auto brief = client->Open(kShape, {.lease = milliseconds(100)});
  const auto lasting = client->Open(kShape, {});
  ASSERT_TRUE(brief.ok()) << brief.status();
  ASSERT_TRUE(lasting.ok()) << lasting.status();
  uint64_t open = 2;
  for (int i = 0; i < 100 && open == 2; ++i) {
    std::this_thread::sleep_for(milliseconds(50));
    const auto stats = client->Stats(false);
    ASSERT_TRUE(stats.ok()) << stats.status();
    open = stats->sessions_open;
  }
  EXPECT_EQ(open, 1U);
  EXPECT_EQ(Append(*client, *brief, 0, 1).status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(Append(*client, *lasting, 0, 1).ok());
}

TEST_F(DaemonTest, AClientOutlivesARestart) {
  auto daemon = Daemon::Start(Options());
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  const uint64_t boot_id = (*daemon)->boot_id();
  const auto client = Connect();
  EXPECT_EQ(client->info().boot_id, boot_id);
  const auto session = client->Open(kShape, {});
  ASSERT_TRUE(session.ok()) << session.status();
  ASSERT_TRUE(Append(*client, *session, 0, 10).ok());

  (*daemon)->Stop();
  EXPECT_EQ(client->Health().code(), absl::StatusCode::kUnavailable);
  daemon = Daemon::Start(Options());
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  EXPECT_TRUE(client->Health().ok());
  EXPECT_NE(client->info().boot_id, boot_id);
  const absl::Status stale = Append(*client, *session, 10, 1).status();
  EXPECT_EQ(stale.code(), absl::StatusCode::kFailedPrecondition) << stale;
  EXPECT_THAT(ErrorField(stale), testing::HasSubstr("boot_id"));
  EXPECT_TRUE(client->Open(kShape, {}).ok());
}

TEST_F(DaemonTest, AppendsAreRepeatedAfterAReconnect) {
  const auto daemon = Daemon::Start(Options());
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  auto client = Connect();
  const auto session = client->Open(kShape, {});
  ASSERT_TRUE(session.ok()) << session.status();
  ASSERT_EQ(*Append(*client, *session, 0, 10), 10U);
  client = Connect();  // the answer was lost with the connection, say
  EXPECT_EQ(*Append(*client, *session, 0, 10), 10U);
  EXPECT_EQ(*Append(*client, *session, 5, 10), 15U);
  EXPECT_EQ(Append(*client, *session, 16, 1).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(DaemonTest, StopWhileManyAreBusy) {
  const auto daemon = Daemon::Start(Options());
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  const auto session = Connect()->Open(kShape, {});
  ASSERT_TRUE(session.ok()) << session.status();
  std::atomic<int> calls{0};
  std::vector<std::unique_ptr<KvClient>> clients;
  for (int i = 0; i < 4; ++i) {
    clients.push_back(Connect());
    ASSERT_NE(clients.back(), nullptr);
  }
  std::vector<std::thread> threads;
  for (const auto& client : clients) {
    threads.emplace_back([&] {
      for (;;) {
        const auto held = Append(*client, *session, 0, 2000);
        ++calls;
        if (held.ok()) continue;
        EXPECT_EQ(held.status().code(), absl::StatusCode::kUnavailable) << held.status();
        return;
      }
    });
  }
  while (calls < 40) std::this_thread::sleep_for(milliseconds(1));
  (*daemon)->Stop();
  for (std::thread& thread : threads) thread.join();
}

/// A kvseekd of its own.
class Program {
 public:
  explicit Program(std::vector<std::string> arguments, const std::string& environment = "") {
    int output[2];
    if (pipe2(output, O_CLOEXEC) != 0) std::abort();
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, output[1], STDOUT_FILENO);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
    arguments.insert(arguments.begin(), KVSEEK_BIN_DIR "/kvseekd");
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    std::string variable = environment;
    std::vector<char*> envp;
    if (!variable.empty()) envp.push_back(variable.data());
    envp.push_back(nullptr);
    const int failed = posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), envp.data());
    posix_spawn_file_actions_destroy(&actions);
    close(output[1]);
    output_ = output[0];
    if (failed != 0) pid_ = -1;
  }
  ~Program() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    close(output_);
  }
  std::string ReadLine() const {
    std::string line;
    char byte = 0;
    while (read(output_, &byte, 1) == 1 && byte != '\n') line.push_back(byte);
    return line;
  }
  void Signal(int signal) const { kill(pid_, signal); }
  /// Stands still when this returns.
  void Halt() const {
    int status = 0;
    kill(pid_, SIGSTOP);
    waitpid(pid_, &status, WUNTRACED);
  }
  /// Its exit code; -1 if it was killed.
  int Wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

 private:
  pid_t pid_ = -1;
  int output_ = -1;
};

TEST_F(DaemonTest, ProgramSaysWhenItIsReadyAndStopsOnASignal) {
  for (const int signal : {SIGTERM, SIGINT}) {
    Program program({"--listen", address(), "--listen", "tcp://127.0.0.1:0", "--io-threads", "2",
                     "--workers", "1", "--memory", "64MiB", "--print-ready"});
    const std::vector<std::string> words = absl::StrSplit(program.ReadLine(), ' ');
    ASSERT_EQ(words.size(), 3U);
    EXPECT_EQ(words[0], "ready");
    EXPECT_EQ(words[1], address());
    const auto client = KvClient::Connect({.address = words[2]});
    ASSERT_TRUE(client.ok()) << client.status();
    const auto stats = (*client)->Stats(false);
    ASSERT_TRUE(stats.ok()) << stats.status();
    EXPECT_EQ(stats->memory_limit_bytes, 64ULL << 20);
    EXPECT_EQ(stats->workers, 1U);
    program.Signal(signal);
    EXPECT_EQ(program.Wait(), 0);
    EXPECT_NE(access((dir_.path() + "/s").c_str(), F_OK), 0);
  }
}

TEST_F(DaemonTest, AKilledProgramIsNoticedAtOnceHoweverItsClientWaits) {
  for (const std::string scheme : {"unix:", "shm:"}) {
    for (const int spin_us : {0, 500, 10'000'000}) {
      SCOPED_TRACE(scheme + std::to_string(spin_us));
      Program program({"--listen", address(), "--workers", "1", "--memory", "64MiB",
                       "--print-ready", "--io-spin-us", spin_us == 0 ? "0" : "500"});
      program.ReadLine();
      const auto client = KvClient::Connect(
          {.address = scheme + dir_.path() + "/s", .spin = std::chrono::microseconds(spin_us)});
      ASSERT_TRUE(client.ok()) << client.status();
      const auto session = (*client)->Open(kShape, {});
      ASSERT_TRUE(session.ok()) << session.status();
      program.Halt();
      std::promise<absl::Status> ended;
      const std::vector<uint16_t> rows(8, kernels::FloatToBf16(1.0F));
      (*client)->AppendAsync(*session, 0, 0, 1, rows, rows, {},
                             [&](const auto& held) { ended.set_value(held.status()); });
      auto status = ended.get_future();
      EXPECT_EQ(status.wait_for(milliseconds(20)), std::future_status::timeout);
      program.Signal(SIGKILL);
      ASSERT_EQ(status.wait_for(milliseconds(1000)), std::future_status::ready);
      EXPECT_EQ(status.get().code(), absl::StatusCode::kUnavailable);
    }
  }
}

TEST_F(DaemonTest, ProgramTellsBadUsageFromFailure) {
  EXPECT_EQ(Program({"--version"}).Wait(), 0);
  EXPECT_EQ(Program({"--help"}).Wait(), 0);
  EXPECT_EQ(Program({"--no-such-option"}).Wait(), 2);
  EXPECT_EQ(Program({"--memory", "many"}).Wait(), 2);
  EXPECT_EQ(Program({"--lease", "5"}).Wait(), 2);
  EXPECT_EQ(Program({"--numa", "2"}).Wait(), 2);
  EXPECT_EQ(Program({"--listen", "carrier:pigeon"}).Wait(), 2);
  EXPECT_EQ(Program({"--token-file", dir_.path() + "/none"}).Wait(), 2);
  EXPECT_EQ(Program({"--listen", address()}, "KVSEEK_SIMD=abacus").Wait(), 2);
  EXPECT_EQ(Program({"--listen", "unix:" + dir_.path() + "/no/such/folder"}).Wait(), 1);
}

TEST_F(DaemonTest, ProgramReadsItsPlan) {
  HeadPlan plan{.scan_bits = 1, .error_target = 0.1};
  plan.heads.push_back({.mode = HeadMode::kState, .index = "ladder", .candidates = 77});
  const std::string path = dir_.path() + "/plan";
  ASSERT_TRUE(WriteHeadPlan(plan, path).ok());
  Program program({"--listen", address(), "--plan", path, "--numa", "off", "--print-ready"});
  ASSERT_EQ(program.ReadLine(), "ready " + address());
  const auto client = Connect();
  const auto session = client->Open(kShape, {});
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_EQ(*client->PlanOf(*session), plan);
  const auto fork = client->Fork(*session, std::nullopt, {});
  ASSERT_TRUE(fork.ok()) << fork.status();
  EXPECT_EQ(*client->PlanOf(*fork), plan);
  HeadPlan own = plan;
  own.heads[0].candidates = 5;
  const auto planned = client->Open(kShape, {.plan = own});
  ASSERT_TRUE(planned.ok()) << planned.status();
  EXPECT_EQ(*client->PlanOf(*planned), own);
  const auto two_bits = client->Open(kShape, {.scan_bits = 2});
  ASSERT_TRUE(two_bits.ok()) << two_bits.status();
  EXPECT_EQ(*client->PlanOf(*two_bits), HeadPlan());
  const auto gone = client->PlanOf({.boot_id = client->info().boot_id, .session_id = 99});
  EXPECT_EQ(gone.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(client->PlanOf({.boot_id = 1, .session_id = session->session_id}).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(DaemonTest, ProgramRefusesPlansThatItCannotRead) {
  const std::string path = dir_.path() + "/plan";
  EXPECT_EQ(Program({"--listen", address(), "--plan", path}).Wait(), 2);
  std::ofstream(path) << "{\"version\": 7}";
  EXPECT_EQ(Program({"--listen", address(), "--plan", path}).Wait(), 2);
  EXPECT_EQ(Program({"--listen", address(), "--error-target", "0.1"}).Wait(), 2);
  EXPECT_EQ(Program({"--listen", address(), "--error-target", "-1"}).Wait(), 2);
}

TEST_F(DaemonTest, MemoryThatIsPrefaultedIsThereAtTheStart) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "segments are allocations of their own here";
#endif
  DaemonOptions options = Options();
  options.prefault_bytes = 2 * index::kSlabBytes;
  const size_t before = index::SlabBytes();
  {
    const auto daemon = Daemon::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    EXPECT_EQ(index::SlabBytes(), before + 2 * index::kSlabBytes);
    const auto client = Connect();
    const auto session = client->Open(kShape, {});
    ASSERT_TRUE(Append(*client, *session, 0, 3000).ok());
    EXPECT_EQ(index::SlabBytes(), before + 2 * index::kSlabBytes);
  }
  EXPECT_EQ(index::SlabBytes(), before);
}

TEST_F(DaemonTest, ProgramReadsItsConfigAndToken) {
  std::ofstream(dir_.path() + "/token") << "open sesame\n";
  std::ofstream(dir_.path() + "/config") << "listen = \"" << address() << "\"\nworkers = 2\n"
                                         << "queue-limit = 77\nlease = \"3s\"\n"
                                         << "token-file = \"" << dir_.path() << "/token\"\n"
                                         << "print-ready = true\n";
  Program program({"--config", dir_.path() + "/config"}, "KVSEEK_SIMD=scalar");
  ASSERT_EQ(program.ReadLine(), "ready " + address());
  EXPECT_EQ(KvClient::Connect({.address = address(), .token = "wrong"}).status().code(),
            absl::StatusCode::kUnauthenticated);
  const auto client = Connect("open sesame");
  ASSERT_NE(client, nullptr);
  EXPECT_EQ(client->info().simd_level, "scalar");
  const auto session = client->Open(kShape, {});
  ASSERT_TRUE(session.ok()) << session.status();
  const auto stats = client->Stats(true);
  ASSERT_TRUE(stats.ok()) << stats.status();
  EXPECT_EQ(stats->workers, 2U);
  EXPECT_EQ(stats->queue_limit, 77U);
  ASSERT_EQ(stats->sessions.size(), 1U);
  EXPECT_EQ(stats->sessions[0].lease, milliseconds(3000));
}

}  // namespace
}  // namespace kvseek::service
