#include "cli/commands.h"

#include <CLI/CLI.hpp>

namespace kvseek::cli {

void AddFormatFlag(CLI::App& command, std::string& format) {
  command.add_option("--format", format, "How to print: text (a table) or json")
      ->check(CLI::IsMember({"text", "json"}))
      ->default_str(format);
}

void FailUsage(const std::string& message) { throw CLI::ValidationError(message); }

}  // namespace kvseek::cli
