#include "client/head_plan.h"

#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/head_plan.pb.h"

namespace kvseek {
namespace {

constexpr uint32_t kVersion = 1;
constexpr uint32_t kCandidatesMax = 1U << 20;  // as index::kMaxCandidates
constexpr uint32_t kRowsMax = 1U << 16;        // as index::kMaxK

/// By HeadMode.
constexpr std::array<const char*, 4> kModes = {"auto", "local", "rows", "state"};
constexpr std::array<const char*, 7> kIndexes = {"auto",    "exact", "ladder", "landmark",
                                                 "cluster", "graph", "product"};

absl::Status Refuse(absl::string_view field, absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", why));
}

template <size_t N>
absl::Status NotOneOf(absl::string_view field, absl::string_view value,
                      const std::array<const char*, N>& known) {
  return Refuse(field, absl::StrCat("\"", value, "\" is not one of ", absl::StrJoin(known, ", ")));
}

absl::Status CheckHead(const PlannedHead& head, const PlannedHead* previous,
                       absl::string_view field) {
  if (std::find(kIndexes.begin(), kIndexes.end(), head.index) == kIndexes.end()) {
    return NotOneOf(absl::StrCat(field, ".index"), head.index, kIndexes);
  }
  if (head.candidates > kCandidatesMax) {
    return Refuse(absl::StrCat(field, ".candidates"), absl::StrCat("at most ", kCandidatesMax));
  }
  if (head.k > kRowsMax)
    return Refuse(absl::StrCat(field, ".k"), absl::StrCat("at most ", kRowsMax));
  if (previous != nullptr &&
      std::pair(head.layer, head.kv_head) <= std::pair(previous->layer, previous->kv_head)) {
    return Refuse(field, "heads must ascend by layer and kv_head, none twice");
  }
  return absl::OkStatus();
}

absl::Status Check(const HeadPlan& plan) {
  if (plan.scan_bits > 2) return Refuse("scan_bits", "must be 1 or 2, or 0 for any");
  if (!std::isfinite(plan.error_target) || plan.error_target < 0.0) {
    return Refuse("error_target", "must be 0 or more");
  }
  for (size_t i = 0; i < plan.heads.size(); ++i) {
    absl::Status status = CheckHead(plan.heads[i], i > 0 ? &plan.heads[i - 1] : nullptr,
                                    absl::StrCat("heads[", i, "]"));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<HeadPlan> ParseHeadPlan(absl::string_view json) {
  proto::HeadPlan message;
  const auto parsed = google::protobuf::util::JsonStringToMessage(
      google::protobuf::StringPiece(json.data(), json.size()), &message);
  if (!parsed.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("not a head plan: ", std::string(parsed.message())));
  }
  if (message.version() != kVersion) {
    return Refuse("version",
                  absl::StrCat(message.version(), " is not known; this reads version ", kVersion));
  }
  HeadPlan plan;
  plan.scan_bits = message.scan_bits();
  plan.error_target = message.error_target();
  for (const proto::PlannedHead& from : message.heads()) {
    const auto* const mode = std::find(kModes.begin(), kModes.end(), from.mode());
    if (mode == kModes.end()) {
      return NotOneOf(absl::StrCat("heads[", plan.heads.size(), "].mode"), from.mode(), kModes);
    }
    plan.heads.push_back({from.layer(), from.kv_head(),
                          static_cast<HeadMode>(std::distance(kModes.begin(), mode)), from.index(),
                          from.candidates(), from.k()});
  }
  if (absl::Status status = Check(plan); !status.ok()) return status;
  return plan;
}

absl::StatusOr<HeadPlan> ReadHeadPlan(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  absl::StatusOr<HeadPlan> plan = ParseHeadPlan(text);
  if (!plan.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", plan.status().message()));
  }
  return plan;
}

absl::StatusOr<std::string> FormatHeadPlan(const HeadPlan& plan) {
  if (absl::Status status = Check(plan); !status.ok()) return status;
  proto::HeadPlan message;
  message.set_version(kVersion);
  message.set_scan_bits(plan.scan_bits);
  message.set_error_target(plan.error_target);
  for (const PlannedHead& head : plan.heads) {
    proto::PlannedHead& to = *message.add_heads();
    to.set_layer(head.layer);
    to.set_kv_head(head.kv_head);
    to.set_mode(kModes[static_cast<size_t>(head.mode)]);
    to.set_index(head.index);
    to.set_candidates(head.candidates);
    to.set_k(head.k);
  }
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = true;
  options.always_print_primitive_fields = true;
  options.preserve_proto_field_names = true;
  std::string text;
  const auto printed = google::protobuf::util::MessageToJsonString(message, &text, options);
  if (!printed.ok()) return absl::InternalError(std::string(printed.message()));
  return text;
}

absl::Status WriteHeadPlan(const HeadPlan& plan, const std::string& path) {
  const absl::StatusOr<std::string> text = FormatHeadPlan(plan);
  if (!text.ok()) return text.status();
  std::ofstream file(path, std::ios::binary);
  file << *text;
  file.close();
  if (!file) return absl::UnavailableError(absl::StrCat(path, ": cannot be written"));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<HeadMode>> HeadModesOf(const HeadPlan& plan, uint32_t layers,
                                                  uint32_t kv_heads) {
  std::vector<HeadMode> modes(static_cast<size_t>(layers) * kv_heads, HeadMode::kAuto);
  for (size_t i = 0; i < plan.heads.size(); ++i) {
    const PlannedHead& head = plan.heads[i];
    if (head.layer >= layers) {
      return Refuse(absl::StrCat("heads[", i, "].layer"),
                    absl::StrCat(head.layer, " of a model with ", layers, " layers"));
    }
    if (head.kv_head >= kv_heads) {
      return Refuse(absl::StrCat("heads[", i, "].kv_head"),
                    absl::StrCat(head.kv_head, " of a model with ", kv_heads, " KV heads"));
    }
    modes[static_cast<size_t>(head.layer) * kv_heads + head.kv_head] = head.mode;
  }
  return modes;
}

}  // namespace kvseek
