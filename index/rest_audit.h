// How honest the estimate of what a search left unread is: unread keys, drawn in proportion to
// their estimated weight, are read exactly (importance sampling, as in MagicPIG, arXiv 2410.16179).
#ifndef KVSEEK_INDEX_REST_AUDIT_H_
#define KVSEEK_INDEX_REST_AUDIT_H_

#include <cstdint>

#include "absl/types/span.h"

namespace kvseek::index {

/// True mass of the rest over its estimate, and the ends of a 95 % interval.
struct RestRatio {
  float mean = 1.0F;
  float low = 1.0F;
  float high = 1.0F;
};

inline constexpr float kUnbounded = 1e30F;  ///< an upper end that is as good as none

/// The mean of sampled ratios of true to estimated weight, and a 95 % interval for it. The interval
/// is the usual one on the logarithm, since ratios are skewed to the right; with few degrees of
/// freedom where few ratios make up most of the mean. `noise` is the standard deviation of the
/// sampled keys' estimates, and `own` how many of the ratios were drawn in proportion to them.
/// Where the noise is so large that most of the mean sits in ratios rarer than one in so many, the
/// sample's own spread says nothing of them; the upper end is then raised by the share of a
/// lognormal mean that lies beyond the sample's largest.
RestRatio EstimateRatio(absl::Span<const float> ratios, double noise, int own);

/// A number in [0, 1) that depends on its arguments only.
double UniformHash(uint64_t seed, uint64_t a, uint64_t b);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_REST_AUDIT_H_
