#include "index/segment.h"

#include <cstring>
#include <utility>

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

Segment::Segment(const Layout& layout, int node) : memory_(MakeSlot(layout.bytes, node)) {
  const auto at = [this](size_t offset) { return memory_.get() + offset; };
  keys_ = reinterpret_cast<uint16_t*>(at(layout.keys));
  values_ = reinterpret_cast<uint16_t*>(at(layout.values));
  centre_ = reinterpret_cast<float*>(at(layout.centre));
  scan_blocks_ = reinterpret_cast<uint8_t*>(at(layout.scan_blocks));
  fine_records_ = reinterpret_cast<uint8_t*>(at(layout.fine_records));
  fine_factors_ = reinterpret_cast<kernels::FineFactors*>(at(layout.fine_factors));
  block_means_ = reinterpret_cast<uint16_t*>(at(layout.block_means));
}

Segment::Draft::Draft(const KvShape& shape)
    : shape_(shape), segment_(new Segment(Layout(shape), shape.node)) {}

Segment::Draft::~Draft() = default;

std::shared_ptr<const Segment> Segment::Draft::Encode(Scratch& scratch) {
  Segment& segment = *segment_;
  const int key_dim = shape_.key_dim;
  const int padded_dim = kernels::PaddedDim(key_dim);
  kernels::MeanRow(segment.keys_, shape_.dtype, kSegmentTokens, key_dim, segment.centre_);
  auto* residuals =
      scratch.Take<float>(static_cast<size_t>(kSegmentTokens) * static_cast<size_t>(padded_dim));
  kernels::RotateResiduals(segment.keys_, shape_.dtype, kSegmentTokens, key_dim, segment.centre_,
                           residuals);
  segment.scan_noise_ = kernels::EncodeScanBlocks(residuals, kBlocks, padded_dim, shape_.scan_bits,
                                                  segment.scan_blocks_);
  kernels::EncodeFine(residuals, segment.values_, shape_.dtype, kSegmentTokens, padded_dim,
                      shape_.value_dim, segment.fine_records_, segment.fine_factors_);
  kernels::BlockMeans(segment.values_, shape_.dtype, kBlocks, shape_.value_dim,
                      segment.block_means_);
  return std::move(segment_);
}

std::shared_ptr<const Segment> Segment::Build(const KvShape& shape, const uint16_t* keys,
                                              const uint16_t* values) {
  Draft draft(shape);
  std::memcpy(draft.keys(), keys, kSegmentTokens * shape.KeyRowBytes());
  std::memcpy(draft.values(), values, kSegmentTokens * shape.ValueRowBytes());
  Scratch scratch;
  return draft.Encode(scratch);
}

size_t Segment::Bytes(const KvShape& shape) { return sizeof(Segment) + Layout(shape).bytes; }

}  // namespace kvseek::index
