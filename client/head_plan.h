// A plan says for each (layer, KV head) of a model how it is best asked: `kvseek plan` writes it
// from recorded queries, a daemon from its audits (KvClient::PlanOf), and both ends read it.
//
//   auto plan = kvseek::ReadHeadPlan("plan.json");
//   options.plan = *plan;  // DecoderOptions, or OpenOptions of a session
//
// A session that is opened with a plan answers each KV head with its index, candidates and
// threshold where a request does not say; mode and k are what a SparseDecoder asks for. The file is
// JSON (docs/planning.md), with a version. Heads that a plan does not name are asked as if there
// were none. Errors: invalid_argument naming the field, e.g. "heads[3].mode"; not_found for a file
// that is not there, unavailable for one that cannot be written. All functions are thread-safe.
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
  float threshold = 0.0F;   ///< SearchOptions::threshold; 0: none

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

/// A plan that says the mode of each head, (layers, kv_heads), and nothing else.
HeadPlan PlanOfModes(uint32_t kv_heads, const std::vector<HeadMode>& modes);
/// (layers, kv_heads): the modes, kAuto of heads that the plan does not name; and k, or `rows`
/// where it is 0. Both refuse a plan for heads that are not there.
absl::StatusOr<std::vector<HeadMode>> HeadModesOf(const HeadPlan& plan, uint32_t layers,
                                                  uint32_t kv_heads);
absl::StatusOr<std::vector<uint32_t>> HeadRowsOf(const HeadPlan& plan, uint32_t layers,
                                                 uint32_t kv_heads, uint32_t rows);

}  // namespace kvseek

#endif  // KVSEEK_CLIENT_HEAD_PLAN_H_
