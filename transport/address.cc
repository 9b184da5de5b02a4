#include "transport/address.h"

#include <sys/un.h>

#include <cstdint>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace kvseek::transport {
namespace {

constexpr size_t kUnixPathMax = sizeof(sockaddr_un::sun_path) - 1;

}  // namespace

absl::StatusOr<Address> Address::Parse(const std::string& text) {
  Address address;
  const bool is_unix = absl::StartsWith(text, "unix:");
  if (is_unix || absl::StartsWith(text, "shm:")) {
    address.kind = is_unix ? Kind::kUnix : Kind::kShared;
    address.path = text.substr(text.find(':') + 1);
    if (address.path.empty() || address.path.size() > kUnixPathMax) {
      return absl::InvalidArgumentError(
          absl::StrCat("address: a socket path has 1 to ", kUnixPathMax, " bytes: ", text));
    }
    return address;
  }
  const size_t colon = text.rfind(':');
  uint32_t port = 0;
  if (!absl::StartsWith(text, "tcp://") || colon == std::string::npos || colon <= 6 ||
      !absl::SimpleAtoi(text.substr(colon + 1), &port) || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("address: not unix:/path, shm:/path or tcp://host:port: ", text));
  }
  address.kind = Kind::kTcp;
  address.host = text.substr(6, colon - 6);
  address.port = std::to_string(port);
  if (address.host.size() > 2 && address.host.front() == '[' && address.host.back() == ']') {
    address.host = address.host.substr(1, address.host.size() - 2);
  }
  return address;
}

}  // namespace kvseek::transport
