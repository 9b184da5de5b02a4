// Where a daemon listens, and how a client reaches it.
#ifndef KVSEEK_TRANSPORT_ADDRESS_H_
#define KVSEEK_TRANSPORT_ADDRESS_H_

#include <string>

#include "absl/status/statusor.h"

namespace kvseek::transport {

/// "unix:/path", "tcp://host:port", "tcp://[v6 address]:port", or "shm:/path of a unix socket",
/// taken apart.
struct Address {
  enum class Kind { kUnix, kTcp, kShared };
  Kind kind = Kind::kUnix;
  std::string path{};  ///< of the socket: unix, shared
  std::string host{};  ///< tcp
  std::string port{};

  /// invalid_argument for anything else.
  static absl::StatusOr<Address> Parse(const std::string& text);
};

}  // namespace kvseek::transport

#endif  // KVSEEK_TRANSPORT_ADDRESS_H_
