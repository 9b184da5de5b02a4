// Floors of the indexes' quality on recorded attention heads.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>

#include "cli/build_index.h"
#include "cli/evaluation.h"
#include "cli/library_search.h"
#include "index/threshold_calibration.h"

namespace kvseek::cli {
namespace {

constexpr int kSteps = 64;
constexpr int kShort = 1024;  ///< candidates at 8K tokens
constexpr int kLong = 4096;   ///< candidates at 32K tokens

/// A trace with its reference.
struct Subject {
  HeadTrace trace;
  Reference reference;

  Subject(const std::string& directory, const std::string& text, const std::string& head,
          int64_t k) {
    auto loaded = LoadHeadTrace(directory + "/" + text + "." + head + ".safetensors",
                                directory + "/" + text + ".queries.safetensors", head);
    if (!loaded.ok()) ADD_FAILURE() << loaded.status();
    if (!loaded.ok()) return;
    trace = *std::move(loaded);
    reference = ComputeReference(trace, SpreadSteps(trace.steps, kSteps), {.oracle_ks = {k}});
  }

  Evaluation Ask(const index::KeyIndex& index, int scan_bits, int64_t candidates, int audit) const {
    index::SearchOptions options;
    options.candidates = static_cast<int>(candidates);
    options.exact_rows = 64;
    options.audit_samples = audit;
    return Ask(index, StoredHead(trace, scan_bits), options);
  }

  Evaluation Ask(const index::KeyIndex& index, const StoredHead& head,
                 const index::SearchOptions& options) const {
    PieceRunner runner(1);
    const auto figures =
        EvaluateSearch(trace, reference, SearchLibrary(trace, head, index, runner), options);
    EXPECT_TRUE(figures.ok()) << figures.status();
    return figures.value_or(Evaluation{});
  }

  /// An index that is built, trained on prefill queries.
  Evaluation AskBuilt(const std::string& name, const BuildSettings& settings,
                      const index::SearchOptions& options) const {
    const StoredHead head(trace, 2);
    return Ask(*BuildIndex(name, trace, head.view(), settings), head, options);
  }
};

/// Largest mean output errors that are let pass: as measured and a tenth more.
struct PartsFloors {
  std::string head;
  int candidates;  ///< keys read of a group
  double min_max;
  double mean;
  double cluster;
  double cluster_recall;
};

/// On every head: the estimate helps, clusters beat min/max, and floors hold.
void ExpectPartsFloors(const Subject& subject, const PartsFloors& floors) {
  index::SearchOptions options;
  options.candidates = floors.candidates;
  const Evaluation min_max = subject.AskBuilt("landmark", {}, options);
  const Evaluation mean = subject.AskBuilt("landmark", {.summary = "mean"}, options);
  const Evaluation cluster = subject.AskBuilt("cluster", {}, options);
  EXPECT_LE(min_max.error_mean, floors.min_max);
  EXPECT_LE(mean.error_mean, floors.mean);
  EXPECT_LE(cluster.error_mean, floors.cluster);
  EXPECT_GE(cluster.recall_at_100, floors.cluster_recall);
  EXPECT_LE(cluster.error_mean, 0.6 * min_max.error_mean);
  EXPECT_NEAR(*cluster.missed_estimated, cluster.missed_true, 0.5 * cluster.missed_true);
  options.estimate_rest = false;
  EXPECT_LT(cluster.error_mean, subject.AskBuilt("cluster", {}, options).error_mean);
}

/// Largest mean output errors of product codes that are let pass: as measured and a tenth more.
struct ProductFloors {
  std::string head;
  int candidates;
  double subspaces11;
  double without_sketch;
  double subspaces22;
};

/// On every head: floors hold, the sketch helps, and what is missed is told.
void ExpectProductFloors(const Subject& subject, const ProductFloors& floors) {
  const index::SearchOptions options{.candidates = floors.candidates, .audit_samples = 64};
  const auto ask = [&](int subspaces, bool sketch) {
    return subject.AskBuilt("product", {.product = {subspaces, sketch}}, options);
  };
  const Evaluation small = ask(11, true);
  const Evaluation plain = ask(11, false);
  EXPECT_LE(small.error_mean, floors.subspaces11);
  EXPECT_LE(plain.error_mean, floors.without_sketch);
  EXPECT_LE(ask(22, true).error_mean, floors.subspaces22);
  EXPECT_LT(small.error_mean, plain.error_mean);
  EXPECT_NEAR(*small.missed_estimated, small.missed_true, 0.15 * small.missed_true);
  EXPECT_GE(*small.interval_cover, 0.85);
}

/// A threshold calibrated on prefill queries: about so many keys pass in decode steps too, and the
/// ladder's error is as measured, at most a tenth more, and no more than that of a fixed budget of
/// as many keys.
void ExpectThresholdFloor(const Subject& subject, int wanted, double error_max) {
  const HeadTrace& trace = subject.trace;
  const StoredHead head(trace, 2);
  index::BuildInput input;
  input.view = head.view();
  input.group = trace.group;
  input.queries = trace.prefill_queries;
  input.query_positions = trace.prefill_positions;
  index::SearchOptions options;
  options.candidates = 8 * wanted;
  index::Scratch scratch;
  const index::CalibratedThreshold found =
      index::CalibrateThreshold(index::LadderIndex(), input, options, wanted, scratch);
  EXPECT_NEAR(found.keys, wanted, 0.01 * wanted);
  options.threshold = found.threshold;
  const Evaluation calibrated = subject.Ask(index::LadderIndex(), head, options);
  const auto tail = static_cast<double>(trace.tokens - head.view().SealedTokens());
  const double mean = calibrated.keys_read_mean - tail;
  EXPECT_GE(mean, 0.6 * wanted);
  EXPECT_LE(mean, 2.0 * wanted);
  EXPECT_LT(calibrated.keys_read_min - tail, 0.7 * mean);
  EXPECT_GT(calibrated.keys_read_max - tail, 1.2 * mean);
  EXPECT_LE(calibrated.error_mean, error_max);
  EXPECT_LE(calibrated.error_mean,
            subject.Ask(index::LadderIndex(), 2, std::lround(mean), 0).error_mean);
}

/// Landmark run to the end has every head's true best keys.
void ExpectCompletionIsExact(const Subject& subject) {
  index::SearchOptions options;
  options.candidates = 512;
  options.exact_top = kRecallKeys;
  EXPECT_EQ(subject.AskBuilt("landmark", {}, options).recall_at_100, 1.0);
}

/// Of audited intervals of landmark's missed mass, cut short or not, so many have the truth in
/// them.
constexpr double kCoverFloor = 0.9;

/// At the first look at the clock nothing has been read but the tail, and of min/max the tree's
/// nodes of 256 keys are all that is known; small budgets are stops a little later.
void ExpectCutShortHolds(const Subject& subject) {
  const StoredHead head(subject.trace, 2);
  for (const std::string summary : {"minmax", "mean"}) {
    const auto landmark = BuildIndex("landmark", subject.trace, head.view(), {.summary = summary});
    for (const int candidates : {0, 64, 512, 4096}) {
      index::SearchOptions options;
      options.audit_samples = 64;
      options.candidates = candidates;
      if (candidates == 0) options.stop_at = std::chrono::steady_clock::time_point::min();
      const Evaluation figures = subject.Ask(*landmark, head, options);
      EXPECT_GE(*figures.interval_cover, kCoverFloor) << summary << ", " << candidates;
      EXPECT_NEAR(*figures.missed_estimated, figures.missed_true, 0.1 * figures.missed_true)
          << summary << ", " << candidates;
    }
  }
}

class ShortTraceTest : public ::testing::TestWithParam<const char*> {
 protected:
  const Subject subject_{KVSEEK_SOURCE_DIR "/tests/data", "code8", GetParam(), kShort};
};

TEST_P(ShortTraceTest, ExactIsExact) {
  const Evaluation exact = subject_.Ask(index::ExactIndex(), 2, kShort, 0);
  EXPECT_LT(exact.error_max, 1e-3);
  EXPECT_EQ(exact.recall_at_100, 1.0);
  EXPECT_EQ(exact.missed_true, 0.0);
  EXPECT_EQ(exact.keys_scanned, 7680.0);
}

TEST_P(ShortTraceTest, LadderIsAsGoodAsAnOracle) {
  const Evaluation oracle = EvaluateOracle(subject_.trace, subject_.reference, 0);
  const Evaluation ladder = subject_.Ask(index::LadderIndex(), 2, kShort, 0);
  EXPECT_LE(ladder.error_mean, 1.1 * oracle.error_mean);
  EXPECT_GE(ladder.recall_at_100, 0.93);
  EXPECT_LT(ladder.bytes_read, 0.5 * 7680.0 * 512.0);
}

TEST_P(ShortTraceTest, AuditIsHonest) {
  const Evaluation ladder = subject_.Ask(index::LadderIndex(), 2, kShort, 64);
  ASSERT_TRUE(ladder.interval_cover.has_value());
  EXPECT_GE(*ladder.interval_cover, 0.85);
  EXPECT_NEAR(*ladder.missed_estimated, ladder.missed_true, 0.25 * ladder.missed_true);
}

TEST_P(ShortTraceTest, PartsFloors) {
  for (const PartsFloors& floors : {PartsFloors{"layer15.kv1", 512, 0.73, 0.162, 0.145, 0.75},
                                    PartsFloors{"layer20.kv0", 512, 0.294, 0.164, 0.084, 0.83}}) {
    if (floors.head == subject_.trace.name) ExpectPartsFloors(subject_, floors);
  }
}

TEST_P(ShortTraceTest, ProductFloors) {
  for (const ProductFloors& floors : {ProductFloors{"layer15.kv1", kShort, 0.043, 0.047, 0.030},
                                      ProductFloors{"layer20.kv0", kShort, 0.023, 0.027, 0.019}}) {
    if (floors.head == subject_.trace.name) ExpectProductFloors(subject_, floors);
  }
}

TEST_P(ShortTraceTest, ThresholdFloors) {
  const std::map<std::string, double> error_max = {{"layer15.kv1", 0.039}, {"layer20.kv0", 0.043}};
  ExpectThresholdFloor(subject_, 512, error_max.at(GetParam()));
}

TEST_P(ShortTraceTest, LandmarkCompletionIsExact) { ExpectCompletionIsExact(subject_); }

TEST_P(ShortTraceTest, AuditOfClustersIsHonest) {
  index::SearchOptions options;
  options.candidates = 512;
  options.audit_samples = 64;
  const Evaluation cluster = subject_.AskBuilt("cluster", {}, options);
  ASSERT_TRUE(cluster.interval_cover.has_value());
  EXPECT_GE(*cluster.interval_cover, 0.85);
}

TEST_P(ShortTraceTest, LandmarkCutShortIsHonest) { ExpectCutShortHolds(subject_); }

INSTANTIATE_TEST_SUITE_P(Code8, ShortTraceTest, ::testing::Values("layer15.kv1", "layer20.kv0"));

/// Where the 32K traces are: KVSEEK_TRACES, or shared/traces beside the repository.
std::string LongTraces() {
  const char* given = std::getenv("KVSEEK_TRACES");
  return given != nullptr ? given : KVSEEK_SOURCE_DIR "/../shared/traces";
}

class LongTraceTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const std::string file = LongTraces() + "/code32." + GetParam() + ".safetensors";
    if (!std::filesystem::exists(file)) {
      GTEST_SKIP() << "no 32K traces: set KVSEEK_TRACES to the directory of code32.*.safetensors";
    }
  }
};

TEST_P(LongTraceTest, LadderIsAsGoodAsAnOracle) {
  const std::map<std::string, double> one_bit_error = {
      {"layer2.kv1", 0.155}, {"layer15.kv1", 0.072}, {"layer20.kv0", 0.079}};
  const Subject subject(LongTraces(), "code32", GetParam(), kLong);
  const Evaluation oracle = EvaluateOracle(subject.trace, subject.reference, 0);
  const Evaluation two_bits = subject.Ask(index::LadderIndex(), 2, kLong, 0);
  EXPECT_LE(two_bits.error_mean, 1.15 * oracle.error_mean);
  EXPECT_GE(two_bits.recall_at_100, 0.985);
  const Evaluation one_bit = subject.Ask(index::LadderIndex(), 1, kLong, 0);
  EXPECT_LE(one_bit.error_mean, 1.15 * one_bit_error.at(GetParam()));
}

TEST_P(LongTraceTest, PartsFloors) {
  const Subject subject(LongTraces(), "code32", GetParam(), kLong);
  for (const PartsFloors& floors : {PartsFloors{"layer2.kv1", 1024, 0.54, 0.5, 0.164, 0.56},
                                    PartsFloors{"layer15.kv1", 1024, 0.49, 0.173, 0.138, 0.83},
                                    PartsFloors{"layer20.kv0", 1024, 0.57, 0.26, 0.161, 0.82}}) {
    if (floors.head == subject.trace.name) ExpectPartsFloors(subject, floors);
  }
  ExpectCompletionIsExact(subject);
}

TEST_P(LongTraceTest, LandmarkCutShortIsHonest) {
  ExpectCutShortHolds(Subject(LongTraces(), "code32", GetParam(), kLong));
}

TEST_P(LongTraceTest, ProductFloors) {
  const Subject subject(LongTraces(), "code32", GetParam(), kLong);
  for (const ProductFloors& floors :
       {ProductFloors{"layer2.kv1", kLong, 0.092, 0.159, 0.079},
        ProductFloors{"layer15.kv1", kLong, 0.0245, 0.0255, 0.018},
        ProductFloors{"layer20.kv0", kLong, 0.0247, 0.0277, 0.0197}}) {
    if (floors.head == subject.trace.name) ExpectProductFloors(subject, floors);
  }
}

INSTANTIATE_TEST_SUITE_P(Code32, LongTraceTest,
                         ::testing::Values("layer2.kv1", "layer15.kv1", "layer20.kv0"));

}  // namespace
}  // namespace kvseek::cli
