// What the checks of all requests share: refusals that name a field, and finding a session.
#ifndef KVSEEK_SERVICE_FIELD_CHECKS_H_
#define KVSEEK_SERVICE_FIELD_CHECKS_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "service/session.h"
#include "service/session_store.h"

namespace kvseek::service {

/// invalid_argument naming `field`.
absl::Status Invalid(absl::string_view field, absl::string_view message);
/// invalid_argument naming `field` unless low <= value <= high.
absl::Status CheckBetween(absl::string_view field, uint64_t value, uint64_t low, uint64_t high);
/// invalid_argument naming "payload" unless a request brought as many bytes as expected.
absl::Status CheckPayloadBytes(size_t held, size_t expected);

/// The session that a message's field `session` names, its lease renewed. `field` is its name in
/// the request. invalid_argument: it is missing; other errors as SessionStore::Find.
template <typename Message>
absl::StatusOr<std::shared_ptr<Session>> FindSession(SessionStore& store, const Message& message,
                                                     TimePoint now,
                                                     absl::string_view field = "session") {
  if (!message.has_session()) return Invalid(field, "is missing");
  return store.Find(message.session().boot_id(), message.session().session_id(), field, now);
}

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_FIELD_CHECKS_H_
