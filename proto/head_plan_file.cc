#include "proto/head_plan_file.h"

#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/status_code.h"

namespace kvseek::proto {
namespace {

constexpr uint32_t kCandidatesMax = 1U << 20;  // as index::kMaxCandidates
constexpr uint32_t kRowsMax = 1U << 16;        // as index::kMaxK
constexpr float kThresholdMin = -1000.0F;      // as index::kMinThreshold

absl::Status Refuse(absl::string_view field, absl::string_view why) {
  return FieldError(absl::StatusCode::kInvalidArgument, field, why);
}

template <size_t N>
uint32_t Place(const std::string& name, const std::array<const char*, N>& known) {
  return static_cast<uint32_t>(std::find(known.begin(), known.end(), name) - known.begin());
}

template <size_t N>
absl::Status CheckName(absl::string_view field, const std::string& name,
                       const std::array<const char*, N>& known) {
  if (Place(name, known) < N) return absl::OkStatus();
  return Refuse(field, absl::StrCat("\"", name, "\" is not one of ", absl::StrJoin(known, ", ")));
}

std::string FieldOfHead(absl::string_view prefix, int head) {
  return absl::StrCat(prefix, "heads[", head, "]");
}

absl::Status CheckHead(const PlannedHead& head, const PlannedHead* previous,
                       const std::string& field) {
  absl::Status status = CheckName(field + ".mode", head.mode(), kHeadModeNames);
  status.Update(CheckName(field + ".index", head.index(), kIndexNames));
  if (!status.ok()) return status;
  if (head.candidates() > kCandidatesMax) {
    return Refuse(field + ".candidates", absl::StrCat("at most ", kCandidatesMax));
  }
  if (!(head.threshold() >= kThresholdMin && head.threshold() <= 0.0F)) {
    return Refuse(field + ".threshold", absl::StrCat("must be between ", kThresholdMin, " and 0"));
  }
  if (head.k() > kRowsMax) return Refuse(field + ".k", absl::StrCat("at most ", kRowsMax));
  if (previous != nullptr && std::pair(head.layer(), head.kv_head()) <=
                                 std::pair(previous->layer(), previous->kv_head())) {
    return Refuse(field, "heads must ascend by layer and kv_head, none twice");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckHeadPlan(const HeadPlan& plan, absl::string_view prefix) {
  const auto field = [prefix](absl::string_view name) { return absl::StrCat(prefix, name); };
  if (plan.version() != kHeadPlanVersion) {
    return Refuse(
        field("version"),
        absl::StrCat(plan.version(), " is not known; this reads version ", kHeadPlanVersion));
  }
  if (plan.scan_bits() > 2) return Refuse(field("scan_bits"), "must be 1 or 2, or 0 for any");
  if (!std::isfinite(plan.error_target()) || plan.error_target() < 0.0) {
    return Refuse(field("error_target"), "must be 0 or more");
  }
  for (int i = 0; i < plan.heads_size(); ++i) {
    absl::Status status =
        CheckHead(plan.heads(i), i > 0 ? &plan.heads(i - 1) : nullptr, FieldOfHead(prefix, i));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status CheckHeadPlanFits(const HeadPlan& plan, uint32_t layers, uint32_t kv_heads,
                               absl::string_view prefix) {
  for (int i = 0; i < plan.heads_size(); ++i) {
    const PlannedHead& head = plan.heads(i);
    if (head.layer() >= layers) {
      return Refuse(FieldOfHead(prefix, i) + ".layer",
                    absl::StrCat(head.layer(), " of a model with ", layers, " layers"));
    }
    if (head.kv_head() >= kv_heads) {
      return Refuse(FieldOfHead(prefix, i) + ".kv_head",
                    absl::StrCat(head.kv_head(), " of a model with ", kv_heads, " KV heads"));
    }
  }
  return absl::OkStatus();
}

uint32_t HeadModeNumber(const PlannedHead& head) { return Place(head.mode(), kHeadModeNames); }
uint32_t IndexNumber(const PlannedHead& head) { return Place(head.index(), kIndexNames); }

absl::StatusOr<HeadPlan> ParseHeadPlan(absl::string_view json) {
  HeadPlan plan;
  const auto parsed = google::protobuf::util::JsonStringToMessage(
      google::protobuf::StringPiece(json.data(), json.size()), &plan);
  if (!parsed.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("not a head plan: ", std::string(parsed.message())));
  }
  if (absl::Status status = CheckHeadPlan(plan); !status.ok()) return status;
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
  if (absl::Status status = CheckHeadPlan(plan); !status.ok()) return status;
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = true;
  options.always_print_primitive_fields = true;
  options.preserve_proto_field_names = true;
  std::string text;
  const auto printed = google::protobuf::util::MessageToJsonString(plan, &text, options);
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

}  // namespace kvseek::proto
