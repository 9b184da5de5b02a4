// How the subcommands reach a daemon.
#ifndef KVSEEK_CLI_CONNECT_H_
#define KVSEEK_CLI_CONNECT_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "client/kv_client.h"

namespace CLI {
class App;
}

namespace kvseek::cli {

struct ConnectFlags {
  std::string via;         ///< "unix:/path", "shm:/path" or "tcp://host:port"
  std::string token_file;  ///< holds the secret that the daemon asks for
  uint32_t spin_us = 0;    ///< ClientOptions::spin
};

/// Adds --via and --token-file.
void AddConnectFlags(CLI::App& command, ConnectFlags& flags, bool required);
/// Adds --spin-us, for commands that measure.
void AddSpinFlag(CLI::App& command, ConnectFlags& flags);
/// Errors name the address.
absl::StatusOr<std::unique_ptr<KvClient>> Connect(const ConnectFlags& flags);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_CONNECT_H_
