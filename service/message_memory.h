// Where a request's message is parsed, or an answer's is made.
#ifndef KVSEEK_SERVICE_MESSAGE_MEMORY_H_
#define KVSEEK_SERVICE_MESSAGE_MEMORY_H_

#include <google/protobuf/arena.h>

#include <cstddef>

#include "index/scratch.h"

namespace kvseek::service {

/// Holds messages of the usual size in a scratch's memory, without allocating. Not thread-safe.
class MessageMemory {
 public:
  /// The scratch must not be reset while this lives.
  explicit MessageMemory(index::Scratch& scratch)
      : arena_(scratch.Take<char>(kUsualBytes), kUsualBytes) {}

  /// An empty message, which lives as long as this.
  template <typename Message>
  Message& New() {
    return *google::protobuf::Arena::CreateMessage<Message>(&arena_);
  }

 private:
  static constexpr size_t kUsualBytes = 4096;

  google::protobuf::Arena arena_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_MESSAGE_MEMORY_H_
