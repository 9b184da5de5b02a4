// The ladder's audit: see rest_audit.h.
#ifndef KVSEEK_INDEX_LADDER_AUDIT_H_
#define KVSEEK_INDEX_LADDER_AUDIT_H_

#include "index/ladder_plan.h"
#include "index/rest_audit.h"

namespace kvseek::index {

struct LadderAudit {
  /// Draws options.audit_samples unread keys of one head, evenly along the range (systematic
  /// sampling), and reads their keys. The draw depends on the search's seed, range and head only.
  /// REQUIRES: all pieces of `plan` have run; the rest's weight is positive.
  static RestRatio Sample(const LadderPlan& plan, const ScoredKeys& candidates, int head,
                          Scratch& scratch);
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_LADDER_AUDIT_H_
