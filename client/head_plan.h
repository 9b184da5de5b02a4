// A plan says for each (layer, KV head) of a model how it is best asked: `kvseek plan` writes it
// from recorded queries, a decoder reads it.
//
//   auto plan = kvseek::ReadHeadPlan("plan.json");
//   auto modes = kvseek::HeadModesOf(*plan, shape.layers, shape.kv_heads);
//   options.head_modes = *modes;  // DecoderOptions
//
// The file is JSON (docs/planning.md), with a version. Heads that it does not name are asked as if
// there were no plan. Errors: invalid_argument naming the field, e.g. "heads[3].mode"; not_found
// for a file that is not there, unavailable for one that cannot be written. All functions are
// thread-safe.
#ifndef KVSEEK_CLIENT_HEAD_PLAN_H_
#define KVSEEK_CLIENT_HEAD_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/decoder/head_modes.h"

namespace kvseek {

struct PlannedHead {
  uint32_t layer = 0;
  uint32_t kv_head = 0;
  HeadMode mode = HeadMode::kAuto;  ///< kLocal: a streaming head
  /// auto, exact, ladder, landmark, cluster or graph; of a head in kLocal it counts for nothing.
  std::string index = "auto";
  uint32_t candidates = 0;  ///< SearchOptions::candidates; 0: the daemon's default
  uint32_t k = 0;           ///< kRows: keys that TopK returns; 0: the decoder's default

  bool operator==(const PlannedHead&) const = default;
};

struct HeadPlan {
  uint32_t scan_bits = 0;            ///< OpenOptions::scan_bits that it was made for; 0: any
  double error_target = 0.0;         ///< mean output error that it was made for; for readers
  std::vector<PlannedHead> heads{};  ///< ascending by (layer, kv_head), none twice

  bool operator==(const HeadPlan&) const = default;
};

absl::StatusOr<HeadPlan> ParseHeadPlan(absl::string_view json);
absl::StatusOr<HeadPlan> ReadHeadPlan(const std::string& path);

/// The file's text. Refuses what ParseHeadPlan would.
absl::StatusOr<std::string> FormatHeadPlan(const HeadPlan& plan);
absl::Status WriteHeadPlan(const HeadPlan& plan, const std::string& path);

/// (layers, kv_heads): DecoderOptions::head_modes. Refuses a plan for heads that are not there.
absl::StatusOr<std::vector<HeadMode>> HeadModesOf(const HeadPlan& plan, uint32_t layers,
                                                  uint32_t kv_heads);

}  // namespace kvseek

#endif  // KVSEEK_CLIENT_HEAD_PLAN_H_
