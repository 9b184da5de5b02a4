// Flags of `kvseek eval`, and what they may not be.
#ifndef KVSEEK_CLI_EVAL_FLAGS_H_
#define KVSEEK_CLI_EVAL_FLAGS_H_

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cli/build_index.h"
#include "cli/connect.h"
#include "cli/policy_flags.h"
#include "kernels/cpu/product_codes.h"

namespace kvseek::cli {

struct EvalFlags {
  std::vector<std::string> kv;
  std::string queries;
  std::vector<std::string> heads;
  std::vector<std::string> indexes = {"exact", "ladder"};
  std::vector<std::string> scans = {"sign2"};
  std::vector<int> sketches = {kernels::kSketchDim};
  std::vector<int> candidates = {4096};
  std::vector<int64_t> exact = {64};
  std::vector<std::string> summaries = {"minmax"};
  int audit = 128;
  int steps = 0;
  uint64_t seed = 0;
  BuildSettings build;
  bool no_estimate = false;
  bool per_head = false;
  int exact_top = 0;
  PolicyFlags policy;
  int64_t stop_after_us = 0;
  int threads = 1;
  ConnectFlags connect;
  std::string format = "text";
  std::string plot;

  bool Asks(const std::string& index) const {
    return std::find(indexes.begin(), indexes.end(), index) != indexes.end();
  }
};

/// A ladder's scan code: sign codes of so many bits, or product codes of so many sub-spaces.
struct ScanName {
  std::string name;
  int sign_bits;  ///< 0: product
  int subspaces;
};

/// REQUIRES: a name that --scan takes.
const ScanName& FindScan(const std::string& name);

/// Whether the index is one that is built, and has a name of its own.
bool IsBuilt(const std::string& index);

/// Adds help and options; the flags must live as long as the command.
void AddEvalFlags(CLI::App& command, EvalFlags& flags);

/// Throws a usage error for what does not go together.
void CheckEvalFlags(const EvalFlags& flags);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_EVAL_FLAGS_H_
