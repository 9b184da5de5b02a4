// The subcommands of `kvseek`. Each adds its flags and help to the program; once they are parsed
// and found good, it sets `action` to what is to be done. Wrong flags are CLI11's errors (exit code
// 2), what fails later is the action's status (exit code 1).
#ifndef KVSEEK_CLI_COMMANDS_H_
#define KVSEEK_CLI_COMMANDS_H_

#include <functional>
#include <string>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace kvseek::cli {

using Action = std::function<absl::Status()>;

void AddDemoCommand(CLI::App& program, Action& action);
void AddEvalCommand(CLI::App& program, Action& action);
void AddPlanCommand(CLI::App& program, Action& action);
void AddBenchCommand(CLI::App& program, Action& action);
/// ping, stats and sessions.
void AddDaemonCommands(CLI::App& program, Action& action);

/// Adds --format text|json.
void AddFormatFlag(CLI::App& command, std::string& format);
/// Throws CLI::ValidationError: flags that do not fit together.
[[noreturn]] void FailUsage(const std::string& message);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_COMMANDS_H_
