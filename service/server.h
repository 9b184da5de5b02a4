// The daemon's network side: listens, accepts, and gives each connection its life. Knows frames and
// no operations: requests go to a Dispatch function, which is RequestHandler::Handle in the daemon
// and a script in tests.
#ifndef KVSEEK_SERVICE_SERVER_H_
#define KVSEEK_SERVICE_SERVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "service/options.h"
#include "service/request_handler.h"

namespace kvseek::service {

class ComputePool;
class Doorbells;

/// Answers one request: calls the second argument exactly once, at any time and on any thread.
using Dispatch = std::function<void(Request, std::function<void(Response)>)>;

/// What a hello is answered with, beside the limits.
struct ServerIdentity {
  uint64_t boot_id = 0;
  std::string server{};  ///< name and version
  std::string simd_level{};
};

/// Thread-safe.
class Server {
 public:
  /// Listens on options.listen and serves from then on. Without `doorbells`, which are to be there
  /// until Stop has returned, open_doorbell is refused. Io threads that look for work
  /// (options.io_spin) are guests of `pool`, if it is not null. Errors: invalid_argument (an
  /// address, or none), already_exists (in use), permission_denied, unavailable.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const DaemonOptions& options,
                                                       ServerIdentity identity, Dispatch dispatch,
                                                       Doorbells* doorbells = nullptr,
                                                       ComputePool* pool = nullptr);
  /// Stops.
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  /// Where it listens, in the order of options.listen, with real ports.
  const std::vector<std::string>& addresses() const;
  /// Connections being served.
  uint64_t connections_open() const;

  /// Accepts no more and reads no more, waits up to options.shutdown_grace for requests under way
  /// and their answers to leave, then cancels what is left and closes. When it returns, every call
  /// of Dispatch has been answered.
  void Stop();

 private:
  class Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SERVER_H_
