#include "cli/evaluation.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "cli/percentile.h"

namespace kvseek::cli {
namespace {

/// Samples of all steps, and how they become an Evaluation.
struct Samples {
  std::vector<double> errors;
  std::vector<double> recalls;
  std::vector<double> keys_scanned;
  std::vector<double> keys_read;
  std::vector<double> bytes_read;
  std::vector<double> reused;
  std::vector<double> missed_estimated;
  std::vector<double> missed_true;
  std::vector<double> covered;
  std::vector<double> widths;
  std::vector<double> micros;

  Evaluation Summary() const {
    Evaluation result;
    result.error_mean = Mean(errors);
    result.error_p90 = Percentile(errors, 0.9);
    result.error_max = Percentile(errors, 1.0);
    result.recall_at_100 = Mean(recalls);
    result.keys_scanned = Mean(keys_scanned);
    result.bytes_read = Mean(bytes_read);
    result.keys_read_mean = Mean(keys_read);
    result.keys_read_min = Percentile(keys_read, 0.0);
    result.keys_read_p10 = Percentile(keys_read, 0.1);
    result.keys_read_p90 = Percentile(keys_read, 0.9);
    result.keys_read_max = Percentile(keys_read, 1.0);
    if (!reused.empty()) result.searches_skipped = Mean(reused);
    result.missed_true = Mean(missed_true);
    if (!missed_estimated.empty()) result.missed_estimated = Mean(missed_estimated);
    if (!covered.empty()) result.interval_cover = Mean(covered);
    if (!widths.empty()) result.interval_width = Percentile(widths, 0.5);
    if (!micros.empty()) {
      result.micros_mean = Mean(micros);
      result.micros_p50 = Percentile(micros, 0.5);
      result.micros_p99 = Percentile(micros, 0.99);
    }
    return result;
  }
};

/// An answer may come from another machine: what is indexed below is checked here.
absl::Status CheckAnswer(const HeadTrace& trace, const index::SearchResult& answer) {
  const auto group = static_cast<size_t>(trace.group);
  const index::SearchReport& report = answer.report;
  if (answer.out.size() != group * static_cast<size_t>(trace.value_dim) ||
      answer.lse.size() != group || report.missed_mass.size() != group ||
      (!report.missed_low.empty() && report.missed_low.size() != group) ||
      report.missed_high.size() != report.missed_low.size()) {
    return absl::InternalError("the answer's out, lse or report has a wrong shape");
  }
  int64_t previous = -1;
  for (const int64_t position : answer.positions) {
    if (position <= previous || position >= trace.tokens) {
      return absl::InternalError(
          absl::StrCat("the answer lists position ", position, ", which is out of order or range"));
    }
    previous = position;
  }
  return absl::OkStatus();
}

double Recall(const Reference& reference, size_t row, const std::vector<int64_t>& read) {
  int found = 0;
  const int32_t* top = reference.top_keys.data() + row * static_cast<size_t>(reference.top);
  for (int i = 0; i < reference.top; ++i) {
    found += std::binary_search(read.begin(), read.end(), int64_t{top[i]}) ? 1 : 0;
  }
  return static_cast<double>(found) / reference.top;
}

void AddAnswer(const HeadTrace& trace, const Reference& reference, size_t s, bool audited,
               const index::SearchResult& answer, Samples& samples) {
  const auto group = static_cast<size_t>(trace.group);
  const auto dim = static_cast<size_t>(trace.value_dim);
  const index::SearchReport& report = answer.report;
  // An exact answer has read every key and need not list them.
  const bool all_read = report.keys_exact >= trace.tokens ||
                        static_cast<int64_t>(answer.positions.size()) == trace.tokens;
  std::vector<double> read_mass(group, 1.0);
  if (!all_read) {
    read_mass =
        MassOfKeys(trace, reference.steps[s], reference.lse.data() + s * group, answer.positions);
  }
  samples.keys_scanned.push_back(static_cast<double>(report.keys_scanned));
  samples.keys_read.push_back(
      static_cast<double>(all_read ? trace.tokens : static_cast<int64_t>(answer.positions.size())));
  samples.bytes_read.push_back(static_cast<double>(report.bytes_touched));
  samples.reused.push_back(report.reused ? 1.0 : 0.0);
  for (size_t h = 0; h < group; ++h) {
    const size_t row = s * group + h;
    samples.errors.push_back(OutputError(answer.out.data() + h * dim,
                                         reference.out.data() + row * dim, trace.value_dim));
    samples.recalls.push_back(all_read ? 1.0 : Recall(reference, row, answer.positions));
    const double missed = std::max(0.0, 1.0 - read_mass[h]);
    const double estimated = double{report.missed_mass[h]};
    samples.missed_true.push_back(missed);
    samples.missed_estimated.push_back(estimated);
    if (!audited || report.missed_low.empty()) continue;
    const double low = double{report.missed_low[h]};
    const double high = double{report.missed_high[h]};
    samples.covered.push_back(low <= missed && missed <= high ? 1.0 : 0.0);
    if (estimated > 0.0) samples.widths.push_back((high - low) / estimated);
  }
}

}  // namespace

double OutputError(const float* out, const double* truth, int dim) {
  double difference = 0.0;
  double norm = 0.0;
  for (int i = 0; i < dim; ++i) {
    const double delta = double{out[i]} - truth[i];
    difference += delta * delta;
    norm += truth[i] * truth[i];
  }
  return norm > 0.0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

absl::StatusOr<Evaluation> EvaluateSearch(const HeadTrace& trace, const Reference& reference,
                                          const SearchFunction& search,
                                          const index::SearchOptions& options) {
  Samples samples;
  index::SearchOptions timed = options;
  timed.k = -1;
  timed.audit_samples = 0;
  timed.list_read = false;
  for (const int step : reference.steps) {
    const auto begin = std::chrono::steady_clock::now();
    const absl::StatusOr<index::SearchResult> answer = search(step, timed);
    const auto end = std::chrono::steady_clock::now();
    if (!answer.ok()) return answer.status();
    samples.micros.push_back(std::chrono::duration<double, std::micro>(end - begin).count());
  }
  index::SearchOptions listed = options;
  listed.k = -1;
  listed.list_read = true;
  for (size_t s = 0; s < reference.steps.size(); ++s) {
    const absl::StatusOr<index::SearchResult> answer = search(reference.steps[s], listed);
    if (!answer.ok()) return answer.status();
    if (absl::Status status = CheckAnswer(trace, *answer); !status.ok()) return status;
    AddAnswer(trace, reference, s, options.audit_samples > 0, *answer, samples);
  }
  return samples.Summary();
}

Evaluation EvaluateOracle(const HeadTrace& trace, const Reference& reference, size_t which) {
  const OracleAnswers& oracle = reference.oracles[which];
  const auto dim = static_cast<size_t>(trace.value_dim);
  const auto row_bytes = static_cast<double>(trace.key_dim + trace.value_dim) * sizeof(uint16_t);
  Samples samples;
  for (const int64_t keys : oracle.keys_read) {
    samples.keys_scanned.push_back(static_cast<double>(keys));
    samples.keys_read.push_back(static_cast<double>(keys));
    samples.bytes_read.push_back(static_cast<double>(keys) * row_bytes);
  }
  std::vector<float> out(dim);
  for (size_t row = 0; row < reference.lse.size(); ++row) {
    for (size_t d = 0; d < dim; ++d) out[d] = static_cast<float>(oracle.out[row * dim + d]);
    samples.errors.push_back(
        OutputError(out.data(), reference.out.data() + row * dim, trace.value_dim));
    samples.recalls.push_back(static_cast<double>(std::min<int64_t>(oracle.k, reference.top)) /
                              reference.top);
    samples.missed_true.push_back(1.0 - oracle.mass[row]);
  }
  return samples.Summary();
}

}  // namespace kvseek::cli
