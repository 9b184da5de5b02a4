// How a session's KV heads are searched where a request does not say: the head plan that it was
// opened with (proto/head_plan.proto), and what audits have changed in it since
// (service/head_audits.h).
//
// Each head's setting is one atomic word: a search reads it and never waits, and it is always one
// that was planned as a whole.
#ifndef KVSEEK_SERVICE_SESSION_PLAN_H_
#define KVSEEK_SERVICE_SESSION_PLAN_H_

#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "index/built_index.h"
#include "index/key_index.h"
#include "proto/head_plan.pb.h"
#include "proto/kvseek.pb.h"

namespace kvseek::service {

/// The kind of an index that is built in the background; none for the others.
std::optional<index::BuiltKind> BuiltKindOf(proto::IndexKind kind);

/// What a search of one KV head takes from a plan.
struct HeadSetting {
  proto::IndexKind index = proto::INDEX_AUTO;
  uint32_t candidates = 0;  ///< up to index::kMaxCandidates; 0: the daemon's default
  float threshold = 0.0F;   ///< 0: none

  bool operator==(const HeadSetting&) const = default;
};

/// Thread-safe.
class SessionPlan {
 public:
  /// `opened` fits the shape (proto::CheckHeadPlanFits); null: none. `live`: settings will be Set.
  SessionPlan(uint32_t layers, uint32_t kv_heads, std::shared_ptr<const proto::HeadPlan> opened,
              bool live);
  /// The settings as they are now, for a fork.
  SessionPlan(const SessionPlan& other);
  SessionPlan& operator=(const SessionPlan&) = delete;
  ~SessionPlan() = default;

  /// What one with these arguments takes.
  static uint64_t Bytes(uint32_t layers, uint32_t kv_heads, const proto::HeadPlan* opened,
                        bool live);

  HeadSetting Get(uint32_t layer, uint32_t kv_head) const {
    if (settings_.empty()) return {};
    return Unpack(settings_[Place(layer, kv_head)].load(std::memory_order_relaxed));
  }
  /// REQUIRES: live.
  void Set(uint32_t layer, uint32_t kv_head, HeadSetting setting) {
    settings_[Place(layer, kv_head)].store(Pack(setting), std::memory_order_relaxed);
  }

  /// False: there is none, and never will be.
  bool exists() const { return !settings_.empty(); }
  /// The heads that were planned or have been set since, as they are now.
  proto::HeadPlan Message() const;

 private:
  static_assert(index::kMaxCandidates < 1 << 24);
  /// Index in the lowest 8 bits, candidates in the next 24, the threshold's bits in the rest.
  static uint64_t Pack(const HeadSetting& setting) {
    return uint64_t{std::bit_cast<uint32_t>(setting.threshold)} << 32 |
           uint64_t{setting.candidates} << 8 | static_cast<uint64_t>(setting.index);
  }
  static HeadSetting Unpack(uint64_t word) {
    return {static_cast<proto::IndexKind>(word & 0xFF), static_cast<uint32_t>(word >> 8 & 0xFFFFFF),
            std::bit_cast<float>(static_cast<uint32_t>(word >> 32))};
  }

  size_t Place(uint32_t layer, uint32_t kv_head) const {
    return static_cast<size_t>(layer) * kv_heads_ + kv_head;
  }

  const uint32_t kv_heads_;
  const std::shared_ptr<const proto::HeadPlan> opened_;
  std::vector<std::atomic<uint64_t>> settings_;  ///< (layers, kv_heads), packed; empty: no plan
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SESSION_PLAN_H_
