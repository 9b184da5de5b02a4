#include "transport/lookout.h"

#include <algorithm>
#include <functional>

#include "transport/stream.h"

namespace kvseek::transport {

bool Lookout::Look() {
  if (!HasStreams()) return false;
  std::vector<std::function<void(bool)>> found;
  {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return false;  // another thread is at it
    for (Stream* const stream : streams_) stream->Look(found);
  }
  // Without the lock: streams may go.
  for (const auto& resume : found) resume(resumes_here_);
  return !found.empty();
}

void Lookout::End() {
  if (looking_.fetch_sub(1) != 1) return;
  std::vector<std::function<void(bool)>> found;
  {
    const std::lock_guard lock(mutex_);
    for (Stream* const stream : streams_) stream->Look(found);
  }
  for (const auto& resume : found) resume(/*here=*/false);
}

void Lookout::Add(Stream* stream) {
  const std::lock_guard lock(mutex_);
  streams_.push_back(stream);
  streams_count_.store(streams_.size(), std::memory_order_relaxed);
}

void Lookout::Remove(Stream* stream) {
  const std::lock_guard lock(mutex_);
  std::erase(streams_, stream);
  streams_count_.store(streams_.size(), std::memory_order_relaxed);
}

}  // namespace kvseek::transport
