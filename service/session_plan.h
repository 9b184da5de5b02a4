// How a session's KV heads are searched where a request does not say: as audits have planned them
// (service/live_planner.h), else as the head plan says that it was opened with
// (proto/head_plan.proto).
//
// A head's setting is one atomic word: a search reads it and never waits, and it is always one that
// was planned as a whole.
#ifndef KVSEEK_SERVICE_SESSION_PLAN_H_
#define KVSEEK_SERVICE_SESSION_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "index/built_index.h"
#include "proto/head_plan.pb.h"
#include "proto/kvseek.pb.h"

namespace kvseek::service {

class LivePlanner;

/// The kind of an index that is built in the background; none for the others.
std::optional<index::BuiltKind> BuiltKindOf(proto::IndexKind kind);

/// What a search of one KV head takes from a plan.
struct HeadSetting {
  proto::IndexKind index = proto::INDEX_AUTO;
  uint32_t candidates = 0;  ///< up to index::kMaxCandidates; 0: the daemon's default
  float threshold = 0.0F;   ///< 0: none

  bool operator==(const HeadSetting&) const = default;
};

/// Immutable, but for what the planner learns; thread-safe. Shared by a session and its forks.
class SessionPlan {
 public:
  /// `opened` fits the shape (proto::CheckHeadPlanFits); null: none. `live`: null: none.
  SessionPlan(uint32_t layers, uint32_t kv_heads, std::shared_ptr<const proto::HeadPlan> opened,
              std::shared_ptr<const LivePlanner> live);

  /// What one that was opened with `opened` takes.
  static uint64_t Bytes(uint32_t layers, uint32_t kv_heads, const proto::HeadPlan* opened);

  /// For a range of so many keys.
  HeadSetting Get(uint32_t layer, uint32_t kv_head, int64_t range) const;

  /// False: there is none, and never will be.
  bool exists() const { return !settings_.empty() || live_ != nullptr; }
  /// The heads that were planned, as they are now for ranges of so many keys in each layer,
  /// (layers).
  proto::HeadPlan Message(absl::Span<const int64_t> ranges) const;

 private:
  const uint32_t layers_;
  const uint32_t kv_heads_;
  const std::shared_ptr<const proto::HeadPlan> opened_;
  const std::shared_ptr<const LivePlanner> live_;
  std::vector<HeadSetting> settings_;  ///< (layers, kv_heads), of opened_; empty: none
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SESSION_PLAN_H_
