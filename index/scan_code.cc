#include "index/scan_code.h"

#include "kernels/cpu/attention.h"
#include "kernels/cpu/prefetch.h"

namespace kvseek::index {
namespace {

constexpr int64_t kSegmentBlocks = kSegmentTokens / kernels::kScanBlock;

/// Of the first weighed block; the others stand weighed.step rows apart.
const uint16_t* WeighedMeans(const Segment& segment, const SegmentPart& part, int value_dim) {
  return segment.block_means() + (part.block % kSegmentBlocks + part.weighed.first) * value_dim;
}

}  // namespace

void SumBlockWeights(const ScanResults& results, int group, int weighed) {
  for (int h = 0; h < group; ++h) {
    const float* const weights = results.block_weights + static_cast<ptrdiff_t>(h) * weighed;
    float sum = 0.0F;
    for (int w = 0; w < weighed; ++w) sum += weights[w];
    results.sums[h] = sum;
  }
}

void AddBlockMeans(const Segment& segment, const SegmentPart& part, const ScanResults& results,
                   int group, int value_dim, float* acc) {
  const int weighed = part.Weighed();
  kernels::AddWeightedRows(results.block_weights, weighed, group,
                           WeighedMeans(segment, part, value_dim), part.weighed.step * value_dim,
                           weighed, value_dim, acc);
}

void PrefetchBlockMeans(const Segment& segment, const SegmentPart& part, int value_dim) {
  const uint16_t* row = WeighedMeans(segment, part, value_dim);
  for (int w = part.Weighed(); w > 0; --w, row += part.weighed.step * value_dim) {
    kernels::PrefetchRange(row, static_cast<size_t>(value_dim) * sizeof(uint16_t));
  }
}

}  // namespace kvseek::index
