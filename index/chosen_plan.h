// The second half of every search that first chooses keys and then reads them: landmark, cluster
// and graph.
//
// The chosen keys, and all keys that the index does not cover yet, are read exactly. The rest is
// made of parts (key_parts.h) that were left out, wholly or nearly: each adds its estimated weight
// to its mean value, unless the caller wants it left out of the answer; the report tells of it
// either way.
#ifndef KVSEEK_INDEX_CHOSEN_PLAN_H_
#define KVSEEK_INDEX_CHOSEN_PLAN_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "index/key_index.h"
#include "index/key_parts.h"
#include "index/selection.h"

namespace kvseek::index {

/// What is left unread of one part.
struct UnreadPart {
  const KeyParts* parts = nullptr;
  int part = 0;
  int keys = 0;       ///< of the range and not chosen; > 0
  bool kept = false;  ///< its keys are in ChosenKeys::kept
};

struct ChosenKeys {
  /// Ascending positions of the range, below `covered`: read for the whole group.
  std::vector<int64_t> positions;
  /// Positions of the range from here on are read too, all of them.
  int64_t covered = 0;
  /// Ascending positions, of unread parts: with the chosen ones what SearchOptions::keep asks for.
  std::vector<int64_t> kept;
  std::vector<UnreadPart> unread;  ///< together: every key of the range that is not read
  /// (group, unread.size()): PartWeight of the part's unread keys.
  std::vector<float> weights;
  std::vector<float> spread;  ///< (group): standard deviation of scores within the unread parts
  int64_t keys_scored = 0;    ///< keys looked at while choosing, chosen or not
  int64_t bytes_touched = 0;  ///< by choosing
};

/// ln of the estimated sum of exp(score) over `keys` keys of a part: they are taken to be normal
/// around their mean, with the part's variance, whose effect is bounded since few keys do not
/// follow it into its tail. `mean` and `variance` are those of the scores.
float PartWeight(float mean, float variance, int keys);

/// Positions of the part's unread keys, ascending.
std::vector<int64_t> UnreadKeys(const UnreadPart& part, const ChosenKeys& chosen,
                                const SearchQuery& query);

/// Reads what was chosen. `view` must hold every member of the unread parts; what view, query and
/// the parts point at must outlive the plan.
PlanPtr PlanChosen(const KvView& view, const SearchQuery& query, const SearchOptions& options,
                   ChosenKeys chosen);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_CHOSEN_PLAN_H_
