#include "service/field_checks.h"

#include "absl/strings/str_cat.h"
#include "proto/status_code.h"

namespace kvseek::service {

absl::Status Invalid(absl::string_view field, absl::string_view message) {
  return proto::FieldError(absl::StatusCode::kInvalidArgument, field, message);
}

absl::Status CheckBetween(absl::string_view field, uint64_t value, uint64_t low, uint64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Invalid(field, absl::StrCat("must be between ", low, " and ", high, ", not ", value));
}

absl::Status CheckPayloadBytes(size_t held, size_t expected) {
  if (held == expected) return absl::OkStatus();
  return Invalid("payload", absl::StrCat("must have ", expected, " bytes, not ", held));
}

}  // namespace kvseek::service
