#include "service/live_planner.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include "proto/head_plan_file.h"
#include "service/query_operations.h"

namespace kvseek::service {
namespace {

constexpr int kCandidatesMin = 64;
constexpr uint64_t kBytesPerBudget = 80;  // what the planner observed of it, and the budget
constexpr uint64_t kBytesPerHead = 512;

/// Of ranges of at most so many keys.
std::vector<int> Budgets(int64_t longest) {
  const auto most =
      static_cast<int>(std::clamp<int64_t>(longest, kCandidatesMin, index::kMaxCandidates));
  return index::BudgetLadder(kCandidatesMin, most);
}

std::vector<index::PlanCurve> Curves(const std::vector<proto::IndexKind>& kinds, int64_t longest) {
  std::vector<index::PlanCurve> curves;
  curves.reserve(kinds.size());
  for (const proto::IndexKind kind : kinds) {
    curves.push_back({proto::kIndexNames[static_cast<size_t>(kind)], Budgets(longest)});
  }
  return curves;
}

double MeanOf(const std::vector<float>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

}  // namespace

LivePlanner::Head::Head(std::vector<proto::IndexKind> curve_kinds, int64_t longest,
                        const index::PlannerOptions& options)
    : kinds(std::move(curve_kinds)), planner(Curves(kinds, longest), options) {}

LivePlanner::LivePlanner(uint32_t layers, uint32_t kv_heads, float error_target, uint32_t build)
    : layers_(layers),
      kv_heads_(kv_heads),
      options_{.error_target = double{error_target}},
      kinds_{proto::INDEX_LADDER} {
  for (const proto::IndexKind kind :
       {proto::INDEX_LANDMARK, proto::INDEX_CLUSTER, proto::INDEX_GRAPH, proto::INDEX_PRODUCT}) {
    if ((build >> static_cast<uint32_t>(*BuiltKindOf(kind)) & 1U) != 0) kinds_.push_back(kind);
  }
}

size_t LivePlanner::OctaveOf(int64_t range) {
  const int octave = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(range, 1))) - 1;
  return static_cast<size_t>(std::clamp(octave, kShortest, kLongest) - kShortest);
}

HeadSetting LivePlanner::Get(uint32_t layer, uint32_t kv_head, int64_t range) const {
  const size_t place = Place(layer, kv_head);
  const auto in = [&](size_t number) {
    const Octave* const octave = published_[number].load(std::memory_order_acquire);
    if (octave == nullptr) return HeadSetting();
    const Planned planned = octave->settings[place].load(std::memory_order_relaxed);
    return HeadSetting{planned.index, planned.candidates};
  };
  const size_t own = OctaveOf(range);
  for (size_t number = own + 1; number-- > 0;) {
    if (const HeadSetting setting = in(number); setting != HeadSetting()) return setting;
  }
  for (size_t number = own + 1; number < kOctaves; ++number) {
    if (const HeadSetting setting = in(number); setting != HeadSetting()) return setting;
  }
  return {};
}

LivePlanner::Learned LivePlanner::Learn(const AuditedSearch& audited, MemoryBudget& budget,
                                        index::Scratch& scratch) {
  Learned learned;
  const size_t number = OctaveOf(audited.query.end - audited.query.begin);
  Octave* const octave = FindOctave(number, budget);
  if (octave == nullptr) return learned;
  Head* const head = FindHead(*octave, number, Place(audited.layer, audited.kv_head), budget);
  if (head == nullptr) return learned;
  audits_.fetch_add(1, std::memory_order_relaxed);
  const index::KvView view = audited.state->View(audited.kv_head);
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
  learned.changed = Choose(audited, !trials.empty(), *octave, *head);
  return learned;
}

LivePlanner::Octave* LivePlanner::FindOctave(size_t number, MemoryBudget& budget) {
  std::unique_ptr<Octave>& octave = octaves_[number];
  if (octave != nullptr) return octave.get();
  const size_t heads = Place(layers_, 0);
  auto memory = budget.Reserve(sizeof(Octave) + heads * sizeof(Planned), "error_target");
  if (!memory.ok()) return nullptr;
  octave = std::make_unique<Octave>(heads);
  octave->memory = *std::move(memory);
  published_[number].store(octave.get(), std::memory_order_release);
  return octave.get();
}

LivePlanner::Head* LivePlanner::FindHead(Octave& octave, size_t number, size_t place,
                                         MemoryBudget& budget) {
  std::unique_ptr<Head>& head = octave.planners[place];
  if (head != nullptr) return head.get();
  const int64_t longest = int64_t{1} << (number + kShortest + 1);
  auto memory = budget.Reserve(
      kBytesPerHead + kinds_.size() * Budgets(longest).size() * kBytesPerBudget, "error_target");
  if (!memory.ok()) return nullptr;
  head = std::make_unique<Head>(kinds_, longest, options_);
  head->memory = *std::move(memory);
  heads_.fetch_add(1, std::memory_order_relaxed);
  return head.get();
}

bool LivePlanner::Choose(const AuditedSearch& audited, bool anything_wanted, Octave& octave,
                         Head& head) {
  const index::PlanSetting chosen = head.planner.chosen();
  const bool exact = chosen.curve == index::PlanSetting::kExact;
  const bool searching = exact && anything_wanted && !head.planned.has_value();
  if (searching || head.planned == chosen) return false;
  head.planned = chosen;
  HeadSetting setting{.index = proto::INDEX_EXACT};
  if (!exact) {
    const index::PlanCurve& curve = head.planner.curves()[chosen.curve];
    setting.index = head.kinds[chosen.curve];
    setting.candidates = static_cast<uint32_t>(curve.candidates[chosen.budget]);
  }
  const HeadSetting before =
      Get(audited.layer, audited.kv_head, audited.query.end - audited.query.begin);
  octave.settings[Place(audited.layer, audited.kv_head)].store({setting.index, setting.candidates},
                                                               std::memory_order_relaxed);
  return setting != before;
}

}  // namespace kvseek::service
