// The commands that talk to a daemon, each against kvseekd as a process of its own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "cli/daemon_process.h"
#include "cli/daemon_search.h"
#include "cli/library_search.h"
#include "client/kv_client.h"
#include "tests/cli/run_program.h"

namespace kvseek::cli {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

constexpr char kDaemon[] = KVSEEK_BIN_DIR "/kvseekd";
constexpr char kData[] = KVSEEK_SOURCE_DIR "/tests/data/";

/// What `kvseek eval` answers, but for how long it took.
json WithoutTime(json answer) {
  for (json& result : answer.at("results")) result.erase("micros");
  return answer;
}

class ServedTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto daemon = DaemonProcess::Start(kDaemon, {"--memory", "256MiB", "--log-level", "warn"});
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
  }
  void TearDown() override {
    if (daemon_ == nullptr) return;
    const absl::Status status = daemon_->Stop();
    EXPECT_TRUE(status.ok()) << status;
  }
  json Ask(const std::string& arguments) const {
    const Ran ran = RunKvseek(absl::StrCat(arguments, " --format json --via ", daemon_->address()));
    EXPECT_EQ(ran.exit_code, 0) << ran.err;
    return json::parse(ran.out, nullptr, /*allow_exceptions=*/false);
  }

  std::unique_ptr<DaemonProcess> daemon_;
};

TEST_F(ServedTest, ServedEqualsComputed) {
  const std::string arguments =
      absl::StrCat("eval --kv '", kData, "code8.layer20.kv0.safetensors' --queries '", kData,
                   "code8.queries.safetensors' --index exact,ladder --scan sign1,sign2 "
                   "--candidates 512 --exact 32"
                   " --audit 16 --seed 3 --steps 12");
  const json served = Ask(arguments);
  const Ran here = RunKvseek(arguments + " --format json");
  ASSERT_EQ(here.exit_code, 0) << here.err;
  EXPECT_EQ(WithoutTime(served), WithoutTime(json::parse(here.out)));
  EXPECT_EQ(Ask("stats").at("sessions_open"), 0);  // eval closed its sessions
}

TEST_F(ServedTest, ReuseServedEqualsReuseComputed) {
  for (const std::string name : {"layer15.kv1", "layer20.kv0"}) {
    const auto trace = LoadHeadTrace(absl::StrCat(kData, "code8.", name, ".safetensors"),
                                     absl::StrCat(kData, "code8.queries.safetensors"), name);
    ASSERT_TRUE(trace.ok()) << trace.status();
    auto client = KvClient::Connect({.address = daemon_->address(), .token = {}});
    ASSERT_TRUE(client.ok()) << client.status();
    auto head = DaemonHead::Open(**client, *trace, 2);
    ASSERT_TRUE(head.ok()) << head.status();
    const StoredHead stored(*trace, 2);
    PieceRunner runner(1);
    const index::ReuseOptions reuse{.keep = 1500, .every = 3};
    const auto computed = SearchReusing(*trace, stored, index::LadderIndex(), reuse, runner);
    const auto served = (*head)->Search(IndexKind::kLadder, reuse.every, reuse.keep);
    int reused = 0;
    int searched = 0;
    for (const bool list_read : {false, true}) {
      const index::SearchOptions options{
          .candidates = 512, .exact_rows = 32, .list_read = list_read};
      for (int step = 0; step < trace->steps; ++step) {
        const auto here = computed(step, options);
        const auto there = served(step, options);
        ASSERT_TRUE(there.ok()) << there.status();
        ASSERT_EQ(there->report.reused, here->report.reused) << name << " step " << step;
        EXPECT_EQ(there->out, here->out);
        EXPECT_EQ(there->lse, here->lse);
        EXPECT_EQ(there->positions, here->positions);
        EXPECT_EQ(there->report.missed_mass, here->report.missed_mass);
        EXPECT_EQ(there->report.keys_fine, here->report.keys_fine);
        EXPECT_EQ(there->report.bytes_touched, here->report.bytes_touched);
        ++(here->report.reused ? reused : searched);
      }
    }
    EXPECT_GT(reused, searched / 4) << name;
    EXPECT_GE(searched, 2 * ((trace->steps + 2) / 3)) << name;
  }
  const json counters = Ask("stats").at("counters");
  EXPECT_GT(counters.at("searches_reused").get<int>(), 0);
}

TEST_F(ServedTest, VoteAndReuseAreAskedOfTheDaemon) {
  const std::string arguments = absl::StrCat(
      "eval --kv '", kData, "code8.layer15.kv1.safetensors' --queries '", kData,
      "code8.queries.safetensors' --index ladder --candidates 512 --exact 32 --vote max --reuse 2"
      " --reuse-keys 2000 --audit 0 --steps 12");
  const Ran here = RunKvseek(arguments + " --format json");
  ASSERT_EQ(here.exit_code, 0) << here.err;
  EXPECT_EQ(WithoutTime(Ask(arguments)), WithoutTime(json::parse(here.out)));
  const Ran refused = RunKvseek(arguments + " --reuse-samples 7 --via " + daemon_->address());
  EXPECT_EQ(refused.exit_code, 2);
  EXPECT_THAT(refused.err, HasSubstr("--reuse-samples"));
}

TEST_F(ServedTest, AThresholdIsAskedOfTheDaemon) {
  const std::string arguments = absl::StrCat(
      "eval --kv '", kData, "code8.layer15.kv1.safetensors' --queries '", kData,
      "code8.queries.safetensors' --index exact,ladder --scan sign1,sign2 --candidates 2048 "
      "--audit 0 --steps 12 --threshold ");
  const Ran here = RunKvseek(arguments + "-7.5 --format json");
  ASSERT_EQ(here.exit_code, 0) << here.err;
  const json computed = WithoutTime(json::parse(here.out));
  EXPECT_EQ(WithoutTime(Ask(arguments + "-7.5")), computed);
  const json& keys_read = computed.at("results")[1].at("keys_read");
  EXPECT_LT(keys_read.at("max").get<double>(), 2048.0 + 512.0);
  EXPECT_LT(1.5 * keys_read.at("min").get<double>(), keys_read.at("max").get<double>());
  const Ran refused = RunKvseek(arguments + "calibrated:100 --via " + daemon_->address());
  EXPECT_EQ(refused.exit_code, 2);
  EXPECT_THAT(refused.err, HasSubstr("calibrated"));
}

TEST_F(ServedTest, PingTimesRoundTrips) {
  const json answer = Ask("ping --count 20");
  EXPECT_EQ(answer.at("count"), 20);
  EXPECT_GT(answer.at("health_micros").at("p50").get<double>(), 0.0);
  EXPECT_LE(answer.at("health_micros").at("p50").get<double>(),
            answer.at("health_micros").at("p99").get<double>());
  EXPECT_THAT(answer.at("server").get<std::string>(), HasSubstr("kvseekd"));
  EXPECT_THAT(RunKvseek("ping --count 3 --via " + daemon_->address()).out,
              HasSubstr("3 health round trips"));
}

TEST_F(ServedTest, ListsStatsAndSessions) {
  auto client = KvClient::Connect({.address = daemon_->address(), .token = {}});
  ASSERT_TRUE(client.ok()) << client.status();
  ModelShape shape;
  shape.layers = 3;
  const auto session = (*client)->Open(shape, {.name = "listed"});
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_EQ(Ask("stats").at("sessions_open"), 1);
  EXPECT_EQ(Ask("stats").at("memory_limit_bytes"), 256 << 20);
  const json list = Ask("sessions").at("sessions");
  ASSERT_EQ(list.size(), 1U);
  EXPECT_EQ(list[0].at("name"), "listed");
  EXPECT_EQ(list[0].at("shape").at("layers"), 3);
  EXPECT_THAT(RunKvseek("sessions --via " + daemon_->address()).out, HasSubstr("listed"));
  EXPECT_THAT(RunKvseek("stats --via " + daemon_->address()).out, HasSubstr("memory limit"));
}

TEST_F(ServedTest, PrintsASessionsPlan) {
  auto client = KvClient::Connect({.address = daemon_->address(), .token = {}});
  ASSERT_TRUE(client.ok()) << client.status();
  ModelShape shape;
  shape.layers = 3;
  HeadPlan plan{.scan_bits = 1, .error_target = 0.25};
  plan.heads.push_back({.layer = 2, .mode = HeadMode::kRows, .index = "ladder", .k = 9});
  const auto session = (*client)->Open(shape, {.plan = plan});
  ASSERT_TRUE(session.ok()) << session.status();
  const json list = Ask("sessions").at("sessions");
  const Ran ran = RunKvseek(absl::StrCat("sessions --via ", daemon_->address(), " --plan ",
                                         list[0].at("session_id").get<std::string>()));
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  const auto printed = ParseHeadPlan(ran.out);
  ASSERT_TRUE(printed.ok()) << printed.status();
  EXPECT_EQ(*printed, plan);
  EXPECT_EQ(RunKvseek("sessions --plan 99 --via " + daemon_->address()).exit_code, 1);
  EXPECT_EQ(RunKvseek("sessions --plan x --via " + daemon_->address()).exit_code, 1);
}

TEST_F(ServedTest, BenchMeasuresADaemonElsewhere) {
  const json answer =
      Ask("bench --layers 1 --sessions 2 --tokens 3000 --rate 80 --duration 0.5 --warmup 0.1"
          " --op topk --k 32 --candidates 256 --deadline-ms 10000 --spin-us 100");
  EXPECT_GT(answer.at("answered").get<int>(), 10);
  EXPECT_GE(answer.at("daemon_micros_p50").get<double>(), 1.0);
  EXPECT_GT(answer.at("beside_daemon_micros_p50").get<double>(), 0.0);
  EXPECT_TRUE(answer.at("errors").empty());
  EXPECT_GT(answer.at("memory_roof_bytes_per_second").get<double>(), 1e8)
      << "it is on this machine";
  EXPECT_EQ(Ask("stats").at("sessions_open"), 0);
  const Ran too_large = RunKvseek("bench --sessions 64 --via " + daemon_->address());
  EXPECT_EQ(too_large.exit_code, 1);
  EXPECT_THAT(too_large.err, HasSubstr("the daemon has"));
}

TEST_F(ServedTest, BenchDoesNotWaitForIndexesThatNobodyBuilds) {
  const Ran ran =
      RunKvseek("bench --layers 1 --tokens 3000 --duration 0.1 --warmup 0 --build product --via " +
                daemon_->address());
  EXPECT_EQ(ran.exit_code, 1);
  EXPECT_THAT(ran.err, HasSubstr("does not build all indexes of 3000 tokens"));
}

TEST_F(ServedTest, BenchAsksForManySessionsInOneRequest) {
  const std::string common =
      "bench --layers 1 --sessions 3 --tokens 2048 --rate 0 --duration 0.3 --warmup 0.1"
      " --candidates 256 --deadline-ms 10000";
  const json alone = Ask(common);
  EXPECT_EQ(alone.at("settings").at("connections"), 1);
  EXPECT_EQ(alone.at("request").at("sessions"), 1.0);
  const json together = Ask(common + " --batch");
  EXPECT_TRUE(together.at("errors").empty());
  const json& request = together.at("request");
  EXPECT_EQ(request.at("sessions"), 3.0);
  EXPECT_NEAR(request.at("micros_per_session_p50").get<double>(),
              together.at("micros").at("p50").get<double>() / 3.0, 1e-6);
  const double bytes = request.at("bytes_touched").get<double>();
  EXPECT_NEAR(bytes / alone.at("request").at("bytes_touched").get<double>(), 3.0, 0.1);
  EXPECT_GT(request.at("daemon_bytes_per_second").get<double>(),
            bytes / 1e-6 / together.at("micros").at("p999").get<double>());
  EXPECT_NEAR(request.at("of_roof").get<double>(),
              request.at("daemon_bytes_per_second").get<double>() /
                  together.at("memory_roof_bytes_per_second").get<double>(),
              1e-9);
  // Connections ask at the same time, each for its own sessions: two of them, and the third.
  const json apart = Ask(common + " --batch --connections 2 --spin-us 50");
  EXPECT_TRUE(apart.at("errors").empty());
  EXPECT_GT(apart.at("request").at("sessions").get<double>(), 1.0);
  EXPECT_LT(apart.at("request").at("sessions").get<double>(), 2.0);
}

TEST(BenchTest, MeasuresADaemonOfItsOwn) {
  const Ran ran = RunKvseek(
      "bench --layers 2 --sessions 1 --tokens 2048 --rate 60 --duration 0.5 --warmup 0.1"
      " --candidates 256 --deadline-ms 10000 --format json");
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  const json answer = json::parse(ran.out);
  EXPECT_TRUE(answer.at("errors").empty());
  EXPECT_GT(answer.at("achieved_per_second").get<double>(), 20.0);
  // Two KV heads of 2048 tokens are scanned for every answer.
  EXPECT_NEAR(answer.at("keys_scanned_per_second").get<double>() /
                  answer.at("achieved_per_second").get<double>(),
              2.0 * 2048.0, 1e-6);
  EXPECT_GT(answer.at("memory_roof_bytes_per_second").get<double>(), 1e8);
  EXPECT_GE(answer.at("micros").at("p999").get<double>(),
            answer.at("micros").at("p50").get<double>());
}

TEST(DaemonProcessTest, SaysWhyItDoesNotStart) {
  const auto missing = DaemonProcess::Start("/nonexistent/kvseekd", {});
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr("/nonexistent/kvseekd"));
  const auto wrong_flag = DaemonProcess::Start(kDaemon, {"--no-such-flag"});
  EXPECT_THAT(std::string(wrong_flag.status().message()), HasSubstr("exit code 2"));
  EXPECT_THAT(std::string(wrong_flag.status().message()), HasSubstr("--no-such-flag"));
}

TEST(DemoTest, RunsEndToEnd) {
  const TempDir dir;
  const std::string arguments = absl::StrCat("demo --daemon '", kDaemon, "' --data '", kData,
                                             "' --steps 8 --plot ", dir.File("demo.svg"));
  const Ran ran = RunKvseek(arguments + " --format json");
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  const json answer = json::parse(ran.out);
  ASSERT_EQ(answer.at("rows").size(), 4U);
  const auto error = [&](size_t row) {
    return answer["rows"][row]["output_error"]["mean"].get<double>();
  };
  EXPECT_LT(error(0), 1e-6);  // full attention
  EXPECT_LT(error(1), 1e-4);  // exact
  EXPECT_LT(error(2), 0.06);  // ladder
  EXPECT_LT(error(3), 0.06);  // TopK with rows
  EXPECT_EQ(answer["rows"][1]["keys_exact"], 2 * 7680);
  EXPECT_GT(answer["rows"][3]["bytes_wire"], 2 * 256 * 512);
  const json& ladder = answer.at("ladder");
  ASSERT_EQ(ladder.size(), 6U);
  EXPECT_LT(ladder[5]["error_mean"], ladder[0]["error_mean"]);
  EXPECT_GT(ladder[5]["bytes_read"], ladder[0]["bytes_read"]);
  const std::string svg = ReadFile(dir.File("demo.svg"));
  EXPECT_EQ(svg.rfind("<svg", 0), 0U);
  EXPECT_THAT(svg, HasSubstr("</svg>"));
  const Ran text = RunKvseek(arguments);
  ASSERT_EQ(text.exit_code, 0) << text.err;
  EXPECT_THAT(text.out, HasSubstr("TopK 256 with rows"));
  EXPECT_THAT(text.err, HasSubstr("exit code 0"));
}

TEST(DemoTest, SaysWhyTheDaemonDoesNotStart) {
  const Ran ran = RunKvseek(absl::StrCat("demo --daemon /bin/false --data '", kData, "'"));
  EXPECT_EQ(ran.exit_code, 1);
  EXPECT_THAT(ran.err, HasSubstr("did not start"));
}

}  // namespace
}  // namespace kvseek::cli
