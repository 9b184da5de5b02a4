// Progress of something that takes a while: a bar on a terminal, plain lines elsewhere.
#ifndef KVSEEK_CLI_PROGRESS_H_
#define KVSEEK_CLI_PROGRESS_H_

#include <cstdint>
#include <string>

namespace kvseek::cli {

/// Writes to stderr. Not thread-safe.
class Progress {
 public:
  /// `quiet` writes nothing.
  explicit Progress(bool quiet);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Ends the phase under way and begins one of `total` steps.
  void Begin(const std::string& phase, int64_t total);
  void Step();
  /// Ends the phase, saying what came of it.
  void End(const std::string& outcome);

 private:
  void Draw();

  bool quiet_;
  bool terminal_;
  std::string phase_;  // empty: none under way
  int64_t total_ = 0;
  int64_t done_ = 0;
  int64_t drawn_ = -1;
};

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_PROGRESS_H_
