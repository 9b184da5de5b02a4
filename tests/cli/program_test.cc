// kvseek as a process: exit codes, help, and what eval prints.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/cli/run_program.h"

namespace kvseek::cli {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

std::string Data(const std::string& name) { return KVSEEK_SOURCE_DIR "/tests/data/" + name; }
std::string Kv(const std::string& head) {
  return absl::StrCat(" --kv '", Data("code8."), head, ".safetensors'");
}
std::string Head15() { return Kv("layer15.kv1"); }
std::string Head20() { return Kv("layer20.kv0"); }
std::string Queries() {
  return absl::StrCat(" --queries '", Data("code8.queries.safetensors"), "'");
}

void ExpectUsageError(const std::string& arguments, const std::string& named) {
  const Ran ran = RunKvseek(arguments);
  EXPECT_EQ(ran.exit_code, 2) << arguments;
  EXPECT_THAT(ran.err, HasSubstr(named)) << arguments;
  EXPECT_EQ(ran.out, "") << arguments;
}

void ExpectFailure(const std::string& arguments, const std::string& named) {
  const Ran ran = RunKvseek(arguments);
  EXPECT_EQ(ran.exit_code, 1) << arguments;
  EXPECT_THAT(ran.err, HasSubstr(named)) << arguments;
  EXPECT_EQ(ran.out, "") << arguments;
}

TEST(ProgramTest, HelpTeaches) {
  const Ran help = RunKvseek("--help");
  EXPECT_EQ(help.exit_code, 0);
  for (const char* command : {"demo", "eval", "plan", "bench", "ping", "stats", "sessions"}) {
    EXPECT_THAT(help.out, HasSubstr(command));
    const Ran of_command = RunKvseek(absl::StrCat(command, " --help"));
    EXPECT_EQ(of_command.exit_code, 0) << command;
    EXPECT_THAT(of_command.out, HasSubstr("Example"));
    EXPECT_THAT(of_command.out, HasSubstr("--format"));
  }
  EXPECT_THAT(RunKvseek("eval --help").out, HasSubstr("fp32 is\nrounded to bf16"));
}

TEST(ProgramTest, TellsItsVersion) {
  const Ran ran = RunKvseek("--version");
  EXPECT_EQ(ran.exit_code, 0);
  EXPECT_THAT(ran.out, ::testing::StartsWith("kvseek "));
}

TEST(ProgramTest, WrongFlagsAreUsageErrors) {
  ExpectUsageError("", "which command");
  ExpectUsageError("fly", "fly");
  ExpectUsageError("eval", "--kv");
  ExpectUsageError("eval" + Head15(), "--queries");
  ExpectUsageError("eval" + Head15() + Queries() + " --index magic", "magic");
  ExpectUsageError("eval" + Head15() + Queries() + " --scan sign3", "--scan");
  ExpectUsageError("eval" + Head15() + Queries() + " --sketch 4", "--sketch");
  ExpectUsageError("eval" + Head15() + Queries() + " --scan pq22 --via unix:/none", "--via");
  ExpectUsageError("eval" + Head15() + Queries() + " --candidates 0", "--candidates");
  ExpectUsageError("eval" + Head15() + Queries() + " --candidates x", "--candidates");
  ExpectUsageError("eval" + Head15() + Queries() + " --index oracle --exact 0", "--exact");
  ExpectUsageError("eval" + Head15() + Queries() + " --index ladder --exact 64,128", "--exact");
  ExpectUsageError("eval" + Head15() + Head20() + Queries() + " --head layer15.kv1", "--head");
  ExpectUsageError("eval" + Head15() + Queries() + " --format xml", "xml");
  ExpectUsageError("eval" + Head15() + Queries() + " --block 17", "--block");
  ExpectUsageError("eval" + Head15() + Queries() + " --summary mode", "--summary");
  ExpectUsageError("eval" + Head15() + Queries() + " --keys-per-cluster 3", "--keys-per-cluster");
  ExpectUsageError("eval" + Head15() + Queries() + " --summary mean --exact-top 5", "--exact-top");
  ExpectUsageError(
      "eval" + Head15() + Queries() + " --index cluster --keys-per-cluster 20 --via unix:x",
      "--via");
  ExpectUsageError("eval" + Head15() + Queries() + " --index graph --degree 20 --via unix:x",
                   "--via");
  ExpectUsageError("ping", "--via");
  ExpectUsageError("bench --kv-heads 3 --query-heads 8", "--query-heads");
  ExpectUsageError("bench --rate -1", "--rate");
  ExpectUsageError("bench --rate 0 --sessions 2 --connections 3", "--connections");
  ExpectUsageError("bench --batch --sessions 2 --connections 3", "--connections");
}

TEST(ProgramTest, BadInputIsAFailureThatNamesIt) {
  ExpectFailure("eval --kv none.safetensors --head layer15.kv1" + Queries(), "none.safetensors");
  ExpectFailure("eval" + Head15() + Queries() + " --head layer9.kv0", "layer9.kv0.q_decode");
  const TempDir dir;
  const std::string no_name = dir.Write("kv", "12345678{}");
  ExpectFailure("eval --kv " + no_name + Queries(), "--head");
  ExpectFailure("eval --head layer15.kv1 --kv " + no_name + Queries(), "header length");
  const std::string no_values =
      dir.Write("k", SafeTensorsFile({MakeTensor("k", "BF16", {2, 8}, RandomValues(16, 1))}));
  ExpectFailure("eval --head layer15.kv1 --kv " + no_values + Queries(), "tensor \"v\"");
  ExpectFailure("ping --via unix:" + dir.File("nobody"), dir.File("nobody"));
  ExpectFailure("ping --via carrier-pigeon", "carrier-pigeon");
}

TEST(ProgramTest, RefusesABenchThatDoesNotFit) {
  const Ran ran = RunKvseek("bench --sessions 65536 --tokens 1048576");
  EXPECT_EQ(ran.exit_code, 1);
  EXPECT_THAT(ran.err, HasSubstr("fewer --sessions"));
}

// At a rate there are more connections than sessions, which one after the other there cannot be.
TEST(ProgramTest, BenchTellsPhasesAndComparesWithExact) {
  for (const char* rate : {"20", "0"}) {
    const Ran ran = RunKvseek(
        absl::StrCat("bench --layers 1 --tokens 16384 --duration 1 --deadline-ms 60000 --rate ",
                     rate, " --exact-duration 0.2 --format json"));
    ASSERT_EQ(ran.exit_code, 0) << ran.err;
    const json result = json::parse(ran.out);
    EXPECT_GT(result.at("answered"), 0);
    EXPECT_EQ(result.at("errors"), json::object());
    const double daemon = result.at("daemon_micros_p50");
    const double exact = result.at("exact_daemon_micros_p50");
    EXPECT_DOUBLE_EQ(result.at("of_exact").get<double>(), daemon / exact);
    double workers = 0.0;
    for (const char* phase : {"plan", "sample", "scan", "refine", "finish"}) {
      const double micros = result.at("worker_micros_a_request").at(phase);
      EXPECT_GT(micros, 0.0) << phase;
      workers += micros;
    }
    // Of all workers together, so a request's own time bounds it from below, but for what is
    // neither a plan nor a step.
    EXPECT_GT(workers, 0.2 * daemon);
  }
  const Ran without =
      RunKvseek("bench --layers 1 --tokens 16384 --duration 0.2 --exact-duration 0 --format json");
  ASSERT_EQ(without.exit_code, 0) << without.err;
  EXPECT_TRUE(json::parse(without.out).at("of_exact").is_null());
}

TEST(ProgramTest, EvalPrintsItsSchema) {
  const Ran ran = RunKvseek("eval" + Head15() + Head20() + Queries() +
                            " --index exact,ladder,oracle --scan sign1,pq11 --candidates 256,1024"
                            " --exact 64,1024 --steps 6 --audit 16 --seed 7 --format json");
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  const json results = json::parse(ran.out).at("results");
  ASSERT_EQ(results.size(), 2U * (1 + 4 + 2));
  for (const json& result : results) {
    const std::string index = result.at("index");
    EXPECT_TRUE(result.at("head") == "layer15.kv1" || result.at("head") == "layer20.kv0");
    EXPECT_EQ(result.at("settings").at("steps"), 6);
    const json& error = result.at("output_error");
    EXPECT_LE(error.at("mean").get<double>(), error.at("max").get<double>());
    EXPECT_LE(error.at("p90").get<double>(), error.at("max").get<double>());
    EXPECT_GE(error.at("mean").get<double>(), 0.0);
    EXPECT_GT(result.at("recall_at_100").get<double>(), 0.0);
    EXPECT_LE(result.at("recall_at_100").get<double>(), 1.0);
    EXPECT_GT(result.at("keys_scanned").get<double>(), 0.0);
    EXPECT_GT(result.at("bytes_read").get<double>(), 0.0);
    const json& missed = result.at("missed_mass");
    EXPECT_GE(missed.at("true").get<double>(), 0.0);
    EXPECT_EQ(missed.at("estimated").is_null(), index == "oracle");
    EXPECT_EQ(missed.at("interval_cover").is_null(), index == "oracle");
    EXPECT_EQ(missed.at("interval_width").is_null(), index != "ladder");
    EXPECT_EQ(result.at("micros").at("p50").is_null(), index == "oracle");
    EXPECT_EQ(result.at("micros").at("p99").is_null(), index == "oracle");
  }
  const json& ladder = results.at(1);
  EXPECT_EQ(ladder.at("settings").at("scan"), "sign1");
  EXPECT_EQ(results.at(3).at("settings").at("scan"), "pq11");
  EXPECT_EQ(results.at(3).at("settings").at("sketch"), 8);
  EXPECT_GT(results.at(3).at("build_core_seconds"), 0.0);
  EXPECT_EQ(ladder.at("settings").at("candidates"), 256);
  EXPECT_EQ(ladder.at("settings").at("exact"), 64);
  EXPECT_EQ(ladder.at("settings").at("seed"), 7);
  EXPECT_EQ(results.at(6).at("settings").at("exact"), 1024);
}

TEST(ProgramTest, EvalBuildsLandmarkAndCluster) {
  const Ran ran = RunKvseek("eval" + Head20() + Queries() +
                            " --index landmark,cluster --block 32 --summary minmax"
                            " --keys-per-cluster 20 --candidates 256,512 --exact-top 3"
                            " --no-estimate --steps 3 --audit 16 --seed 5 --format json");
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  const json results = json::parse(ran.out).at("results");
  ASSERT_EQ(results.size(), 4U);
  EXPECT_EQ(results[1].at("settings"), json({{"block", 32},
                                             {"summary", "minmax"},
                                             {"exact_top", 3},
                                             {"candidates", 512},
                                             {"estimate", false},
                                             {"stop_after_us", 0},
                                             {"audit", 16},
                                             {"seed", 5},
                                             {"steps", 3},
                                             {"threads", 1}}));
  EXPECT_EQ(results[2].at("settings").at("keys_per_cluster"), 20);
  EXPECT_FALSE(results[2].at("settings").contains("exact_top"));
  for (const json& result : results) {
    EXPECT_GT(result.at("build_core_seconds").get<double>(), 0.0);
    EXPECT_GT(result.at("index_bytes").get<double>(), 0.0);
    EXPECT_FALSE(result.at("missed_mass").at("interval_cover").is_null());
  }
  const Ran table = RunKvseek("eval" + Head20() + Queries() +
                              " --index landmark,cluster --candidates 256 --steps 2");
  ASSERT_EQ(table.exit_code, 0) << table.err;
  EXPECT_THAT(table.out, HasSubstr("minmax 16, 256"));
  const Ran given = RunKvseek("eval" + Head20() + Queries() + " --index landmark --summary given" +
                              " --block 64 --candidates 256 --steps 2");
  ASSERT_EQ(given.exit_code, 0) << given.err;
  EXPECT_THAT(given.out, HasSubstr("given 64, 256"));
  EXPECT_THAT(table.out, HasSubstr("1/16, 256"));
}

/// Every element of `xml` is closed where it should be, and no text has a bare ampersand.
void ExpectWellFormed(const std::string& xml) {
  std::vector<std::string> open;
  for (size_t at = xml.find('<'); at != std::string::npos; at = xml.find('<', at)) {
    const size_t end = xml.find('>', at);
    ASSERT_NE(end, std::string::npos);
    const std::string tag = xml.substr(at + 1, end - at - 1);
    ASSERT_EQ(std::count(tag.begin(), tag.end(), '"') % 2, 0) << tag;
    const std::string name = tag.substr(0, tag.find_first_of(" /", 1));
    if (tag.front() == '/') {
      ASSERT_FALSE(open.empty()) << tag;
      EXPECT_EQ(name, "/" + open.back());
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(name);
    }
    at = end;
  }
  EXPECT_TRUE(open.empty()) << open.back();
  for (size_t at = xml.find('&'); at != std::string::npos; at = xml.find('&', at + 1)) {
    EXPECT_LT(xml.find(';', at), at + 6);
  }
}

TEST(ProgramTest, EvalPlotsEveryCurve) {
  const TempDir dir;
  const std::string picture = dir.File("plot.svg");
  const Ran ran = RunKvseek("eval" + Head20() + Queries() +
                            " --index exact,ladder,landmark,cluster,graph,oracle --scan sign1,sign2"
                            " --summary minmax,mean --candidates 256,1024 --exact 64,512"
                            " --steps 2 --format json --plot '" +
                            picture + "'");
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  const json results = json::parse(ran.out).at("results");
  ASSERT_EQ(results.size(), 1U + 2 * 2 + 2 * 2 + 2 + 2 + 2);
  EXPECT_EQ(results[5].at("settings").at("summary"), "minmax");
  EXPECT_EQ(results[7].at("settings").at("summary"), "mean");
  const std::string svg = ReadFile(picture);
  EXPECT_THAT(svg, ::testing::StartsWith("<svg"));
  ExpectWellFormed(svg);
  for (const char* curve :
       {"exact", "ladder, sign1", "ladder, sign2", "landmark minmax 16", "landmark mean 16",
        "cluster 1/16", "graph degree 32", "perfect top k, rest forgotten"}) {
    EXPECT_THAT(svg, HasSubstr(absl::StrCat(">", curve, "</text>")));
  }
  for (const char* panel : {"error against bytes", "error against time", "recall against bytes",
                            "recall against time"}) {
    EXPECT_THAT(svg, HasSubstr(absl::StrCat(">layer20.kv0: ", panel, "</text>")));
  }
  // Seven curves of two points and exact's one, twice against bytes; the oracle has no time.
  size_t circles = 0;
  for (size_t at = svg.find("<circle"); at != std::string::npos; at = svg.find("<circle", at + 1)) {
    ++circles;
  }
  EXPECT_EQ(circles, 2U * 15 + 2U * 13 + 8);
}

TEST(ProgramTest, EvalPrintsWhatItCannotPlot) {
  const TempDir dir;
  const Ran ran = RunKvseek("eval" + Head20() + Queries() + " --index ladder --steps 1 --plot '" +
                            dir.File("none/plot.svg") + "'");
  EXPECT_EQ(ran.exit_code, 1);
  EXPECT_THAT(ran.err, HasSubstr("none/plot.svg"));
  EXPECT_THAT(ran.out, HasSubstr("layer20.kv0"));
}

TEST(ProgramTest, EvalNeedsASegmentToBuildFrom) {
  const TempDir dir;
  const std::string kv = dir.Write(
      "h.safetensors", SafeTensorsFile({MakeTensor("k", "BF16", {90, 8}, RandomValues(720, 1)),
                                        MakeTensor("v", "BF16", {90, 8}, RandomValues(720, 2))}));
  const std::string q = dir.Write(
      "q", SafeTensorsFile({MakeTensor("h.q_decode", "F32", {2, 3, 8}, RandomValues(48, 3))}));
  ExpectFailure("eval --kv " + kv + " --queries " + q + " --index cluster", "full segment");
}

TEST(ProgramTest, EvalWithoutAuditHasNoInterval) {
  const Ran ran = RunKvseek("eval" + Head20() + Queries() +
                            " --index ladder --steps 2 --audit 0 --format json");
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  const json missed = json::parse(ran.out).at("results").at(0).at("missed_mass");
  EXPECT_TRUE(missed.at("interval_cover").is_null());
  EXPECT_TRUE(missed.at("interval_width").is_null());
}

TEST(ProgramTest, EvalPrintsATable) {
  const Ran ran =
      RunKvseek("eval" + Head20() + Queries() + " --index exact,oracle --exact 512 --steps 2");
  ASSERT_EQ(ran.exit_code, 0) << ran.err;
  EXPECT_THAT(ran.out, HasSubstr("recall@100"));
  EXPECT_THAT(ran.out, HasSubstr("top 512"));
}

TEST(ProgramTest, EvalSaysThatItRounded) {
  const TempDir dir;
  const std::string kv = dir.Write(
      "h.safetensors", SafeTensorsFile({MakeTensor("k", "F32", {90, 8}, RandomValues(720, 1)),
                                        MakeTensor("v", "F32", {90, 8}, RandomValues(720, 2))}));
  const std::string q = dir.Write(
      "q", SafeTensorsFile({MakeTensor("h.q_decode", "F32", {2, 3, 8}, RandomValues(48, 3))}));
  const Ran ran = RunKvseek("eval --kv " + kv + " --queries " + q + " --index exact,ladder");
  EXPECT_EQ(ran.exit_code, 0) << ran.err;
  EXPECT_THAT(ran.err, HasSubstr("rounded to bf16"));
}

}  // namespace
}  // namespace kvseek::cli
