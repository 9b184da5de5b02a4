// Wrong messages made of right ones, for fuzzers above the frame.
#ifndef KVSEEK_TESTS_PROTO_MESSAGE_MUTATOR_H_
#define KVSEEK_TESTS_PROTO_MESSAGE_MUTATOR_H_

#include <google/protobuf/message.h>

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>

namespace kvseek::proto {

/// The same seed makes the same changes with every library.
class MessageMutator {
 public:
  explicit MessageMutator(uint64_t seed) : random_(seed) {}

  /// 0 .. limit - 1; 0 if limit is 0.
  size_t Below(size_t limit) { return limit == 0 ? 0 : static_cast<size_t>(random_() % limit); }
  uint64_t Bits() { return random_(); }

  /// Gives one field, of the message or of one inside it, a value at an edge of its type: still a
  /// message, and often a valid one.
  void ChangeField(google::protobuf::Message& message);
  /// Flips, replaces, inserts, removes or cuts bytes.
  void ChangeBytes(std::string& bytes);

 private:
  void ChangeScalar(google::protobuf::Message& message,
                    const google::protobuf::FieldDescriptor& field, bool repeated);
  uint64_t EdgeNumber();

  std::mt19937_64 random_;
};

}  // namespace kvseek::proto

#endif  // KVSEEK_TESTS_PROTO_MESSAGE_MUTATOR_H_
