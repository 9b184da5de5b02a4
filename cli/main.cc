// kvseek: evaluates indexes, shows and measures a daemon. Exit codes: 0 done, 1 failed, 2 wrong
// flags.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <string>

#include "cli/commands.h"
#include "kernels/cpu/simd_level.h"

namespace {

constexpr char kAbout[] =
    "kvseek: retrieval over offloaded attention keys and values.\n"
    "A daemon (kvseekd) keeps the KV cache of long sequences in CPU memory and answers a "
    "decoder's\n"
    "queries with the keys that matter or with finished attention. This tool shows how good and "
    "how\n"
    "fast the answers are.";

constexpr char kExamples[] =
    "Examples:\n"
    "  kvseek demo --daemon build/release/bin/kvseekd --data tests/data\n"
    "  kvseek eval --kv code8.layer15.kv1.safetensors --queries code8.queries.safetensors \\\n"
    "      --index exact,ladder,oracle --candidates 1024 --exact 64,1024\n"
    "  kvseek bench --sessions 16 --tokens 16384 --rate 200 --duration 10\n"
    "  kvseek ping --via unix:/run/kvseek.sock\n"
    "\n"
    "KVSEEK_SIMD (avx512-vbmi, avx512, avx2, scalar) forces the kernels to a level.\n"
    "`kvseek COMMAND --help` explains a command's flags and numbers.\n"
    "Exit codes: 0 done, 1 failed, 2 wrong flags.";

constexpr int kFailed = 1;
constexpr int kUsage = 2;

int Run(int argc, char** argv) {
  CLI::App program(kAbout, "kvseek");
  program.footer(kExamples);
  program.set_version_flag("--version", "kvseek " KVSEEK_VERSION);
  program.require_subcommand(0, 1);  // none is found below, where an unknown one has been named
  kvseek::cli::Action action;
  kvseek::cli::AddDemoCommand(program, action);
  kvseek::cli::AddEvalCommand(program, action);
  kvseek::cli::AddPlanCommand(program, action);
  kvseek::cli::AddBenchCommand(program, action);
  kvseek::cli::AddDaemonCommands(program, action);
  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return program.exit(error) == 0 ? 0 : kUsage;
  }
  if (!action) {
    std::fprintf(stderr, "kvseek: which command?\n\n%s", program.help().c_str());
    return kUsage;
  }
  if (!kvseek::kernels::ApplySimdLevelFromEnvironment()) {
    std::fprintf(stderr, "kvseek: KVSEEK_SIMD names a level that this machine does not have\n");
    return kUsage;
  }
  const absl::Status status = action();
  if (status.ok()) return 0;
  std::fprintf(stderr, "kvseek: %s\n", std::string(status.message()).c_str());
  return kFailed;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Run(argc, argv);
  } catch (const std::exception& error) {  // out of memory, no threads
    std::fprintf(stderr, "kvseek: %s\n", error.what());
    return kFailed;
  }
}
