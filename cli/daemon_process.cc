#include "cli/daemon_process.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fstream>
#include <iterator>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

extern char** environ;

namespace kvseek::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kReadyTimeout{20};
constexpr std::chrono::seconds kEndTimeout{20};
constexpr size_t kLogTailBytes = 2000;

absl::Status SystemError(const std::string& what, int error) {
  return absl::UnavailableError(absl::StrCat(what, ": ", std::strerror(error)));
}

std::string EndText(int wait_status) {
  if (WIFSIGNALED(wait_status)) return absl::StrCat("was ended by signal ", WTERMSIG(wait_status));
  return absl::StrCat("ended with exit code ", WEXITSTATUS(wait_status));
}

}  // namespace

absl::StatusOr<std::unique_ptr<TemporaryDirectory>> TemporaryDirectory::Make() {
  std::error_code error;
  const std::filesystem::path base = std::filesystem::temp_directory_path(error);
  if (error)
    return absl::UnavailableError(absl::StrCat("no temporary directory: ", error.message()));
  std::string path = (base / "kvseek-XXXXXX").string();
  if (mkdtemp(path.data()) == nullptr) return SystemError(path, errno);
  return std::unique_ptr<TemporaryDirectory>(new TemporaryDirectory(path));
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

absl::StatusOr<std::unique_ptr<DaemonProcess>> DaemonProcess::Start(
    const std::string& program, const std::vector<std::string>& flags) {
  std::unique_ptr<DaemonProcess> process(new DaemonProcess());
  absl::StatusOr<std::unique_ptr<TemporaryDirectory>> directory = TemporaryDirectory::Make();
  if (!directory.ok()) return directory.status();
  process->directory_ = *std::move(directory);
  process->address_ = absl::StrCat("unix:", (process->directory_->path() / "kvseek.sock").string());
  if (absl::Status status = process->Spawn(program, flags); !status.ok()) return status;
  if (absl::Status status = process->WaitReady(); !status.ok()) return status;
  return process;
}

absl::Status DaemonProcess::Spawn(const std::string& program,
                                  const std::vector<std::string>& flags) {
  std::vector<std::string> words = {program, "--listen", address_, "--print-ready"};
  words.insert(words.end(), flags.begin(), flags.end());
  std::vector<char*> argv;
  argv.reserve(words.size() + 1);
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::array<int, 2> pipe_fds{};
  if (pipe2(pipe_fds.data(), O_CLOEXEC) != 0) return SystemError("pipe", errno);
  ready_fd_ = pipe_fds[0];
  const std::string log = (directory_->path() / "log").string();
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, pipe_fds[1], STDOUT_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, log.c_str(),
                                   O_WRONLY | O_CREAT | O_APPEND, 0600);
  const int error = posix_spawn(&pid_, program.c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(pipe_fds[1]);
  if (error == 0) return absl::OkStatus();
  pid_ = -1;
  return SystemError(absl::StrCat(program, " cannot be run"), error);
}

absl::Status DaemonProcess::WaitReady() {
  const Clock::time_point until = Clock::now() + kReadyTimeout;
  std::string line;
  while (line.find('\n') == std::string::npos) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now());
    if (left.count() <= 0) {
      return absl::DeadlineExceededError(
          absl::StrCat("the daemon was not ready after ", kReadyTimeout.count(), " s", LogTail()));
    }
    pollfd waiting{ready_fd_, POLLIN, 0};
    if (poll(&waiting, 1, static_cast<int>(left.count())) <= 0) continue;
    std::array<char, 256> bytes{};
    const ssize_t count = read(ready_fd_, bytes.data(), bytes.size());
    if (count > 0) {
      line.append(bytes.data(), static_cast<size_t>(count));
    } else if (count == 0 || errno != EINTR) {  // it closed its stdout
      int wait_status = 0;
      if (!WaitEnd(&wait_status))
        return absl::UnavailableError("the daemon does not say it is ready");
      return absl::UnavailableError(
          absl::StrCat("the daemon did not start: it ", EndText(wait_status), LogTail()));
    }
  }
  if (line.rfind("ready ", 0) == 0) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("the daemon said \"", line, "\" instead of ready"));
}

bool DaemonProcess::WaitEnd(int* wait_status) {
  const Clock::time_point until = Clock::now() + kEndTimeout;
  while (Clock::now() < until) {
    const pid_t ended = waitpid(pid_, wait_status, WNOHANG);
    if (ended == pid_) {
      pid_ = -1;
      return true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return false;
}

absl::Status DaemonProcess::Stop() {
  if (pid_ < 0) return absl::OkStatus();
  int wait_status = 0;
  kill(pid_, SIGTERM);
  if (!WaitEnd(&wait_status)) {
    return absl::DeadlineExceededError("the daemon did not stop on SIGTERM");
  }
  if (WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == 0) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("the daemon ", EndText(wait_status), LogTail()));
}

DaemonProcess::~DaemonProcess() {
  if (pid_ >= 0) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  if (ready_fd_ >= 0) close(ready_fd_);
}

std::string DaemonProcess::LogTail() const {
  std::ifstream file(directory_->path() / "log");
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  while (text.ends_with('\n')) text.pop_back();
  if (text.size() > kLogTailBytes) text.erase(0, text.size() - kLogTailBytes);
  return text.empty() ? "" : absl::StrCat("; it wrote:\n", text);
}

}  // namespace kvseek::cli
