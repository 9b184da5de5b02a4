// Fields of a message, written as protobuf does, straight to bytes: for answers that leave every
// few hundred microseconds, where making message objects of what is written once takes longer than
// writing it. Field numbers are those of the generated classes, which read what is written here.
//
// Each function writes one field at `to`, where there must be room, and returns the end of it. What
// is proto3's default, 0 or nothing, is not written. Pure, noexcept, allocate nothing.
#ifndef KVSEEK_PROTO_FIELD_WRITER_H_
#define KVSEEK_PROTO_FIELD_WRITER_H_

#include <cstdint>

#include "absl/types/span.h"

namespace kvseek::proto {

/// uint32, uint64, bool or an enum: up to 5 bytes of tag and 10 of the number.
uint8_t* WriteNumber(int field, uint64_t value, uint8_t* to) noexcept;
/// Repeated uint32, packed: up to 10 bytes and 5 for each.
uint8_t* WriteNumbers(int field, absl::Span<const uint32_t> values, uint8_t* to) noexcept;
/// Repeated float, packed: up to 10 bytes and 4 for each.
uint8_t* WriteFloats(int field, absl::Span<const float> values, uint8_t* to) noexcept;
/// A message of whose fields these are the bytes, also one of none; bytes; or a string: up to 10
/// bytes and these.
uint8_t* WriteBytes(int field, absl::Span<const uint8_t> bytes, uint8_t* to) noexcept;

}  // namespace kvseek::proto

#endif  // KVSEEK_PROTO_FIELD_WRITER_H_
