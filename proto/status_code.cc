#include "proto/status_code.h"

#include <cassert>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace kvseek::proto {
namespace {

constexpr absl::string_view kFieldUrl = "kvseek/field";
constexpr absl::string_view kRetryAfterUrl = "kvseek/retry_after_ms";
constexpr uint32_t kCodeMax = static_cast<uint32_t>(absl::StatusCode::kUnauthenticated);

// Length of the well-formed UTF-8 sequence that `text` starts with, 0 if it starts with none.
size_t SequenceBytes(absl::string_view text) {
  const auto byte = [text](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  const uint8_t second = byte(1);
  const bool overlong = (lead == 0xe0 && second < 0xa0) || (lead == 0xf0 && second < 0x90);
  const bool surrogate = lead == 0xed && second >= 0xa0;
  const bool too_large = lead == 0xf4 && second >= 0x90;
  return overlong || surrogate || too_large ? 0 : length;
}

// Protobuf refuses to parse a string that is not UTF-8, and an Error must always arrive.
std::string WireText(absl::string_view text, size_t bytes_max) {
  std::string out;
  while (!text.empty()) {
    const size_t length = SequenceBytes(text);
    if (out.size() + (length == 0 ? 1 : length) > bytes_max) break;
    if (length == 0) {
      out.push_back('?');
    } else {
      out.append(text.data(), length);
    }
    text.remove_prefix(length == 0 ? 1 : length);
  }
  return out;
}

void SetText(absl::string_view url, absl::string_view text, absl::Status& status) {
  status.SetPayload(url, absl::Cord(text));
}

std::string GetText(absl::string_view url, const absl::Status& status) {
  const auto payload = status.GetPayload(url);
  return payload.has_value() ? std::string(*payload) : std::string();
}

void SetDetails(absl::string_view field, uint64_t retry_after_ms, absl::Status& status) {
  if (!field.empty()) SetText(kFieldUrl, field, status);
  if (retry_after_ms != 0) SetText(kRetryAfterUrl, absl::StrCat(retry_after_ms), status);
}

}  // namespace

absl::Status FieldError(absl::StatusCode code, absl::string_view field, absl::string_view message) {
  absl::Status status(code,
                      field.empty() ? std::string(message) : absl::StrCat(field, ": ", message));
  SetDetails(field, 0, status);
  return status;
}

absl::Status Exhausted(absl::string_view field, absl::string_view message,
                       uint64_t retry_after_ms) {
  absl::Status status = FieldError(absl::StatusCode::kResourceExhausted, field, message);
  SetDetails("", retry_after_ms, status);
  return status;
}

absl::Status PrefixField(absl::string_view prefix, const absl::Status& status) {
  const std::string field = ErrorField(status);
  if (field.empty()) return status;
  absl::Status prefixed(status.code(), absl::StrCat(prefix, status.message()));
  SetDetails(absl::StrCat(prefix, field), RetryAfterMs(status), prefixed);
  return prefixed;
}

std::string ErrorField(const absl::Status& status) { return GetText(kFieldUrl, status); }

uint64_t RetryAfterMs(const absl::Status& status) {
  uint64_t retry_after_ms = 0;
  if (!absl::SimpleAtoi(GetText(kRetryAfterUrl, status), &retry_after_ms)) return 0;
  return retry_after_ms;
}

Error ToError(const absl::Status& status) {
  assert(!status.ok());
  Error error;
  error.set_code(static_cast<uint32_t>(status.code()));
  error.set_message(WireText(status.message(), kErrorMessageBytesMax));
  error.set_field(WireText(ErrorField(status), kErrorFieldBytesMax));
  error.set_retry_after_ms(RetryAfterMs(status));
  return error;
}

absl::Status FromError(const Error& error) {
  const bool known = error.code() != 0 && error.code() <= kCodeMax;
  absl::Status status(
      known ? static_cast<absl::StatusCode>(error.code()) : absl::StatusCode::kUnknown,
      error.message());
  SetDetails(error.field(), error.retry_after_ms(), status);
  return status;
}

}  // namespace kvseek::proto
