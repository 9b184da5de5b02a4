// A session: one sequence's KV cache, layer by layer.
#ifndef KVSEEK_SERVICE_SESSION_H_
#define KVSEEK_SERVICE_SESSION_H_

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "index/built_index.h"
#include "index/segment.h"
#include "service/layer_cache.h"
#include "service/live_planner.h"
#include "service/memory_budget.h"
#include "service/session_plan.h"

namespace kvseek::service {

using TimePoint = std::chrono::steady_clock::time_point;

/// What a session is made with; never changes.
struct SessionSettings {
  uint32_t layers = 0;
  uint32_t kv_heads = 0;
  uint32_t query_heads = 0;
  index::KvShape kv;
  std::string name;
  std::chrono::milliseconds lease{0};
  uint32_t build = 0;  ///< a bit for each BuiltKind that is to be built in the background
  std::shared_ptr<const proto::HeadPlan> plan{};  ///< checked; null: none
  float error_target = 0.0F;                      ///< 0: audits change no plan
  index::LandmarkOptions landmark{};              ///< how landmark is built, where it is
  std::string model{};    ///< sessions of one share a planner; empty: this has its own
  bool own_plan = false;  ///< `plan` came with the request, not from the daemon

  int Group() const { return static_cast<int>(query_heads / kv_heads); }
  bool Builds(index::BuiltKind kind) const {
    return (build >> static_cast<uint32_t>(kind) & 1U) != 0;
  }
  bool TakesLandmarks() const {
    return Builds(index::BuiltKind::kLandmark) &&
           landmark.summary == index::LandmarkSummary::kGiven;
  }
  /// The index learns from queries.
  bool Learns(index::BuiltKind kind) const {
    return kind != index::BuiltKind::kLandmark || landmark.summary == index::LandmarkSummary::kMean;
  }
  /// One of the indexes to be built does.
  bool Learns() const {
    for (int kind = 0; kind < index::kBuiltKinds; ++kind) {
      const auto each = static_cast<index::BuiltKind>(kind);
      if (Builds(each) && Learns(each)) return true;
    }
    return false;
  }
};

/// Thread-safe. Lives as long as anybody works with it, even when it has been closed meanwhile.
class Session {
 public:
  /// What a session starts with: (layers), its plan, and what plans it further (null: nothing).
  struct Start {
    std::vector<std::shared_ptr<const LayerState>> layers;
    std::shared_ptr<const SessionPlan> plan;
    std::shared_ptr<LivePlanner> planner;
  };

  /// `memory`: BookkeepingBytes.
  Session(uint64_t id, SessionSettings settings, MemoryBudget::Reservation memory, Start start,
          TimePoint now);

  /// Bytes that a session takes without keys and values.
  static uint64_t BookkeepingBytes(const SessionSettings& settings);
  /// Bytes of keys, values, codes and landmarks of so many tokens in every layer.
  static uint64_t KvBytes(const SessionSettings& settings, int64_t tokens);

  uint64_t id() const { return id_; }
  const SessionSettings& settings() const { return settings_; }

  const std::shared_ptr<const SessionPlan>& plan() const { return plan_; }
  /// Null without an error_target. Others may have it too; it refers to no session.
  const std::shared_ptr<LivePlanner>& planner() const { return planner_; }

  /// A consistent look at one layer. REQUIRES: layer < settings().layers, also below.
  std::shared_ptr<const LayerState> State(uint32_t layer) const { return layers_[layer]->State(); }
  /// See LayerCache::Append. Appends to different layers run side by side.
  absl::StatusOr<int64_t> Append(uint32_t layer, const LayerRows& rows, MemoryBudget& budget,
                                 Worker worker) ABSL_LOCKS_EXCLUDED(shorten_mutex_);
  /// See LayerCache::Publish.
  bool Publish(uint32_t layer, size_t head, index::BuiltKind kind,
               std::shared_ptr<const index::BuiltIndex> built, const LayerState& source)
      ABSL_LOCKS_EXCLUDED(shorten_mutex_);
  /// See LayerCache::Learn.
  absl::Status Learn(uint32_t layer, const SampledQueries& queries, MemoryBudget& budget)
      ABSL_LOCKS_EXCLUDED(shorten_mutex_);
  TrafficQueries& Traffic(uint32_t layer) { return layers_[layer]->traffic(); }
  /// One place in the queue of builds for each layer. True if it is taken already.
  bool TakeBuildPlace(uint32_t layer) { return layers_[layer]->build_queued().exchange(true); }
  void GiveBuildPlaceBack(uint32_t layer) { layers_[layer]->build_queued().store(false); }
  SelectionMemory& Selections(uint32_t layer) { return layers_[layer]->selections(); }
  /// Where appends to a layer queue up.
  Strand& AppendStrand(uint32_t layer) { return layers_[layer]->strand(); }

  /// Keeps the first `tokens` tokens of every layer, all or nothing. invalid_argument naming
  /// "tokens" when no layer has so many; resource_exhausted: a cut through a segment copies up to
  /// 1023 tokens a head.
  absl::Status Truncate(uint64_t tokens, MemoryBudget& budget) ABSL_LOCKS_EXCLUDED(shorten_mutex_);
  /// The states that Truncate would leave behind, or all as they are (no `tokens`); changes
  /// nothing.
  absl::StatusOr<std::vector<std::shared_ptr<const LayerState>>> States(const uint64_t* tokens,
                                                                        MemoryBudget& budget) const;

  /// Bytes of keys, values, codes, landmarks, built indexes and selections, shared or not.
  uint64_t Bytes() const;

  /// Renews the lease.
  void Touch(TimePoint now) { last_used_.store(now, std::memory_order_relaxed); }
  TimePoint last_used() const { return last_used_.load(std::memory_order_relaxed); }
  bool Expired(TimePoint now) const { return now - last_used() > settings_.lease; }

 private:
  const uint64_t id_;
  const SessionSettings settings_;
  const MemoryBudget::Reservation memory_;
  const std::shared_ptr<const SessionPlan> plan_;
  const std::shared_ptr<LivePlanner> planner_;
  std::shared_mutex shorten_mutex_;  ///< shared by appends, exclusive for Truncate
  /// Segments are made on these, so many at a time, beside the decoder's steps: all of a step's in
  /// less than kSealDelay steps, and a search finds most workers free.
  std::array<Strand, 4> sealing_;
  std::vector<std::unique_ptr<LayerCache>> layers_;
  std::atomic<TimePoint> last_used_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SESSION_H_
