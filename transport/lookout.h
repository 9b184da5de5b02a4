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
  /// `resumes_here`: only threads that have the io_context to themselves look, so that Look may go
  /// on with a coroutine itself, outside of the io_context, whose own way there has system calls.
  explicit Lookout(bool resumes_here) : resumes_here_(resumes_here) {}
  Lookout(const Lookout&) = delete;
  Lookout& operator=(const Lookout&) = delete;

  /// Looks once at all rings, and resumes whoever waits for what is there now. Whether there was
  /// any. Cheap where there are none.
  bool Look() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Whether there is a stream to look at.
  bool HasStreams() const { return streams_count_.load(std::memory_order_relaxed) != 0; }

  /// While it lives, a thread calls Look again and again.
  class Watch {
   public:
    explicit Watch(Lookout& lookout) : lookout_(lookout) { lookout_.looking_.fetch_add(1); }
    ~Watch() { lookout_.End(); }
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;

   private:
    Lookout& lookout_;
  };
  bool looking() const { return looking_.load() != 0; }

 private:
  friend class Stream;
  void End() ABSL_LOCKS_EXCLUDED(mutex_);
  void Add(Stream* stream) ABSL_LOCKS_EXCLUDED(mutex_);
  void Remove(Stream* stream) ABSL_LOCKS_EXCLUDED(mutex_);

  const bool resumes_here_;
  std::atomic<int> looking_{0};  ///< threads
  std::atomic<size_t> streams_count_{0};
  std::mutex mutex_;
  std::vector<Stream*> streams_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvseek::transport

#endif  // KVSEEK_TRANSPORT_LOOKOUT_H_
