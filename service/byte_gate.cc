#include "service/byte_gate.h"

#include <vector>

namespace kvseek::service {

bool ByteGate::TryTake(uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  if (!waiters_.empty() || !Fits(bytes)) return false;
  used_ += bytes;
  return true;
}

void ByteGate::Take(uint64_t bytes, std::function<void()> taken) {
  {
    const std::lock_guard lock(mutex_);
    if (!waiters_.empty() || !Fits(bytes)) {
      waiters_.push_back({bytes, std::move(taken)});
      return;
    }
    used_ += bytes;
  }
  taken();
}

void ByteGate::Release(uint64_t bytes) {
  std::vector<std::function<void()>> let_through;
  {
    const std::lock_guard lock(mutex_);
    used_ -= bytes;
    while (!waiters_.empty() && Fits(waiters_.front().bytes)) {
      used_ += waiters_.front().bytes;
      let_through.push_back(std::move(waiters_.front().taken));
      waiters_.pop_front();
    }
  }
  for (const std::function<void()>& taken : let_through) taken();
}

}  // namespace kvseek::service
