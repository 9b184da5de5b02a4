#include "index/segment.h"

#include <cstring>

#include "index/scratch.h"
#include "kernels/cpu/rotation.h"

namespace kvseek::index {
namespace {

constexpr int kBlocks = kSegmentTokens / kernels::kScanBlock;

}  // namespace

/// Where a segment's arrays stand in its memory.
struct Segment::Layout {
  explicit Layout(const KvShape& shape) : padded_dim(kernels::PaddedDim(shape.key_dim)) {
    keys = Add(kSegmentTokens * shape.KeyRowBytes());
    values = Add(kSegmentTokens * shape.ValueRowBytes());
    centre = Add(static_cast<size_t>(shape.key_dim) * sizeof(float));
    scan_blocks = Add(static_cast<size_t>(kBlocks) *
                      kernels::ScanBlockBytes(kernels::Symbols(padded_dim), shape.scan_bits));
    fine_records = Add(static_cast<size_t>(kSegmentTokens) *
                       kernels::FineRecordBytes(padded_dim, shape.value_dim));
    fine_factors = Add(kSegmentTokens * sizeof(kernels::FineFactors));
    block_means = Add(static_cast<size_t>(kBlocks) * shape.ValueRowBytes());
  }

  int padded_dim;
  size_t bytes = 0;
  size_t keys;
  size_t values;
  size_t centre;
  size_t scan_blocks;
  size_t fine_records;
  size_t fine_factors;
  size_t block_means;

 private:
  size_t Add(size_t part) {
    const size_t offset = bytes;
    bytes += (part + kCacheLine - 1) / kCacheLine * kCacheLine;
    return offset;
  }
};

Segment::Segment(const Layout& layout) : memory_(MakeSlot(layout.bytes)) {
  const auto at = [this](size_t offset) { return memory_.get() + offset; };
  keys_ = reinterpret_cast<uint16_t*>(at(layout.keys));
  values_ = reinterpret_cast<uint16_t*>(at(layout.values));
  centre_ = reinterpret_cast<float*>(at(layout.centre));
  scan_blocks_ = reinterpret_cast<uint8_t*>(at(layout.scan_blocks));
  fine_records_ = reinterpret_cast<uint8_t*>(at(layout.fine_records));
  fine_factors_ = reinterpret_cast<kernels::FineFactors*>(at(layout.fine_factors));
  block_means_ = reinterpret_cast<uint16_t*>(at(layout.block_means));
}

std::shared_ptr<const Segment> Segment::Build(const KvShape& shape, const uint16_t* keys,
                                              const uint16_t* values) {
  const Layout layout(shape);
  std::shared_ptr<Segment> segment(new Segment(layout));
  std::memcpy(segment->keys_, keys, kSegmentTokens * shape.KeyRowBytes());
  std::memcpy(segment->values_, values, kSegmentTokens * shape.ValueRowBytes());
  kernels::MeanRow(keys, shape.dtype, kSegmentTokens, shape.key_dim, segment->centre_);

  const auto residuals =
      MakeAligned<float>(static_cast<size_t>(kSegmentTokens) * layout.padded_dim);
  kernels::RotateResiduals(keys, shape.dtype, kSegmentTokens, shape.key_dim, segment->centre_,
                           residuals.get());
  segment->scan_noise_ = kernels::EncodeScanBlocks(residuals.get(), kBlocks, layout.padded_dim,
                                                   shape.scan_bits, segment->scan_blocks_);
  kernels::EncodeFine(residuals.get(), values, shape.dtype, kSegmentTokens, layout.padded_dim,
                      shape.value_dim, segment->fine_records_, segment->fine_factors_);
  kernels::BlockMeans(values, shape.dtype, kBlocks, shape.value_dim, segment->block_means_);
  return segment;
}

size_t Segment::Bytes(const KvShape& shape) { return sizeof(Segment) + Layout(shape).bytes; }

}  // namespace kvseek::index
