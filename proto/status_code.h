// Status codes on the wire: the numbers of absl::StatusCode, which are those of gRPC, with the
// field that was wrong travelling beside the message.
#ifndef KVSEEK_PROTO_STATUS_CODE_H_
#define KVSEEK_PROTO_STATUS_CODE_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "proto/kvseek.pb.h"

namespace kvseek::proto {

/// Longer texts are cut by ToError, so that an Error fits into every peer's metadata limit.
inline constexpr size_t kErrorMessageBytesMax = 4096;
inline constexpr size_t kErrorFieldBytesMax = 256;

/// A status of `code` whose message is "field: message" and which remembers the field.
absl::Status FieldError(absl::StatusCode code, absl::string_view field, absl::string_view message);
/// resource_exhausted that tells the caller when to come again.
absl::Status Exhausted(absl::string_view field, absl::string_view message, uint64_t retry_after_ms);

/// `status` with `prefix` before the field that it names; as it is if it names none.
absl::Status PrefixField(absl::string_view prefix, const absl::Status& status);

/// The field that a status names, "" if none.
std::string ErrorField(const absl::Status& status);
/// Milliseconds after which to come again, 0 if the status does not tell.
uint64_t RetryAfterMs(const absl::Status& status);

/// To the wire and back; both keep code, message, field and retry-after. A code that is not known
/// comes back as unknown, and so does 0: an Error is never a success. ToError makes bytes that are
/// not UTF-8 into '?', since protobuf would refuse them. REQUIRES: !status.ok().
Error ToError(const absl::Status& status);
/// Never ok.
absl::Status FromError(const Error& error);

}  // namespace kvseek::proto

#endif  // KVSEEK_PROTO_STATUS_CODE_H_
