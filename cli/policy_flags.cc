#include "cli/policy_flags.h"

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "cli/table.h"
#include "index/threshold_calibration.h"

namespace kvseek::cli {
namespace {

/// Why `text` is no threshold; empty: it is one.
std::string CheckThreshold(const std::string& text) {
  absl::string_view keys = text;
  if (absl::ConsumePrefix(&keys, PolicyFlags::kCalibrated)) {
    int count = 0;
    const bool good = absl::SimpleAtoi(keys, &count) && count >= 1 && count < index::kMaxCandidates;
    return good ? "" : absl::StrCat(text, ": keys must be 1 to ", index::kMaxCandidates - 1);
  }
  float nats = 0.0F;
  const bool good = absl::SimpleAtof(text, &nats) && nats >= index::kMinThreshold && nats <= 0.0F;
  return good ? ""
              : absl::StrCat(text, ": must be ", index::kMinThreshold, " to 0 nats, or ",
                             PolicyFlags::kCalibrated, "KEYS");
}

}  // namespace

void PolicyFlags::AddOptions(CLI::App& command) {
  command
      .add_option("--mass", mass,
                  "ladder, landmark, cluster: fewer candidates where they are expected to leave no "
                  "head more than this share of its mass unread; 0: spend all")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command
      .add_option("--beta", beta,
                  "fewer candidates where fewer are expected within so many nats of a head's best "
                  "score; 0: spend all")
      ->check(CLI::Range(0.0, 1000.0))
      ->capture_default_str();
  command
      .add_option("--threshold", threshold,
                  "Of the candidates those alone whose share of a head's mass is at least "
                  "exp(NATS), NATS < 0; calibrated:KEYS: the threshold at which the head's late "
                  "prefill queries have so many candidates on average; 0: all")
      ->check(CheckThreshold)
      ->capture_default_str();
  command
      .add_option("--vote", vote,
                  "landmark, cluster: a part's rank is that of its best head (max), or by the sum "
                  "of its heads' shares (sum)")
      ->check(CLI::IsMember({"max", "sum"}))
      ->capture_default_str();
  command
      .add_option("--reuse", reuse,
                  "Search at most every so many steps, and answer the others from the last "
                  "selection; the first --steps consecutive steps are taken. 1: search always; 0: "
                  "steps evenly spread")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command.add_option("--reuse-keys", reuse_options.keep, "Keys that a search remembers")
      ->check(CLI::Range(1, index::kMaxKeep))
      ->capture_default_str();
  command
      .add_option("--reuse-samples", reuse_options.samples, "Unread keys scored to check a reuse")
      ->check(CLI::Range(0, index::kMaxAuditSamples))
      ->capture_default_str();
  command
      .add_option("--reuse-tolerance", reuse_options.tolerance,
                  "Mass that a reuse may leave unread, over what the search left")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
}

int PolicyFlags::CalibratedKeys() const {
  absl::string_view keys = threshold;
  int count = 0;
  return absl::ConsumePrefix(&keys, kCalibrated) && absl::SimpleAtoi(keys, &count) ? count : 0;
}

void PolicyFlags::Apply(index::SearchOptions& options) const {
  options.mass = mass;
  options.beta = beta;
  if (CalibratedKeys() > 0 || !absl::SimpleAtof(threshold, &options.threshold)) {
    options.threshold = 0.0F;
  }
  options.vote = vote == "sum" ? index::Vote::kSum : index::Vote::kMax;
}

absl::Status PolicyFlags::Calibrate(const HeadTrace& trace, const StoredHead& head,
                                    const index::KeyIndex& index,
                                    index::SearchOptions& options) const {
  const int keys = CalibratedKeys();
  if (keys == 0) return absl::OkStatus();
  index::BuildInput input;
  input.view = head.view();
  input.group = trace.group;
  input.queries = trace.prefill_queries;
  input.query_positions = trace.prefill_positions;
  index::Scratch scratch;
  const index::CalibratedThreshold found =
      index::CalibrateThreshold(index, input, options, keys, scratch);
  if (found.queries == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(trace.name, ": --threshold calibrated: needs prefill queries of the last ",
                     100.0 * (1.0 - index::kCalibrationSince), " % of the tokens"));
  }
  options.threshold = found.threshold;
  return absl::OkStatus();
}

SearchFunction PolicyFlags::Search(const HeadTrace& trace, const StoredHead& head,
                                   const index::KeyIndex& index, PieceRunner& runner) const {
  if (reuse == 0) return SearchLibrary(trace, head, index, runner);
  index::ReuseOptions options = reuse_options;
  options.every = reuse;
  return SearchReusing(trace, head, index, options, runner);
}

SearchFunction PolicyFlags::Search(DaemonHead& head, IndexKind index) const {
  return head.Search(index, reuse, reuse == 0 ? 0 : reuse_options.keep);
}

void PolicyFlags::Describe(nlohmann::ordered_json& settings) const {
  if (mass > 0.0F) settings["mass"] = mass;
  if (beta > 0.0F) settings["beta"] = beta;
  if (vote != "sum") settings["vote"] = vote;
  if (reuse == 0) return;
  settings["reuse"] = reuse;
  settings["reuse_keys"] = reuse_options.keep;
  settings["reuse_samples"] = reuse_options.samples;
  settings["reuse_tolerance"] = reuse_options.tolerance;
}

void PolicyFlags::DescribeThreshold(const index::SearchOptions& options,
                                    nlohmann::ordered_json& settings) const {
  if (options.threshold < 0.0F) settings["threshold"] = options.threshold;
  if (CalibratedKeys() > 0) settings["threshold_keys"] = CalibratedKeys();
}

std::string PolicyFlags::Text(const nlohmann::ordered_json& settings) {
  std::string text;
  for (const char* name : {"mass", "beta"}) {
    const double value = settings.value(name, 0.0);
    if (value > 0.0) absl::StrAppend(&text, ", ", name, " ", Digits(value));
  }
  if (settings.contains("threshold_keys")) {
    absl::StrAppend(&text, ", threshold ", settings["threshold_keys"].get<int>(), " keys");
  } else if (settings.contains("threshold")) {
    absl::StrAppend(&text, ", threshold ", Digits(settings["threshold"].get<double>()));
  }
  if (settings.contains("vote")) absl::StrAppend(&text, ", vote max");
  if (settings.contains("reuse")) {
    absl::StrAppend(&text, ", reuse ", settings["reuse"].get<int>(), " of ",
                    settings["reuse_keys"].get<int>());
  }
  return text;
}

}  // namespace kvseek::cli
