// Plans the KV heads of one session from audits of its own requests: for each head the cheapest
// setting whose mean output error is at most the session's error_target (index/planner.h).
//
// Each audited search of a head (service/request_audits.h) is answered again with the settings that
// the head's planner wants to know about: budgets of the ladder, and of each index that the session
// builds and has for that head. What the planner chooses becomes the head's setting in the
// session's plan; until it has chosen, the head stays as it was opened. Exact is chosen only when
// nothing else is worth a look.
//
// What a budget is worth depends on the number of keys: when a head's range has doubled or halved
// since its planner began, a new one begins, and the setting stays until that one has chosen.
//
// Memory: a head's planner is made with its first audit and reserved from the daemon's budget,
// about 3 KiB for each index (37 budgets at 32K keys); without room for it the head is not planned.
#ifndef KVSEEK_SERVICE_LIVE_PLANNER_H_
#define KVSEEK_SERVICE_LIVE_PLANNER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "index/planner.h"
#include "index/search_audit.h"
#include "proto/kvseek.pb.h"
#include "service/layer_cache.h"
#include "service/memory_budget.h"
#include "service/session_plan.h"

namespace kvseek::service {

/// A search of one KV head that was audited, as an Attend.
struct AuditedSearch {
  uint32_t layer = 0;
  uint32_t kv_head = 0;
  const LayerState* state = nullptr;
  index::SearchQuery query;
  index::SearchOptions options;  ///< of the request
  const index::SearchAudit* audit = nullptr;
};

/// Not thread-safe: the audits' thread alone calls it. Other threads read the plan meanwhile.
class LivePlanner {
 public:
  /// `build`: as SessionSettings::build.
  LivePlanner(std::shared_ptr<SessionPlan> plan, float error_target, uint32_t build);

  /// What one audit came to.
  struct Learned {
    int trials = 0;  ///< searches beside the exact one
    bool changed = false;
  };
  Learned Learn(const AuditedSearch& audited, MemoryBudget& budget, index::Scratch& scratch);

 private:
  struct Head {
    Head(std::vector<proto::IndexKind> curve_kinds, int64_t keys,
         const index::PlannerOptions& options);

    std::vector<proto::IndexKind> kinds;  ///< by curve
    int64_t range;                        ///< keys of the first audit
    index::HeadPlanner planner;
    std::optional<index::PlanSetting> planned;  ///< what the plan says now, if it is this planner's
    MemoryBudget::Reservation memory;
  };

  /// Null: there is no memory for it.
  Head* FindHead(const AuditedSearch& audited, MemoryBudget& budget);
  /// Writes down what the head's planner has chosen. False if the plan says so already.
  bool Plan(const AuditedSearch& audited, bool anything_wanted, Head& head);

  const std::shared_ptr<SessionPlan> plan_;
  const index::PlannerOptions options_;
  std::vector<proto::IndexKind> kinds_;  ///< that heads may be planned with, beside exact
  absl::flat_hash_map<uint64_t, std::unique_ptr<Head>> heads_;  ///< by layer << 32 | kv_head
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_LIVE_PLANNER_H_
