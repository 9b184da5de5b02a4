#include "index/sign_scan.h"

#include <cmath>
#include <limits>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/ladder_codes.h"
#include "kernels/cpu/ladder_sample.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/rotation.h"

namespace kvseek::index {
namespace {

using kernels::kScanBlock;

constexpr int64_t kSegmentBlocks = kSegmentTokens / kScanBlock;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

SignScan::SignScan(const KvView& view, const ScanQueries& queries, Scratch& memory)
    : view_(view),
      queries_(queries),
      symbols_(kernels::Symbols(kernels::PaddedDim(view.shape.key_dim))),
      table_units_(static_cast<size_t>(queries.group), &memory),
      query_norms_(&memory) {
  const int padded_dim = kernels::PaddedDim(view.shape.key_dim);
  tables_ =
      memory.Take<int8_t>(static_cast<size_t>(queries.group) * symbols_ * kernels::kTableSize);
  kernels::BuildTables(queries.rotated, queries.group, padded_dim, tables_, table_units_.data());
  query_norms_.reserve(table_units_.size());
  for (int h = 0; h < queries.group; ++h) {
    const float* row = queries.rotated + static_cast<ptrdiff_t>(h) * padded_dim;
    float squares = 0.0F;
    for (int d = 0; d < padded_dim; ++d) squares += row[d] * row[d];
    query_norms_.push_back(std::sqrt(squares));
  }
}

void SignScan::Scan(const SegmentPart& part, const uint8_t* next, std::byte* sums) const {
  kernels::ScanCodes(Block(part.block), part.blocks, symbols_, view_.shape.scan_bits, tables_,
                     queries_.group, reinterpret_cast<int16_t*>(sums), part.blocks * kScanBlock,
                     next);
}

void SignScan::Sample(absl::Span<const int64_t> blocks, const float* factors,
                      const kernels::SampleResults& results, Scratch& scratch) const {
  const auto group = static_cast<size_t>(queries_.group);
  auto* const codes = scratch.Take<const uint8_t*>(blocks.size());
  auto* const centres = scratch.Take<const float*>(blocks.size());
  auto* const noises = scratch.Take<float>(blocks.size());
  auto* const sums = scratch.Take<int16_t>(group * blocks.size() * kScanBlock);
  for (size_t i = 0; i < blocks.size(); ++i) {
    codes[i] = Block(blocks[i]);
    centres[i] = CentreScores(blocks[i] / kSegmentBlocks);
    noises[i] = SegmentOf(blocks[i]).scan_noise();
  }
  kernels::SampleHead heads[kMaxGroup];
  for (size_t h = 0; h < group; ++h)
    heads[h] = {Slope(h), view_.shape.softmax_scale * query_norms_[h]};
  kernels::SampleCodes({codes, centres, factors, static_cast<int>(blocks.size())}, noises, symbols_,
                       view_.shape.scan_bits, tables_, heads, queries_.group, sums, results);
}

int SignScan::Select(const SegmentPart& part, const std::byte* sums, const ScanBounds& bounds,
                     const uint8_t* next, const ScanResults& results) const {
  kernels::ScanHead heads[kMaxGroup];
  FillHeads(part.block / kSegmentBlocks, bounds, heads);
  const auto first = static_cast<uint32_t>((part.block % kSegmentBlocks) * kScanBlock);
  const int weighed = part.Weighed();
  const int chosen = kernels::SelectAndWeigh(
      reinterpret_cast<const int16_t*>(sums), part.blocks * kScanBlock, Block(part.block),
      part.blocks, part.weighed, symbols_, view_.shape.scan_bits, heads, queries_.group, first,
      results.chosen, results.block_weights, weighed, next);
  const float factor = part.Factor();
  for (int i = 0; i < queries_.group * weighed; ++i) results.block_weights[i] *= factor;
  SumBlockWeights(results, queries_.group, weighed);
  return chosen;
}

void SignScan::AddRest(const SegmentPart& part, const ScanResults& results, RestSums& rest) const {
  AddBlockMeans(SegmentOf(part.block), part, results, queries_.group, view_.shape.value_dim,
                rest.acc);
}

void SignScan::Weigh(int64_t block, int head, float reference, float* weights,
                     float* deviations) const {
  const int planes = view_.shape.scan_bits;
  const std::vector<float> references(static_cast<size_t>(queries_.group), reference);
  kernels::ScanHead heads[kMaxGroup];
  FillHeads(block / kSegmentBlocks, {{}, references.data()}, heads);
  const int8_t* const table =
      tables_ + static_cast<ptrdiff_t>(head) * symbols_ * kernels::kTableSize;
  alignas(kCacheLine) int16_t sums[kScanBlock];
  float estimates[kScanBlock];
  kernels::ScanCodes(Block(block), 1, symbols_, planes, table, 1, sums, kScanBlock);
  kernels::EstimateScores(sums, kScanBlock, Block(block), 1, symbols_, planes, heads + head, 1,
                          estimates, kScanBlock, weights);
  const auto* const gains =
      reinterpret_cast<const uint16_t*>(Block(block) + kernels::ScanGainOffset(symbols_, planes));
  for (int i = 0; i < kScanBlock; ++i) {
    deviations[i] = heads[head].noise * kernels::Bf16ToFloat(gains[i]);
  }
}

void SignScan::PrefetchRest(const SegmentPart& part) const {
  PrefetchBlockMeans(SegmentOf(part.block), part, view_.shape.value_dim);
}

float SignScan::Slope(size_t head) const {
  const float sum_unit = view_.shape.scan_bits == 1 ? 1.0F : kernels::kTwoBitStep / 2.0F;
  return view_.shape.softmax_scale * sum_unit * table_units_[head];
}

const float* SignScan::CentreScores(int64_t segment) const {
  return queries_.centre_scores + (segment - queries_.first_segment) * queries_.group;
}

void SignScan::FillHeads(int64_t segment, const ScanBounds& bounds,
                         kernels::ScanHead* heads) const {
  const float noise =
      view_.shape.softmax_scale * view_.segments[static_cast<size_t>(segment)]->scan_noise();
  const float* const centres = CentreScores(segment);
  for (int h = 0; h < queries_.group; ++h) {
    const auto i = static_cast<size_t>(h);
    heads[h] = {centres[h], Slope(i), noise * query_norms_[i],
                bounds.thresholds.empty() ? kInfinity : bounds.thresholds[i], bounds.reference[i]};
  }
}

const Segment& SignScan::SegmentOf(int64_t block) const {
  return *view_.segments[static_cast<size_t>(block / kSegmentBlocks)];
}

const uint8_t* SignScan::Block(int64_t block) const {
  return SegmentOf(block).scan_blocks() + (block % kSegmentBlocks) * ScannedBytes();
}

int SignScan::ScannedBytes() const {
  return kernels::ScanBlockBytes(symbols_, view_.shape.scan_bits);
}

int64_t SignScan::BytesRead(int64_t blocks, int64_t sampled, int weighed_step) const {
  return (blocks + sampled) * ScannedBytes() +
         blocks / weighed_step * static_cast<int64_t>(view_.shape.ValueRowBytes());
}

}  // namespace kvseek::index
