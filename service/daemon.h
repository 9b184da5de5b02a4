// A whole daemon in one object: memory, sessions, compute threads, request handler and sockets, put
// together in the order in which they need each other. kvseekd is this and a command line; tests
// run it in their own process.
#ifndef KVSEEK_SERVICE_DAEMON_H_
#define KVSEEK_SERVICE_DAEMON_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "service/options.h"

namespace kvseek::service {

/// Thread-safe.
class Daemon {
 public:
  /// Serves from then on. Errors: those of Server::Start, and invalid_argument for options that
  /// make no sense.
  static absl::StatusOr<std::unique_ptr<Daemon>> Start(const DaemonOptions& options);
  /// Stops.
  ~Daemon();
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  /// Where it listens, with real ports.
  const std::vector<std::string>& addresses() const;
  uint64_t boot_id() const;
  /// Gives requests under way options.shutdown_grace, then ends them and closes all connections.
  void Stop();

 private:
  class Impl;
  explicit Daemon(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_DAEMON_H_
