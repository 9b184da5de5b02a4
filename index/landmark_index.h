// Blocks of consecutive keys, ranked by one summary each.
//
// kBounds: the smallest and largest value of each dimension bound a block's scores (Quest, arXiv
// 2406.10774); a tree over the blocks makes it a branch and bound that can be run to the end (HiP,
// arXiv 2406.09827; parts_index.h). kMean: the mean key and the spread around it (InfLLM, arXiv
// 2402.04617; LongHeads, arXiv 2402.10685), with keys that stand out from their block in parts of
// their own, which halves the error where a head has an attention sink. kGiven: a key of the
// client's own, as that of a trained landmark token (Landmark Attention, arXiv 2305.16300); a block
// for which there is none is ranked by its mean key. What is not read is estimated from means and
// spread whatever the summary.
#ifndef KVSEEK_INDEX_LANDMARK_INDEX_H_
#define KVSEEK_INDEX_LANDMARK_INDEX_H_

#include <memory>

#include "absl/types/span.h"
#include "index/built_index.h"

namespace kvseek::index {

/// Training queries help kMean to tell which keys stand out; the others need none. Finished runs of
/// input.previous are taken over, with input's landmarks. Null if nothing is sealed, or when the
/// build is given up. Runs in the calling thread.
std::shared_ptr<const BuiltIndex> BuildLandmark(const BuildInput& input,
                                                const LandmarkOptions& options);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_LANDMARK_INDEX_H_
