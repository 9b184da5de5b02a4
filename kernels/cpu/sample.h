// A sample of a scan: blocks of scan codes, anywhere, of which estimates and weights are wanted
// before all are scanned. For sign codes ladder_sample.h, for product codes product_scan.h.
#ifndef KVSEEK_KERNELS_CPU_SAMPLE_H_
#define KVSEEK_KERNELS_CPU_SAMPLE_H_

#include <cstdint>

namespace kvseek::kernels {

/// How many blocks are fetched before they are used: they are far apart. The first so many are the
/// caller's to fetch.
inline constexpr int kSampleAhead = 8;

/// The blocks. All arrays have `count` elements.
struct SampleBlocks {
  const uint8_t* const* codes;
  const float* const* centres;  ///< each (heads): scale * <c, q> of the block's segment
  const float* factors;         ///< how many times the weights of a block count
  int count;
};

/// What is added up over samples: largest is -infinity and mass 0 at first.
struct SampleResults {
  float* estimates;  ///< [h * stride + key]: what thresholds are compared with
  int stride;
  float* largest;  ///< (heads), of the estimates so far
  float* mass;     ///< (heads): summed weight so far over exp(largest)
};

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_SAMPLE_H_
