// Head plans (proto/head_plan.proto): what a good one is, and its file.
//
// The daemon (`kvseekd --plan`, OpenSessionRequest.plan) and the client (client/head_plan.h) read
// the same plans and refuse the same ones. The file is JSON (docs/planning.md), with a version.
// Errors: invalid_argument that names the field, e.g. "heads[3].mode"; not_found for a file that is
// not there, unavailable for one that cannot be written. All functions are thread-safe.
#ifndef KVSEEK_PROTO_HEAD_PLAN_FILE_H_
#define KVSEEK_PROTO_HEAD_PLAN_FILE_H_

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/head_plan.pb.h"

namespace kvseek::proto {

inline constexpr uint32_t kHeadPlanVersion = 1;
/// Names in a plan, by client HeadMode and by IndexKind.
inline constexpr std::array<const char*, 4> kHeadModeNames = {"auto", "local", "rows", "state"};
inline constexpr std::array<const char*, 7> kIndexNames = {"auto",    "exact", "ladder", "landmark",
                                                           "cluster", "graph", "product"};

/// Heads ascend by (layer, kv_head), none twice; names are known and numbers in their bounds.
/// `prefix` stands before the fields that errors name: "plan." of a request.
absl::Status CheckHeadPlan(const HeadPlan& plan, absl::string_view prefix = "");
/// No head is outside of a model of this shape. REQUIRES: CheckHeadPlan.
absl::Status CheckHeadPlanFits(const HeadPlan& plan, uint32_t layers, uint32_t kv_heads,
                               absl::string_view prefix = "");

/// Places in kHeadModeNames and kIndexNames. REQUIRES: CheckHeadPlan.
uint32_t HeadModeNumber(const PlannedHead& head);
uint32_t IndexNumber(const PlannedHead& head);

absl::StatusOr<HeadPlan> ParseHeadPlan(absl::string_view json);
absl::StatusOr<HeadPlan> ReadHeadPlan(const std::string& path);
/// The file's text. Refuses what ParseHeadPlan would.
absl::StatusOr<std::string> FormatHeadPlan(const HeadPlan& plan);
absl::Status WriteHeadPlan(const HeadPlan& plan, const std::string& path);

}  // namespace kvseek::proto

#endif  // KVSEEK_PROTO_HEAD_PLAN_FILE_H_
