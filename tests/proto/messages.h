// Which message a frame carries, and how tests make bytes of it.
#ifndef KVSEEK_TESTS_PROTO_MESSAGES_H_
#define KVSEEK_TESTS_PROTO_MESSAGES_H_

#include <google/protobuf/message.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/types/span.h"
#include "proto/frame.h"

namespace kvseek::proto {

/// An empty message of the type that a frame with this op and these flags carries; null for an
/// unknown op that is no Error.
std::unique_ptr<google::protobuf::Message> NewMessage(Op op, uint16_t flags);

/// The same bytes for the same message, maps in the order of their keys.
std::string Serialize(const google::protobuf::Message& message);

/// A string's bytes as they travel.
absl::Span<const uint8_t> BytesOf(const std::string& text);

}  // namespace kvseek::proto

#endif  // KVSEEK_TESTS_PROTO_MESSAGES_H_
