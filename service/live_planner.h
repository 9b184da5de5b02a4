// Plans KV heads from audits of traffic: for each head the cheapest setting whose mean output error
// is at most an error target (index/planner.h). Of one session and its forks, or of all sessions of
// a model (service/shared_planners.h).
//
// Each audited search of a head (service/request_audits.h) is answered again with the settings that
// the head's planner wants to know about: budgets of the ladder, and of each index that the
// sessions build and that is there for that head. What the planner chooses becomes the head's
// setting; until it has chosen, the head stays as its session was opened. Exact is chosen only when
// nothing else is worth a look.
//
// What a budget is worth depends on the number of keys: a head has a planner for each octave of its
// range's length, [2^n, 2^(n+1)) keys, so that short and long sessions do not spoil each other's.
// Where the planner of a range's octave has not chosen yet, what was chosen for the nearest shorter
// octave counts, else for the nearest longer one.
//
// Memory: an octave's table and a head's planner are made with their first audit and reserved from
// the daemon's budget, 8 bytes a head and about 3 KiB for each index (37 budgets at 32K keys);
// without room for them the audit teaches nothing.
#ifndef KVSEEK_SERVICE_LIVE_PLANNER_H_
#define KVSEEK_SERVICE_LIVE_PLANNER_H_

#include <array>
#include <atomic>
#include <cstddef>
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

/// The audits' thread alone calls Learn; everything else is thread-safe and waits for nothing.
class LivePlanner {
 public:
  /// `build`: as SessionSettings::build.
  LivePlanner(uint32_t layers, uint32_t kv_heads, float error_target, uint32_t build);

  /// What one audit came to.
  struct Learned {
    int trials = 0;  ///< searches beside the exact one
    bool changed = false;
  };
  Learned Learn(const AuditedSearch& audited, MemoryBudget& budget, index::Scratch& scratch);

  /// What was chosen for a range of so many keys, which has an index other than auto; or
  /// HeadSetting(), where nothing was.
  HeadSetting Get(uint32_t layer, uint32_t kv_head, int64_t range) const;

  uint64_t audits() const { return audits_.load(std::memory_order_relaxed); }
  /// Planners of heads, each octave by itself.
  uint64_t heads() const { return heads_.load(std::memory_order_relaxed); }

 private:
  /// Ranges below 2^(kShortest + 1) keys, and those of 2^kLongest or more, are one octave each.
  static constexpr int kShortest = 10;
  static constexpr int kLongest = 24;
  static constexpr size_t kOctaves = kLongest - kShortest + 1;

  struct Head {
    Head(std::vector<proto::IndexKind> curve_kinds, int64_t longest,
         const index::PlannerOptions& options);

    std::vector<proto::IndexKind> kinds;  ///< by curve
    index::HeadPlanner planner;
    std::optional<index::PlanSetting> planned;  ///< what the table says
    MemoryBudget::Reservation memory;
  };
  /// One word of a table. What is planned here has no threshold.
  struct Planned {
    proto::IndexKind index = proto::INDEX_AUTO;  ///< auto: nothing yet
    uint32_t candidates = 0;
  };
  static_assert(std::atomic<Planned>::is_always_lock_free);
  struct Octave {
    explicit Octave(size_t heads) : settings(heads) {}

    std::vector<std::atomic<Planned>> settings;                   ///< (layers, kv_heads)
    absl::flat_hash_map<size_t, std::unique_ptr<Head>> planners;  ///< by place; Learn's alone
    MemoryBudget::Reservation memory;
  };

  static size_t OctaveOf(int64_t range);
  size_t Place(uint32_t layer, uint32_t kv_head) const {
    return static_cast<size_t>(layer) * kv_heads_ + kv_head;
  }
  /// Null: there is no memory for it; also below.
  Octave* FindOctave(size_t number, MemoryBudget& budget);
  Head* FindHead(Octave& octave, size_t number, size_t place, MemoryBudget& budget);
  /// Writes down what the head's planner has chosen. False if that is in force already.
  bool Choose(const AuditedSearch& audited, bool anything_wanted, Octave& octave, Head& head);

  const uint32_t layers_;
  const uint32_t kv_heads_;
  const index::PlannerOptions options_;
  std::vector<proto::IndexKind> kinds_;  ///< that heads may be planned with, beside exact
  std::array<std::unique_ptr<Octave>, kOctaves> octaves_;         ///< Learn's alone, and ...
  std::array<std::atomic<const Octave*>, kOctaves> published_{};  ///< ... everybody's
  std::atomic<uint64_t> audits_{0};
  std::atomic<uint64_t> heads_{0};
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_LIVE_PLANNER_H_
