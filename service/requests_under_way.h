// The requests of one connection that are under way, by id: what a cancel looks up.
#ifndef KVSEEK_SERVICE_REQUESTS_UNDER_WAY_H_
#define KVSEEK_SERVICE_REQUESTS_UNDER_WAY_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"

namespace kvseek::service {

/// Thread-safe: the connection adds requests, and whoever has answered one removes it *before* the
/// answer leaves, since the peer may use the id again as soon as it has the answer.
class RequestsUnderWay {
 public:
  /// Takes up a request. Returns its flag, which cancelling sets; REQUIRES: !Contains(id).
  std::shared_ptr<std::atomic<bool>> Add(uint64_t id);
  void Remove(uint64_t id);
  bool Contains(uint64_t id) const;
  /// Nothing, if there is no such request.
  void Cancel(uint64_t id);
  void CancelAll();

 private:
  mutable std::mutex mutex_;
  absl::flat_hash_map<uint64_t, std::shared_ptr<std::atomic<bool>>> flags_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_REQUESTS_UNDER_WAY_H_
