// Bounds the memory of requests that wait or are under way: the daemon reads no more than it can
// hold.
#ifndef KVSEEK_SERVICE_BYTE_GATE_H_
#define KVSEEK_SERVICE_BYTE_GATE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <utility>

#include "absl/base/thread_annotations.h"

namespace kvseek::service {

/// Bounds the bytes of requests that all connections hold; readers past the bound wait in line.
/// Thread-safe.
class ByteGate {
 public:
  explicit ByteGate(uint64_t bytes_max) : bytes_max_(bytes_max) {}

  /// Takes `bytes`; false if they are not there or others wait. More than the bound is let through
  /// alone.
  bool TryTake(uint64_t bytes);
  /// Takes `bytes` when it is the caller's turn and then calls `taken`, perhaps at once and on
  /// another thread.
  void Take(uint64_t bytes, std::function<void()> taken);
  void Release(uint64_t bytes);

 private:
  struct Waiter {
    uint64_t bytes;
    std::function<void()> taken;
  };
  bool Fits(uint64_t bytes) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return used_ == 0 || (used_ <= bytes_max_ && bytes <= bytes_max_ - used_);
  }

  const uint64_t bytes_max_;
  std::mutex mutex_;
  uint64_t used_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<Waiter> waiters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_BYTE_GATE_H_
