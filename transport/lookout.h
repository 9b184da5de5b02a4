// Who looks at the shared rings of an io_context's streams, so that their peers need not wake
// anybody by a system call.
//
// A thread that drives the io_context may, before it sleeps in there, look for more work for a
// while. Where it does, it says so here, and calls Look in between. While no thread looks, streams
// that wait ask their peers for a bell.
#ifndef KVSEEK_TRANSPORT_LOOKOUT_H_
#define KVSEEK_TRANSPORT_LOOKOUT_H_

#include <atomic>
#include <mutex>
#include <vector>

#include "absl/base/thread_annotations.h"

namespace kvseek::transport {

class Stream;

/// Thread-safe. Outlives its streams.
class Lookout {
 public:
  Lookout() = default;
  Lookout(const Lookout&) = delete;
  Lookout& operator=(const Lookout&) = delete;

  /// Looks once at all rings, and posts the continuation of whoever waits for what is there now.
  /// Whether there was any. Cheap where there are none.
  bool Look() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Whether there is a stream to look at.
  bool HasStreams() const { return streams_count_.load(std::memory_order_relaxed) != 0; }

  /// From now on a thread more (or less) calls Look again and again.
  void Begin() { looking_.fetch_add(1); }
  void End() ABSL_LOCKS_EXCLUDED(mutex_);
  bool looking() const { return looking_.load() != 0; }

 private:
  friend class Stream;
  void Add(Stream* stream) ABSL_LOCKS_EXCLUDED(mutex_);
  void Remove(Stream* stream) ABSL_LOCKS_EXCLUDED(mutex_);

  std::atomic<int> looking_{0};  ///< threads
  std::atomic<size_t> streams_count_{0};
  std::mutex mutex_;
  std::vector<Stream*> streams_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvseek::transport

#endif  // KVSEEK_TRANSPORT_LOOKOUT_H_
