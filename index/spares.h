// Objects that come and go with each search or request, and whose memory the next one uses again.
#ifndef KVSEEK_INDEX_SPARES_H_
#define KVSEEK_INDEX_SPARES_H_

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"

namespace kvseek::index {

/// Keeps so many of them; the last given is taken first, since it is most likely to be in a cache.
/// Thread-safe.
template <typename T>
class Spares {
 public:
  explicit Spares(size_t most) { kept_.reserve(most); }

  /// One that was given, as it was then, or a new one.
  std::unique_ptr<T> Take() ABSL_LOCKS_EXCLUDED(mutex_) {
    {
      const std::lock_guard lock(mutex_);
      if (!kept_.empty()) {
        std::unique_ptr<T> taken = std::move(kept_.back());
        kept_.pop_back();
        return taken;
      }
    }
    return std::make_unique<T>();
  }

  void Give(std::unique_ptr<T> given) noexcept ABSL_LOCKS_EXCLUDED(mutex_) {
    const std::lock_guard lock(mutex_);
    if (kept_.size() < kept_.capacity()) kept_.push_back(std::move(given));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<T>> kept_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_SPARES_H_
