#include "service/requests_under_way.h"

namespace kvseek::service {

std::shared_ptr<std::atomic<bool>> RequestsUnderWay::Add(uint64_t id) {
  auto flag = std::make_shared<std::atomic<bool>>(false);
  const std::lock_guard lock(mutex_);
  flags_.emplace(id, flag);
  return flag;
}

void RequestsUnderWay::Remove(uint64_t id) {
  const std::lock_guard lock(mutex_);
  flags_.erase(id);
}

bool RequestsUnderWay::Contains(uint64_t id) const {
  const std::lock_guard lock(mutex_);
  return flags_.contains(id);
}

void RequestsUnderWay::Cancel(uint64_t id) {
  const std::lock_guard lock(mutex_);
  const auto found = flags_.find(id);
  if (found != flags_.end()) found->second->store(true);
}

void RequestsUnderWay::CancelAll() {
  const std::lock_guard lock(mutex_);
  for (const auto& [id, flag] : flags_) flag->store(true);
}

}  // namespace kvseek::service
