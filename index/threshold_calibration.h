// The threshold (SearchOptions::threshold) that lets a wanted number of a head's keys pass, from
// queries of its prefill. Who calls it: `kvseek eval --threshold calibrated:K` and the tests.
//
// After Top-Theta (arXiv 2502.08363): where one threshold stands for a number of keys, a search has
// nothing to sort. Theirs is of raw scores, whose level moves with the query: one from late prefill
// queries let 0 to 32256 of 32256 keys pass in decode steps. Ours is of shares of softmax mass.
//
// It is found by asking the index itself, so that the noise of its estimates is in it: the mean
// number of keys that searches choose (SearchReport::keys_chosen) falls as the threshold rises, and
// is bisected. A threshold is of one index, head and, as budgets are, of sequences of about one
// length, so the queries are late ones.
#ifndef KVSEEK_INDEX_THRESHOLD_CALIBRATION_H_
#define KVSEEK_INDEX_THRESHOLD_CALIBRATION_H_

#include "index/built_index.h"
#include "index/key_index.h"

namespace kvseek::index {

inline constexpr int kCalibrationQueriesMax = 64;   ///< query tokens, evenly spread
inline constexpr double kCalibrationSince = 0.75;   ///< share of the keys before the first of them
inline constexpr int kCalibrationStepsMax = 24;     ///< of the bisection
inline constexpr float kHighestThreshold = -0.01F;  ///< that a calibration finds

struct CalibratedThreshold {
  float threshold = 0.0F;  ///< for SearchOptions; 0: no more than `wanted` are chosen without one
  double keys = 0.0;       ///< mean number chosen with it
  int queries = 0;         ///< query tokens that it is from; 0: there were none late enough
};

/// The threshold of `index` at which Attend with `options` (whose own threshold and k do not count)
/// chooses about `wanted` keys of the group on average. `input`: a view that the index is of, and
/// queries; each sees the keys up to its own. Costs up to 25 searches a query. Deterministic.
/// REQUIRES: as KeyIndex::Plan; wanted > 0.
CalibratedThreshold CalibrateThreshold(const KeyIndex& index, const BuildInput& input,
                                       const SearchOptions& options, double wanted,
                                       Scratch& scratch);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_THRESHOLD_CALIBRATION_H_
