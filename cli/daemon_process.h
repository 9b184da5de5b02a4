// kvseekd as a child process: started on a unix socket in a fresh temporary directory, stopped with
// SIGTERM.
#ifndef KVSEEK_CLI_DAEMON_PROCESS_H_
#define KVSEEK_CLI_DAEMON_PROCESS_H_

#include <sys/types.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvseek::cli {

/// A directory of a fresh name under the system's temporary one, readable by this user only; goes
/// with the object.
class TemporaryDirectory {
 public:
  static absl::StatusOr<std::unique_ptr<TemporaryDirectory>> Make();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  explicit TemporaryDirectory(std::filesystem::path path) : path_(std::move(path)) {}
  std::filesystem::path path_;
};

/// Not thread-safe.
class DaemonProcess {
 public:
  /// Runs `program` with `flags` and waits until it serves. The error says why it does not: what it
  /// wrote, or its exit code.
  static absl::StatusOr<std::unique_ptr<DaemonProcess>> Start(
      const std::string& program, const std::vector<std::string>& flags);
  /// Kills it if it still runs.
  ~DaemonProcess();
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;

  const std::string& address() const { return address_; }
  pid_t pid() const { return pid_; }

  /// SIGTERM, then waits for its end; an error unless its exit code is 0.
  absl::Status Stop();

 private:
  DaemonProcess() = default;
  absl::Status Spawn(const std::string& program, const std::vector<std::string>& flags);
  absl::Status WaitReady();
  /// Waits for the process to end; false if it does not in time.
  bool WaitEnd(int* wait_status);
  std::string LogTail() const;

  std::unique_ptr<TemporaryDirectory> directory_;
  std::string address_;
  pid_t pid_ = -1;
  int ready_fd_ = -1;  // its stdout
};

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_DAEMON_PROCESS_H_
