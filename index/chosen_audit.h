// The audit of searches that first choose keys and then read them (chosen_plan.h): unread keys are
// drawn, read exactly, and set against the estimate of what was left unread.
//
// One sample serves the whole group. Each head's share of it is drawn in proportion to the head's
// estimated weights (importance sampling, as in MagicPIG, arXiv 2410.16179), and every key drawn
// counts for all heads, over the chance that any of them had to draw it (the balance heuristic of
// Veach and Guibas, SIGGRAPH 1995): heads of a group look at much the same keys, so that each gets
// the use of nearly all draws, and where one's weights are far off, another's may be right. A tenth
// is drawn without regard to weights, so that no key is out of reach (Hesterberg's defensive
// mixture).
//
// The sequence's first keys are read always, where they are unread and in the range: they are
// attention sinks (arXiv 2309.17453), whose mass no summary of a part shows and no sample finds. On
// layer15.kv1 at 32K the key at position 1 alone has 10 to 60 % of what a search leaves unread, and
// its part of 256 keys an estimated 1 to 10 %.
#ifndef KVSEEK_INDEX_CHOSEN_AUDIT_H_
#define KVSEEK_INDEX_CHOSEN_AUDIT_H_

#include <vector>

#include "index/chosen_plan.h"
#include "index/key_index.h"
#include "index/rest_audit.h"
#include "index/scratch.h"

namespace kvseek::index {

inline constexpr int64_t kSinkTokens = 16;  ///< of the sequence, that an audit reads always

/// (group): the true mass of what is unread, over its estimate. Draws options.audit_samples keys
/// for each head; the draw depends on the search's seed and range only. `queries`: (group,
/// key_dim), times softmax_scale. REQUIRES: audit_samples > 0.
std::vector<RestRatio> AuditChosen(const KvView& view, const SearchQuery& query,
                                   const SearchOptions& options, const ChosenKeys& chosen,
                                   const float* queries, Scratch& scratch);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_CHOSEN_AUDIT_H_
