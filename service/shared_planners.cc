#include "service/shared_planners.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "absl/strings/str_cat.h"
#include "service/session.h"

namespace kvseek::service {
namespace {

/// Equal for two sessions if and only if they share.
std::string KeyOf(const SessionSettings& settings) {
  const index::KvShape& kv = settings.kv;
  // Numbers first: none of them can be taken for a part of the name, which may be any bytes.
  return absl::StrCat(settings.layers, " ", settings.kv_heads, " ", settings.query_heads, " ",
                      kv.key_dim, " ", kv.value_dim, " ", static_cast<int>(kv.dtype), " ",
                      kv.scan_bits, " ", std::bit_cast<uint32_t>(kv.softmax_scale), " ",
                      settings.build, " ", static_cast<int>(settings.landmark.summary), " ",
                      settings.landmark.block, " ", std::bit_cast<uint32_t>(settings.error_target),
                      " ", settings.model);
}

}  // namespace

std::shared_ptr<LivePlanner> SharedPlanners::Find(const SessionSettings& settings) {
  if (settings.error_target <= 0.0F) return nullptr;
  const auto make = [&] {
    return std::make_shared<LivePlanner>(settings.layers, settings.kv_heads, settings.error_target,
                                         settings.build);
  };
  if (settings.model.empty() || settings.own_plan || kept_max_ == 0) return make();
  std::string key = KeyOf(settings);
  std::shared_ptr<LivePlanner> evicted;  // let go of without the lock
  const std::lock_guard lock(mutex_);
  const auto found =
      std::find_if(kept_.begin(), kept_.end(), [&](const Kept& kept) { return kept.key == key; });
  if (found != kept_.end()) {
    std::rotate(found, found + 1, kept_.end());
    return kept_.back().planner;
  }
  if (kept_.size() >= kept_max_) evicted = EvictOne();
  kept_.push_back({std::move(key), make()});
  return kept_.back().planner;
}

std::shared_ptr<LivePlanner> SharedPlanners::EvictOne() {
  auto gone = std::find_if(kept_.begin(), kept_.end(), [](const Kept& kept) {
    return kept.planner.use_count() == 1;  // nobody can come to have it while the lock is held
  });
  if (gone == kept_.end()) gone = kept_.begin();
  std::shared_ptr<LivePlanner> planner = std::move(gone->planner);
  kept_.erase(gone);
  ++evicted_;
  return planner;
}

SharedPlanners::Counts SharedPlanners::counts() const {
  const std::lock_guard lock(mutex_);
  Counts counts{.kept = kept_.size(), .evicted = evicted_};
  for (const Kept& kept : kept_) {
    counts.heads += kept.planner->heads();
    counts.audits += kept.planner->audits();
  }
  return counts;
}

}  // namespace kvseek::service
