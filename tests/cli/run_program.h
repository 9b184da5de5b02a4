// Runs a built program and keeps what it says.
#ifndef KVSEEK_TESTS_CLI_RUN_PROGRAM_H_
#define KVSEEK_TESTS_CLI_RUN_PROGRAM_H_

#include <sys/wait.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/cli/test_files.h"

namespace kvseek::cli {

inline std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
}

struct Ran {
  int exit_code = -1;  ///< -1: ended by a signal
  std::string out;
  std::string err;
};

/// `arguments` go through a shell.
inline Ran RunKvseek(const std::string& arguments) {
  const TempDir dir;
  const std::string command = absl::StrCat("'", KVSEEK_BIN_DIR, "/kvseek' ", arguments, " >'",
                                           dir.File("out"), "' 2>'", dir.File("err"), "'");
  const int status = std::system(command.c_str());
  Ran ran;
  if (WIFEXITED(status)) ran.exit_code = WEXITSTATUS(status);
  ran.out = ReadFile(dir.File("out"));
  ran.err = ReadFile(dir.File("err"));
  return ran;
}

}  // namespace kvseek::cli

#endif  // KVSEEK_TESTS_CLI_RUN_PROGRAM_H_
