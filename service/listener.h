// Listening sockets of the server: unix sockets and TCP behind one socket type.
#ifndef KVSEEK_SERVICE_LISTENER_H_
#define KVSEEK_SERVICE_LISTENER_H_

#include <sys/types.h>

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/basic_socket_acceptor.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transport/address.h"
#include "transport/stream.h"

namespace kvseek::service {

using Acceptor = boost::asio::basic_socket_acceptor<boost::asio::generic::stream_protocol>;

/// A listening socket. Used by one thread at a time.
class Listener {
 public:
  /// Listens. A unix socket file gets mode 0600; one that is there already is replaced only if it
  /// is a socket and nobody listens on it. Port 0 picks a free one. Errors: invalid_argument
  /// (address), already_exists (in use), permission_denied, unavailable (anything else that the
  /// system refuses).
  static absl::StatusOr<std::unique_ptr<Listener>> Open(
      const boost::asio::any_io_executor& executor, const std::string& address);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  /// Accepts no more; removes the socket file if it is still the one that Open made.
  void Close();

  Acceptor& acceptor() { return acceptor_; }
  /// Where it listens, with the real port.
  const std::string& address() const { return address_; }

 private:
  explicit Listener(const boost::asio::any_io_executor& executor) : acceptor_(executor) {}
  absl::Status OpenUnix(const std::string& path);
  absl::Status OpenTcp(const transport::Address& address);

  Acceptor acceptor_;
  std::string address_;
  std::string path_;  ///< of the socket file, "" for tcp
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

/// Settings of an accepted socket: no Nagle delay on TCP.
void TuneSocket(transport::Stream::Socket& socket);

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_LISTENER_H_
