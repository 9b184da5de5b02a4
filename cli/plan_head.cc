#include "cli/plan_head.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cli/percentile.h"

namespace kvseek::cli {
namespace {

double MeanOf(const std::vector<float>& values) {
  double sum = 0.0;
  for (const float value : values) sum += double{value};
  return values.empty() ? 0.0 : sum / static_cast<double>(values.size());
}

index::BuiltKind KindOf(const std::string& name) {
  if (name == "landmark") return index::BuiltKind::kLandmark;
  if (name == "cluster") return index::BuiltKind::kCluster;
  return name == "graph" ? index::BuiltKind::kGraph : index::BuiltKind::kProduct;
}

/// Only the ladder reads the scan codes.
bool ReadsCodes(const std::string& index) { return index == "ladder"; }

}  // namespace

absl::StatusOr<std::unique_ptr<PlannedTrace>> PlannedTrace::Make(const HeadTrace& trace,
                                                                 const PlanSettings& settings) {
  std::unique_ptr<PlannedTrace> planned(new PlannedTrace(trace, settings));
  if (absl::Status status = planned->Build(); !status.ok()) return status;
  return planned;
}

absl::Status PlannedTrace::Build() {
  std::vector<size_t> late;
  const auto least = static_cast<int64_t>(settings_.since * static_cast<double>(trace_.tokens));
  for (size_t i = 0; i < trace_.prefill_positions.size(); ++i) {
    const int64_t position = trace_.prefill_positions[i];
    if (position >= least && position >= settings_.recent) late.push_back(i);
  }
  if (late.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(
        trace_.name, ": no prefill queries from position ", std::max(least, settings_.recent),
        " on; the queries file needs ", trace_.name, ".q_prefill (--since, --recent)"));
  }
  const std::vector<int> spread = SpreadSteps(static_cast<int>(late.size()), settings_.audits);
  constexpr size_t kStride = 16;  // no stretch of the text comes all at once, as in traffic
  for (size_t first = 0; first < kStride; ++first) {
    for (size_t i = first; i < spread.size(); i += kStride) {
      const size_t sample = late[static_cast<size_t>(spread[i])];
      audited_.push_back({sample, trace_.prefill_positions[sample] + 1 - settings_.recent});
    }
  }
  const int most = static_cast<int>(std::min<int64_t>(trace_.tokens, index::kMaxCandidates));
  budgets_ = index::BudgetLadder(std::min(settings_.candidates_min, most), most);
  for (const int bits : settings_.scan_bits) {
    stored_.push_back({bits, std::make_unique<const StoredHead>(trace_, bits)});
  }
  if (absl::Status status = BuildIndexes(); !status.ok()) return status;
  steps_ = SpreadSteps(trace_.steps, settings_.steps);
  for (const int step : steps_) {
    tests_.push_back(std::make_unique<const index::SearchAudit>(
        stored_.front().head->view(), MakeQuery(trace_.StepQueries(step), 0, trace_.tokens),
        scratch_));
  }
  return absl::OkStatus();
}

absl::Status PlannedTrace::BuildIndexes() {
  std::vector<bool> audited(trace_.prefill_positions.size(), false);
  for (const Query& query : audited_) audited[query.sample] = true;
  std::vector<float> queries;
  std::vector<int64_t> positions;
  const size_t row = static_cast<size_t>(trace_.group) * static_cast<size_t>(trace_.key_dim);
  for (size_t i = 0; i < audited.size(); ++i) {
    if (audited[i]) continue;
    queries.insert(queries.end(), PrefillQueries(i), PrefillQueries(i) + row);
    positions.push_back(trace_.prefill_positions[i]);
  }
  index::BuildInput input;
  input.view = stored_.front().head->view();
  input.group = trace_.group;
  input.queries = queries;
  input.query_positions = positions;
  for (const std::string& name : settings_.indexes) {
    if (ReadsCodes(name)) continue;
    auto built = index::BuildIndex(KindOf(name), input);
    if (built == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          trace_.name, ": ", name, " needs a full segment of ", index::kSegmentTokens, " tokens",
          name == "graph" || name == "product" ? ", and prefill queries beside the audited" : ""));
    }
    built_.emplace_back(name, std::move(built));
  }
  return absl::OkStatus();
}

const index::KeyIndex& PlannedTrace::FindIndex(const std::string& name) const {
  if (name == "exact") return index::ExactIndex();
  for (const auto& [built_name, built] : built_) {
    if (built_name == name) return *built;
  }
  return index::LadderIndex();
}

index::KvView PlannedTrace::View(int scan_bits) const {
  for (const Stored& stored : stored_) {
    if (stored.scan_bits == scan_bits) return stored.head->view();
  }
  return stored_.front().head->view();
}

index::SearchResult PlannedTrace::Search(const std::string& index, int scan_bits, int candidates,
                                         const index::SearchQuery& query) {
  index::SearchOptions options;
  if (candidates > 0) options.candidates = candidates;
  options.exact_rows = settings_.exact_rows;
  options.list_read = true;
  return FindIndex(index).Search(View(scan_bits), query, options, scratch_);
}

HeadChoice PlannedTrace::Plan(int scan_bits) {
  std::vector<index::PlanCurve> curves;
  for (const std::string& name : settings_.indexes) curves.push_back({name, budgets_});
  index::HeadPlanner planner(std::move(curves), settings_.planner);
  HeadChoice choice;
  choice.scan_bits = scan_bits;
  for (const Query& audited : audited_) {
    const index::SearchQuery query = MakeQuery(PrefillQueries(audited.sample), 0, audited.end);
    const index::SearchAudit audit(View(scan_bits), query, scratch_);
    std::vector<index::PlanTrial> trials;
    for (const index::PlanSetting& setting : planner.Wanted()) {
      const index::PlanCurve& curve = planner.curves()[setting.curve];
      const index::SearchResult result =
          Search(curve.index, scan_bits, curve.candidates[setting.budget], query);
      trials.push_back({setting, static_cast<double>(result.report.bytes_touched),
                        MeanOf(audit.Compare(result).output_error)});
    }
    planner.Add(static_cast<double>(audit.exact_bytes()), trials);
    ++choice.audits;
    choice.trials += static_cast<int>(trials.size());
  }
  const index::PlanSetting chosen = planner.chosen();
  choice.audited = planner.Estimate(chosen);
  if (chosen.curve == index::PlanSetting::kExact) {
    choice.tested = Test("exact", scan_bits, 0);
  } else {
    const index::PlanCurve& curve = planner.curves()[chosen.curve];
    choice.tested = Test(curve.index, scan_bits, curve.candidates[chosen.budget]);
  }
  return choice;
}

PlanFigures PlannedTrace::Test(const std::string& index, int scan_bits, int candidates) {
  std::vector<double> bytes, errors, recalls, estimated, missed;
  for (size_t s = 0; s < steps_.size(); ++s) {
    const index::SearchResult result = Search(
        index, scan_bits, candidates, MakeQuery(trace_.StepQueries(steps_[s]), 0, trace_.tokens));
    const index::AuditFigures figures = tests_[s]->Compare(result);
    bytes.push_back(static_cast<double>(result.report.bytes_touched));
    errors.push_back(MeanOf(figures.output_error));
    recalls.push_back(MeanOf(figures.recall));
    estimated.push_back(MeanOf(result.report.missed_mass));
    missed.push_back(MeanOf(figures.missed));
  }
  return {index,           ReadsCodes(index) ? scan_bits : 0,
          candidates,      Mean(bytes),
          Mean(errors),    Mean(recalls),
          Mean(estimated), Mean(missed)};
}

void PlannedTrace::SearchCurve(const std::string& index, int scan_bits, PlanFigures& best) {
  for (const int candidates : budgets_) {
    const PlanFigures figures = Test(index, scan_bits, candidates);
    if (figures.bytes >= best.bytes) return;  // larger budgets read more still
    if (figures.error <= settings_.planner.error_target) {
      best = figures;
      return;
    }
  }
}

PlanFigures PlannedTrace::BestFixed() {
  PlanFigures best = Test("exact", 0, 0);
  for (const std::string& name : settings_.indexes) {
    if (ReadsCodes(name)) {
      for (const int bits : settings_.scan_bits) SearchCurve(name, bits, best);
    } else {
      SearchCurve(name, settings_.scan_bits.front(), best);
    }
  }
  return best;
}

double PlannedTrace::FarMass() {
  std::vector<double> sums(static_cast<size_t>(trace_.group), 0.0);
  const index::KvView view = stored_.front().head->view();
  for (const Query& query : audited_) {
    const int64_t all = std::min(query.end + settings_.recent, trace_.tokens);
    const index::SearchResult whole = index::ExactIndex().Search(
        view, MakeQuery(PrefillQueries(query.sample), 0, all), {}, scratch_);
    const index::SearchResult far = index::ExactIndex().Search(
        view,
        MakeQuery(PrefillQueries(query.sample), std::min(settings_.sink, query.end), query.end), {},
        scratch_);
    for (size_t h = 0; h < sums.size(); ++h) {
      sums[h] += std::exp(double{far.lse[h]} - double{whole.lse[h]});
    }
  }
  return *std::max_element(sums.begin(), sums.end()) / static_cast<double>(audited_.size());
}

}  // namespace kvseek::cli
