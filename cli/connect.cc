#include "cli/connect.h"

#include <CLI/CLI.hpp>
#include <chrono>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace kvseek::cli {

void AddConnectFlags(CLI::App& command, ConnectFlags& flags, bool required) {
  CLI::Option* via =
      command
          .add_option("--via", flags.via,
                      "Address of a daemon: unix:/path, shm:/path of a unix socket, or "
                      "tcp://host:port")
          ->required(required);
  command.add_option("--token-file", flags.token_file, "File with the daemon's shared secret")
      ->check(CLI::ExistingFile)
      ->needs(via);
}

void AddSpinFlag(CLI::App& command, ConnectFlags& flags) {
  command
      .add_option("--spin-us", flags.spin_us,
                  "Microseconds that a connection's thread looks for answers before it sleeps")
      ->check(CLI::Range(0U, 1'000'000U))
      ->capture_default_str();
}

absl::StatusOr<std::unique_ptr<KvClient>> Connect(const ConnectFlags& flags) {
  ClientOptions options;
  options.address = flags.via;
  options.spin = std::chrono::microseconds(flags.spin_us);
  if (!flags.token_file.empty()) {
    std::ifstream file(flags.token_file);
    options.token.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    while (options.token.ends_with('\n') || options.token.ends_with('\r')) {
      options.token.pop_back();
    }
  }
  absl::StatusOr<std::unique_ptr<KvClient>> client = KvClient::Connect(options);
  if (client.ok()) return client;
  return absl::Status(client.status().code(),
                      absl::StrCat(flags.via, ": ", client.status().message()));
}

}  // namespace kvseek::cli
