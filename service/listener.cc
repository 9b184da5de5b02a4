#include "service/listener.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <cerrno>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace kvseek::service {
namespace {

namespace asio = boost::asio;
using transport::Address;
using ErrorCode = boost::system::error_code;

absl::Status SystemError(const std::string& what, const ErrorCode& error) {
  const std::string message = absl::StrCat(what, ": ", error.message());
  if (error == asio::error::address_in_use) return absl::AlreadyExistsError(message);
  if (error == asio::error::access_denied) return absl::PermissionDeniedError(message);
  return absl::UnavailableError(message);
}

/// Removes a socket file that nobody listens on.
absl::Status RemoveStale(const std::string& path, const asio::any_io_executor& executor) {
  struct stat info {};
  if (lstat(path.c_str(), &info) != 0) {
    if (errno == ENOENT) return absl::OkStatus();
    return absl::PermissionDeniedError(absl::StrCat(path, ": ", std::strerror(errno)));
  }
  if (!S_ISSOCK(info.st_mode)) {
    return absl::AlreadyExistsError(absl::StrCat(path, " is there and is no socket"));
  }
  ErrorCode error;
  asio::local::stream_protocol::socket probe(executor);
  probe.connect(asio::local::stream_protocol::endpoint(path), error);
  if (error != asio::error::connection_refused) {
    return absl::AlreadyExistsError(absl::StrCat("somebody listens on ", path));
  }
  if (unlink(path.c_str()) != 0 && errno != ENOENT) {
    return absl::PermissionDeniedError(absl::StrCat(path, ": ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Listener>> Listener::Open(const asio::any_io_executor& executor,
                                                         const std::string& address) {
  absl::StatusOr<Address> parsed = Address::Parse(address);
  if (!parsed.ok()) return parsed.status();
  if (parsed->kind == Address::Kind::kShared) {
    return absl::InvalidArgumentError(
        absl::StrCat("address: shared memory is asked for over a unix socket: ", address));
  }
  std::unique_ptr<Listener> listener(new Listener(executor));
  const absl::Status opened = parsed->kind == Address::Kind::kUnix
                                  ? listener->OpenUnix(parsed->path)
                                  : listener->OpenTcp(*parsed);
  if (!opened.ok()) return opened;
  return listener;
}

absl::Status Listener::OpenUnix(const std::string& path) {
  absl::Status free = RemoveStale(path, acceptor_.get_executor());
  if (!free.ok()) return free;
  const std::string what = absl::StrCat("listening on unix:", path);
  const asio::local::stream_protocol::endpoint endpoint(path);
  ErrorCode error;
  acceptor_.open(asio::generic::stream_protocol(endpoint.protocol()), error);
  if (error) return SystemError(what, error);
  // The file takes its mode from the socket, so there is no moment at which others may connect.
  if (fchmod(acceptor_.native_handle(), S_IRUSR | S_IWUSR) != 0) {
    return absl::UnavailableError(absl::StrCat(what, ": ", std::strerror(errno)));
  }
  acceptor_.bind(endpoint, error);
  if (error) return SystemError(what, error);
  struct stat info {};
  if (lstat(path.c_str(), &info) == 0) {
    path_ = path;
    device_ = info.st_dev;
    inode_ = info.st_ino;
  }
  acceptor_.listen(asio::socket_base::max_listen_connections, error);
  if (error) return SystemError(what, error);
  address_ = absl::StrCat("unix:", path);
  return absl::OkStatus();
}

absl::Status Listener::OpenTcp(const Address& address) {
  const bool bracket = absl::StrContains(address.host, ":");
  const std::string host = bracket ? absl::StrCat("[", address.host, "]") : address.host;
  const std::string what = absl::StrCat("listening on tcp://", host, ":", address.port);
  ErrorCode error;
  asio::ip::tcp::resolver resolver(acceptor_.get_executor());
  const auto found =
      resolver.resolve(address.host, address.port, asio::ip::tcp::resolver::passive, error);
  if (error) return SystemError(what, error);
  const asio::ip::tcp::endpoint endpoint = *found.begin();
  acceptor_.open(asio::generic::stream_protocol(endpoint.protocol()), error);
  if (error) return SystemError(what, error);
  acceptor_.set_option(asio::socket_base::reuse_address(true), error);
  acceptor_.bind(endpoint, error);
  if (error) return SystemError(what, error);
  acceptor_.listen(asio::socket_base::max_listen_connections, error);
  if (error) return SystemError(what, error);
  sockaddr_storage bound{};
  socklen_t size = sizeof(bound);
  if (getsockname(acceptor_.native_handle(), reinterpret_cast<sockaddr*>(&bound), &size) != 0) {
    return absl::UnavailableError(absl::StrCat(what, ": ", std::strerror(errno)));
  }
  const in_port_t port = bound.ss_family == AF_INET6
                             ? reinterpret_cast<const sockaddr_in6*>(&bound)->sin6_port
                             : reinterpret_cast<const sockaddr_in*>(&bound)->sin_port;
  address_ = absl::StrCat("tcp://", host, ":", ntohs(port));
  return absl::OkStatus();
}

void Listener::Close() {
  ErrorCode ignored;
  acceptor_.close(ignored);
  if (path_.empty()) return;
  struct stat info {};
  if (lstat(path_.c_str(), &info) == 0 && info.st_dev == device_ && info.st_ino == inode_) {
    unlink(path_.c_str());
  }
  path_.clear();
}

Listener::~Listener() { Close(); }

void TuneSocket(transport::Stream::Socket& socket) {
  ErrorCode not_tcp;
  socket.set_option(asio::ip::tcp::no_delay(true), not_tcp);
}

}  // namespace kvseek::service
