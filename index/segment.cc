#include "index/segment.h"

#include <cstring>

#include "kernels/cpu/rotation.h"

namespace kvseek::index {
namespace {

constexpr int kBlocks = kSegmentTokens / kernels::kScanBlock;

/// Byte counts of a segment's arrays.
struct Layout {
  explicit Layout(const KvShape& shape)
      : padded_dim(kernels::PaddedDim(shape.key_dim)),
        keys(kSegmentTokens * shape.KeyRowBytes()),
        values(kSegmentTokens * shape.ValueRowBytes()),
        centre(static_cast<size_t>(shape.key_dim) * sizeof(float)),
        scan_blocks(static_cast<size_t>(kBlocks) *
                    kernels::ScanBlockBytes(kernels::Symbols(padded_dim), shape.scan_bits)),
        fine_records(static_cast<size_t>(kSegmentTokens) *
                     kernels::FineRecordBytes(padded_dim, shape.value_dim)),
        fine_factors(kSegmentTokens * sizeof(kernels::FineFactors)),
        block_means(static_cast<size_t>(kBlocks) * shape.value_dim * sizeof(uint16_t)) {}

  int padded_dim;
  size_t keys;
  size_t values;
  size_t centre;
  size_t scan_blocks;
  size_t fine_records;
  size_t fine_factors;
  size_t block_means;
};

}  // namespace

Segment::Segment(const KvShape& shape) {
  const Layout layout(shape);
  keys_ = MakeAligned<uint16_t>(layout.keys / sizeof(uint16_t));
  values_ = MakeAligned<uint16_t>(layout.values / sizeof(uint16_t));
  centre_ = MakeAligned<float>(layout.centre / sizeof(float));
  scan_blocks_ = MakeAligned<uint8_t>(layout.scan_blocks);
  fine_records_ = MakeAligned<uint8_t>(layout.fine_records);
  fine_factors_ = MakeAligned<kernels::FineFactors>(kSegmentTokens);
  block_means_ = MakeAligned<uint16_t>(layout.block_means / sizeof(uint16_t));
}

std::shared_ptr<const Segment> Segment::Build(const KvShape& shape, const uint16_t* keys,
                                              const uint16_t* values) {
  const Layout layout(shape);
  std::shared_ptr<Segment> segment(new Segment(shape));
  std::memcpy(segment->keys_.get(), keys, layout.keys);
  std::memcpy(segment->values_.get(), values, layout.values);
  kernels::MeanRow(keys, shape.dtype, kSegmentTokens, shape.key_dim, segment->centre_.get());

  const auto residuals =
      MakeAligned<float>(static_cast<size_t>(kSegmentTokens) * layout.padded_dim);
  kernels::RotateResiduals(keys, shape.dtype, kSegmentTokens, shape.key_dim, segment->centre_.get(),
                           residuals.get());
  segment->scan_noise_ = kernels::EncodeScanBlocks(residuals.get(), kBlocks, layout.padded_dim,
                                                   shape.scan_bits, segment->scan_blocks_.get());
  kernels::EncodeFine(residuals.get(), values, shape.dtype, kSegmentTokens, layout.padded_dim,
                      shape.value_dim, segment->fine_records_.get(), segment->fine_factors_.get());
  kernels::BlockMeans(values, shape.dtype, kBlocks, shape.value_dim, segment->block_means_.get());
  return segment;
}

size_t Segment::Bytes(const KvShape& shape) {
  const Layout layout(shape);
  return sizeof(Segment) + layout.keys + layout.values + layout.centre + layout.scan_blocks +
         layout.fine_records + layout.fine_factors + layout.block_means;
}

}  // namespace kvseek::index
