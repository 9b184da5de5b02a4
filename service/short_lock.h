// Locking where many threads take turns of well under a microsecond.
#ifndef KVSEEK_SERVICE_SHORT_LOCK_H_
#define KVSEEK_SERVICE_SHORT_LOCK_H_

#include <mutex>

#include "transport/pause.h"

namespace kvseek::service {

/// Locks `mutex`, whose holders soon give it back. A std::mutex that is not free at once puts the
/// thread to sleep, and waking it takes longer than a hundred turns; so this looks a few
/// microseconds before it sleeps.
inline std::unique_lock<std::mutex> LockShortly(std::mutex& mutex) {
  constexpr int kLooks = 64;
  for (int i = 0; i < kLooks; ++i) {
    if (mutex.try_lock()) return {mutex, std::adopt_lock};
    transport::Pause();
  }
  return std::unique_lock<std::mutex>(mutex);
}

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SHORT_LOCK_H_
