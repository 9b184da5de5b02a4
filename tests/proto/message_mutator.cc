#include "tests/proto/message_mutator.h"

#include <google/protobuf/descriptor.h>

#include <algorithm>
#include <bit>
#include <iterator>
#include <limits>

namespace kvseek::proto {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

constexpr uint64_t kEdges[] = {0,
                               1,
                               2,
                               3,
                               7,
                               8,
                               63,
                               64,
                               65,
                               1023,
                               1024,
                               1025,
                               (1U << 16) - 1,
                               1U << 16,
                               (1U << 20) + 1,
                               (1U << 31) - 1,
                               1U << 31,
                               std::numeric_limits<uint32_t>::max(),
                               uint64_t{1} << 32,
                               uint64_t{1} << 62,
                               (uint64_t{1} << 63) - 1,
                               uint64_t{1} << 63,
                               std::numeric_limits<uint64_t>::max()};

}  // namespace

uint64_t MessageMutator::EdgeNumber() {
  return Below(8) == 0 ? random_() : kEdges[Below(std::size(kEdges))];
}

void MessageMutator::ChangeScalar(Message& message, const FieldDescriptor& field, bool repeated) {
  const Reflection& reflection = *message.GetReflection();
  // Both a new value of a plain field and one more of a repeated one.
  const auto put = [&](auto set, auto add, auto value) {
    (reflection.*(repeated ? add : set))(&message, &field, value);
  };
  const uint64_t number = EdgeNumber();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT32:
      return put(&Reflection::SetUInt32, &Reflection::AddUInt32, static_cast<uint32_t>(number));
    case FieldDescriptor::CPPTYPE_UINT64:
      return put(&Reflection::SetUInt64, &Reflection::AddUInt64, number);
    case FieldDescriptor::CPPTYPE_FLOAT:
      return put(&Reflection::SetFloat, &Reflection::AddFloat,
                 std::bit_cast<float>(static_cast<uint32_t>(random_())));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return put(&Reflection::SetDouble, &Reflection::AddDouble, std::bit_cast<double>(random_()));
    case FieldDescriptor::CPPTYPE_BOOL:
      return put(&Reflection::SetBool, &Reflection::AddBool, (number & 1U) != 0);
    case FieldDescriptor::CPPTYPE_ENUM:
      return put(&Reflection::SetEnumValue, &Reflection::AddEnumValue, static_cast<int>(number));
    case FieldDescriptor::CPPTYPE_STRING:
      return put(&Reflection::SetString, &Reflection::AddString,
                 std::string(std::min<uint64_t>(number, 2000), 's'));
    default:
      return;  // the protocol has no others
  }
}

void MessageMutator::ChangeField(Message& message) {
  const auto& descriptor = *message.GetDescriptor();
  if (descriptor.field_count() == 0) return;
  const Reflection& reflection = *message.GetReflection();
  const FieldDescriptor& field =
      *descriptor.field(static_cast<int>(Below(static_cast<size_t>(descriptor.field_count()))));
  const bool is_message = field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
  if (field.is_repeated()) {
    const int size = reflection.FieldSize(message, &field);
    const size_t choice = Below(6);
    if (choice == 0 && size > 0) return reflection.RemoveLast(&message, &field);
    if (choice == 1) return reflection.ClearField(&message, &field);
    if (!is_message) return ChangeScalar(message, field, true);
    if (field.is_map()) return;
    if (choice == 2 && size > 0) {  // one more of what is there
      const std::string copy =
          reflection.GetRepeatedMessage(message, &field, 0).SerializeAsString();
      reflection.AddMessage(&message, &field)->ParseFromString(copy);
      return;
    }
    if (size == 0) {
      reflection.AddMessage(&message, &field);
      return;
    }
    const int at = static_cast<int>(Below(static_cast<size_t>(size)));
    return ChangeField(*reflection.MutableRepeatedMessage(&message, &field, at));
  }
  if (Below(8) == 0) return reflection.ClearField(&message, &field);
  if (is_message) return ChangeField(*reflection.MutableMessage(&message, &field));
  ChangeScalar(message, field, false);
}

void MessageMutator::ChangeBytes(std::string& bytes) {
  if (bytes.empty()) {
    bytes.push_back(static_cast<char>(random_()));
    return;
  }
  const size_t at = Below(bytes.size());
  switch (Below(5)) {
    case 0:
      bytes[at] = static_cast<char>(static_cast<unsigned char>(bytes[at]) ^ (1U << Below(8)));
      break;
    case 1:
      bytes[at] = static_cast<char>(random_());
      break;
    case 2:
      bytes.insert(at, 1 + Below(8), static_cast<char>(random_()));
      break;
    case 3:
      bytes.erase(at, 1 + Below(8));
      break;
    default:
      bytes.resize(at);
  }
}

}  // namespace kvseek::proto
