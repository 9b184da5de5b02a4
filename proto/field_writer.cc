#include "proto/field_writer.h"

#include <google/protobuf/io/coded_stream.h>

#include <bit>
#include <cstring>

namespace kvseek::proto {
namespace {

using google::protobuf::io::CodedOutputStream;

static_assert(std::endian::native == std::endian::little);

enum WireType : uint32_t { kVarint = 0, kLengthDelimited = 2 };

uint8_t* WriteTag(int field, WireType type, uint8_t* to) {
  return CodedOutputStream::WriteTagToArray(static_cast<uint32_t>(field) << 3 | type, to);
}

/// What stands before so many bytes.
uint8_t* WriteLength(int field, size_t bytes, uint8_t* to) {
  to = WriteTag(field, kLengthDelimited, to);
  return CodedOutputStream::WriteVarint32ToArray(static_cast<uint32_t>(bytes), to);
}

uint8_t* Copy(const void* from, size_t bytes, uint8_t* to) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return to + bytes;
}

}  // namespace

uint8_t* WriteNumber(int field, uint64_t value, uint8_t* to) noexcept {
  if (value == 0) return to;
  return CodedOutputStream::WriteVarint64ToArray(value, WriteTag(field, kVarint, to));
}

uint8_t* WriteNumbers(int field, absl::Span<const uint32_t> values, uint8_t* to) noexcept {
  if (values.empty()) return to;
  size_t bytes = 0;
  for (const uint32_t value : values) bytes += CodedOutputStream::VarintSize32(value);
  to = WriteLength(field, bytes, to);
  for (const uint32_t value : values) to = CodedOutputStream::WriteVarint32ToArray(value, to);
  return to;
}

uint8_t* WriteFloats(int field, absl::Span<const float> values, uint8_t* to) noexcept {
  if (values.empty()) return to;
  const size_t bytes = values.size() * sizeof(float);
  return Copy(values.data(), bytes, WriteLength(field, bytes, to));
}

uint8_t* WriteBytes(int field, absl::Span<const uint8_t> bytes, uint8_t* to) noexcept {
  return Copy(bytes.data(), bytes.size(), WriteLength(field, bytes.size(), to));
}

}  // namespace kvseek::proto
