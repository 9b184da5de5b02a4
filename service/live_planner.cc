#include "service/live_planner.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "proto/head_plan_file.h"
#include "service/query_operations.h"

namespace kvseek::service {
namespace {

constexpr int kCandidatesMin = 64;
constexpr uint64_t kBytesPerBudget = 80;  // what the planner observed of it, and the budget
constexpr uint64_t kBytesPerHead = 512;

std::vector<int> Budgets(int64_t range) {
  const auto most =
      static_cast<int>(std::clamp<int64_t>(range, kCandidatesMin, index::kMaxCandidates));
  return index::BudgetLadder(kCandidatesMin, most);
}

std::vector<index::PlanCurve> Curves(const std::vector<proto::IndexKind>& kinds, int64_t range) {
  std::vector<index::PlanCurve> curves;
  curves.reserve(kinds.size());
  for (const proto::IndexKind kind : kinds) {
    curves.push_back({proto::kIndexNames[static_cast<size_t>(kind)], Budgets(range)});
  }
  return curves;
}

double MeanOf(const std::vector<float>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

}  // namespace

LivePlanner::Head::Head(std::vector<proto::IndexKind> curve_kinds, int64_t keys,
                        const index::PlannerOptions& options)
    : kinds(std::move(curve_kinds)), range(keys), planner(Curves(kinds, keys), options) {}

LivePlanner::LivePlanner(std::shared_ptr<SessionPlan> plan, float error_target, uint32_t build)
    : plan_(std::move(plan)),
      options_{.error_target = double{error_target}},
      kinds_{proto::INDEX_LADDER} {
  for (const proto::IndexKind kind :
       {proto::INDEX_LANDMARK, proto::INDEX_CLUSTER, proto::INDEX_GRAPH, proto::INDEX_PRODUCT}) {
    if ((build >> static_cast<uint32_t>(*BuiltKindOf(kind)) & 1U) != 0) kinds_.push_back(kind);
  }
}

LivePlanner::Learned LivePlanner::Learn(const AuditedSearch& audited, MemoryBudget& budget,
                                        index::Scratch& scratch) {
  Learned learned;
  Head* const head = FindHead(audited, budget);
  if (head == nullptr) return learned;
  const index::KvView view = audited.state->heads[audited.kv_head].View();
  std::vector<index::PlanTrial> trials;
  for (const index::PlanSetting& setting : head->planner.Wanted()) {
    const index::KeyIndex* const index =
        FindIndex(*audited.state, audited.kv_head, head->kinds[setting.curve]);
    if (index == nullptr) continue;  // not built yet
    index::SearchOptions options = audited.options;
    options.candidates = head->planner.curves()[setting.curve].candidates[setting.budget];
    options.threshold = 0.0F;  // what is planned here has none
    const index::SearchResult result = index->Search(view, audited.query, options, scratch);
    trials.push_back({setting, static_cast<double>(result.report.bytes_touched),
                      MeanOf(audited.audit->Compare(result).output_error)});
  }
  head->planner.Add(static_cast<double>(audited.audit->exact_bytes()), trials);
  learned.trials = static_cast<int>(trials.size());
  learned.changed = Plan(audited, !trials.empty(), *head);
  return learned;
}

LivePlanner::Head* LivePlanner::FindHead(const AuditedSearch& audited, MemoryBudget& budget) {
  const int64_t range = audited.query.end - audited.query.begin;
  std::unique_ptr<Head>& head = heads_[uint64_t{audited.layer} << 32 | audited.kv_head];
  if (head != nullptr && range <= 2 * head->range && head->range <= 2 * range) return head.get();
  head.reset();
  auto memory = budget.Reserve(
      kBytesPerHead + kinds_.size() * Budgets(range).size() * kBytesPerBudget, "error_target");
  if (!memory.ok()) return nullptr;
  head = std::make_unique<Head>(kinds_, range, options_);
  head->memory = *std::move(memory);
  return head.get();
}

bool LivePlanner::Plan(const AuditedSearch& audited, bool anything_wanted, Head& head) {
  const index::PlanSetting chosen = head.planner.chosen();
  const bool exact = chosen.curve == index::PlanSetting::kExact;
  const bool searching = exact && anything_wanted && !head.planned.has_value();
  if (searching || head.planned == chosen) return false;
  head.planned = chosen;
  HeadSetting setting{proto::INDEX_EXACT, 0};
  if (!exact) {
    const index::PlanCurve& curve = head.planner.curves()[chosen.curve];
    setting = {head.kinds[chosen.curve], static_cast<uint32_t>(curve.candidates[chosen.budget])};
  }
  if (plan_->Get(audited.layer, audited.kv_head) == setting) return false;
  plan_->Set(audited.layer, audited.kv_head, setting);
  return true;
}

}  // namespace kvseek::service
