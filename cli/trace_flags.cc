#include "cli/trace_flags.h"

#include <CLI/CLI.hpp>
#include <filesystem>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/commands.h"
#include "cli/trace.h"

namespace kvseek::cli {
namespace {

absl::StatusOr<std::string> HeadOfFile(const std::string& kv,
                                       const std::vector<std::string>& heads) {
  const std::string file = std::filesystem::path(kv).filename().string();
  std::string best;
  for (const std::string& head : heads) {
    if (file.find(head) != std::string::npos && head.size() > best.size()) best = head;
  }
  if (best.empty()) {
    return absl::NotFoundError(absl::StrCat(kv, ": no head of the queries file (",
                                            absl::StrJoin(heads, ", "),
                                            ") is in its name; say which with --head"));
  }
  return best;
}

}  // namespace

void AddTraceFlags(CLI::App& command, std::vector<std::string>& kv, std::string& queries,
                   std::vector<std::string>& heads) {
  command.add_option("--kv", kv, "Keys and values of a head (.safetensors); repeatable")
      ->required()
      ->allow_extra_args(false);
  command.add_option("--queries", queries, "Decode queries (.safetensors)")->required();
  command
      .add_option("--head", heads,
                  "Head of the --kv at the same place; default: the one its file name contains")
      ->allow_extra_args(false);
}

void CheckHeadFlags(const std::vector<std::string>& kv, const std::vector<std::string>& heads) {
  if (heads.empty() || heads.size() == kv.size()) return;
  FailUsage(absl::StrCat("--head: ", heads.size(), " given for ", kv.size(),
                         " --kv; give one for each, in the same order, or none"));
}

absl::Status ResolveHeads(const std::vector<std::string>& kv, const std::string& queries,
                          std::vector<std::string>& heads) {
  if (!heads.empty()) return absl::OkStatus();
  const absl::StatusOr<std::vector<std::string>> known = ListHeads(queries);
  if (!known.ok()) return known.status();
  for (const std::string& file : kv) {
    absl::StatusOr<std::string> head = HeadOfFile(file, *known);
    if (!head.ok()) return head.status();
    heads.push_back(*std::move(head));
  }
  return absl::OkStatus();
}

}  // namespace kvseek::cli
