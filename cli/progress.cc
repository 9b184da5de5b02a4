#include "cli/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace kvseek::cli {
namespace {

constexpr int64_t kBarWidth = 30;

}  // namespace

Progress::Progress(bool quiet) : quiet_(quiet), terminal_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() { End(""); }

void Progress::Begin(const std::string& phase, int64_t total) {
  End("");
  phase_ = phase;
  total_ = std::max<int64_t>(total, 1);
  done_ = 0;
  drawn_ = -1;
  Draw();
}

void Progress::Step() {
  done_ = std::min(done_ + 1, total_);
  Draw();
}

void Progress::End(const std::string& outcome) {
  if (phase_.empty()) return;
  if (!quiet_) {
    std::fprintf(stderr, "%s%s%s%s\n", terminal_ ? "\r\x1b[K" : "", phase_.c_str(),
                 outcome.empty() ? "" : ": ", outcome.c_str());
  }
  phase_.clear();
}

void Progress::Draw() {
  const int64_t filled = done_ * kBarWidth / total_;
  if (quiet_ || !terminal_ || filled == drawn_) return;
  drawn_ = filled;
  const std::string bar = std::string(static_cast<size_t>(filled), '#') +
                          std::string(static_cast<size_t>(kBarWidth - filled), '.');
  std::fprintf(stderr, "\r\x1b[K[%s] %s", bar.c_str(), phase_.c_str());
  std::fflush(stderr);
}

}  // namespace kvseek::cli
