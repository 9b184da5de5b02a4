#include "index/product_scan.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/value_sketch.h"

namespace kvseek::index {
namespace {

using kernels::kScanBlock;
using kernels::kSketchDim;

constexpr int64_t kSegmentBlocks = kSegmentTokens / kScanBlock;
constexpr int64_t kStretchBlocks = kStretchSegments * kSegmentBlocks;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Rows of a query map that are fetched before the first is used; the kernel fetches the others.
constexpr size_t kFirstRows = 32;

void FetchRows(const uint16_t* rows, size_t elements) {
  kernels::PrefetchRange(rows, elements * sizeof(uint16_t));
}

}  // namespace

ProductScan::ProductScan(const ProductIndex& index, const KvView& view, const ScanQueries& queries,
                         int64_t last_segment, Scratch& memory)
    : index_(index),
      view_(view),
      queries_(queries),
      layout_(index.layout()),
      first_stretch_(queries.first_segment / kStretchSegments),
      tables_(&memory),
      tables_of_(&memory) {
  const auto group = static_cast<size_t>(queries.group);
  const int64_t last_stretch = last_segment / kStretchSegments;
  tables_of_.reserve(static_cast<size_t>(last_stretch - first_stretch_ + 1));
  for (int64_t s = first_stretch_; s <= last_stretch; ++s) {
    const ProductCodebook* const book = index.stretches()[static_cast<size_t>(s)]->codebook.get();
    if (tables_.empty() || tables_.back().book != book) {
      tables_.push_back({book,
                         memory.Take<uint8_t>(group * static_cast<size_t>(layout_.Symbols()) *
                                              kernels::kTableSize),
                         memory.Take<kernels::ProductTables>(group)});
    }
    tables_of_.push_back(tables_.size() - 1);
  }
}

void ProductScan::BuildTables(int part, Scratch& scratch) {
  const Tables& tables = tables_[static_cast<size_t>(part)];
  const ProductCodebook& book = *tables.book;
  const int key_dim = view_.shape.key_dim;
  const auto dim = static_cast<size_t>(key_dim);
  FetchRows(book.search_query_map(), kFirstRows * dim);
  FetchRows(book.search_centroids(), book.centroids.size());
  auto* const seen = scratch.Take<float>(static_cast<size_t>(queries_.group) * dim);
  kernels::ScoreRows(queries_.scaled, queries_.group, book.search_query_map(),
                     kernels::DType::kBf16, key_dim, key_dim, seen, key_dim);
  kernels::BuildProductTables(seen, queries_.group, key_dim, book.search_centroids(),
                              book.starts.data(), book.errors.data(), layout_, tables.entries,
                              tables.heads);
}

void ProductScan::Scan(const SegmentPart& part, const uint8_t* next, std::byte* sums) const {
  kernels::ScanProducts(Block(part.block), part.blocks, layout_, TablesOf(part.block).entries,
                        queries_.group, reinterpret_cast<uint8_t*>(sums), part.blocks * kScanBlock,
                        next);
}

void ProductScan::Sample(absl::Span<const int64_t> blocks, const float* factors,
                         const kernels::SampleResults& results, Scratch& scratch) const {
  auto* const codes = scratch.Take<const uint8_t*>(blocks.size());
  auto* const centres = scratch.Take<const float*>(blocks.size());
  auto* const sums =
      scratch.Take<uint8_t>(static_cast<size_t>(queries_.group) * blocks.size() * kScanBlock);
  for (size_t first = 0; first < blocks.size();) {  // those of one codebook at a time
    const Tables& tables = TablesOf(blocks[first]);
    size_t end = first;
    for (; end < blocks.size() && &TablesOf(blocks[end]) == &tables; ++end) {
      codes[end] = Block(blocks[end]);
      centres[end] = CentreScores(blocks[end]);
    }
    kernels::SampleProducts(
        {codes + first, centres + first, factors + first, static_cast<int>(end - first)}, layout_,
        tables.entries, tables.heads, queries_.group, sums,
        {results.estimates + first * kScanBlock, results.stride, results.largest, results.mass});
    first = end;
  }
}

int ProductScan::Select(const SegmentPart& part, const std::byte* sums, const ScanBounds& bounds,
                        const uint8_t* next, const ScanResults& results) const {
  kernels::ProductHead heads[kMaxGroup];
  FillHeads(part.block, bounds, heads);
  const auto first = static_cast<uint32_t>((part.block % kSegmentBlocks) * kScanBlock);
  const int keys = part.blocks * kScanBlock;
  const int weighed = part.Weighed();
  const int chosen =
      kernels::SelectProducts(reinterpret_cast<const uint8_t*>(sums), keys, Block(part.block),
                              part.blocks, part.weighed, layout_, heads, queries_.group, first,
                              {results.chosen, results.key_weights, keys, results.weight_units,
                               results.sums, results.block_weights, weighed},
                              next);
  const float factor = part.Factor();
  for (int h = 0; h < queries_.group; ++h) {
    results.weight_units[h] *= factor;
    results.sums[h] *= factor;
  }
  if (results.block_weights == nullptr) return chosen;
  for (int i = 0; i < queries_.group * weighed; ++i) results.block_weights[i] *= factor;
  return chosen;
}

void ProductScan::AddRest(const SegmentPart& part, const ScanResults& results,
                          RestSums& rest) const {
  const int64_t number = part.block / kSegmentBlocks;
  if (!layout_.sketch) {
    AddBlockMeans(*view_.segments[static_cast<size_t>(number)], part, results, queries_.group,
                  view_.shape.value_dim, rest.acc);
    return;
  }
  if (rest.segments == RestSums::kSegments || number % kStretchSegments == 0) FinishRest(rest);
  if (rest.segments == 0) {
    rest.first_segment = number;
    std::fill_n(rest.components, queries_.group * kSketchDim, 0.0F);
  }
  for (int h = 0; h < queries_.group; ++h) {
    rest.weights[h * RestSums::kSegments + rest.segments] = results.sums[h];
  }
  ++rest.segments;
  kernels::AddSketches(StretchOf(part.block).Sketches(part.block % kStretchBlocks), part.blocks,
                       part.weighed, results.key_weights, part.blocks * kScanBlock,
                       results.weight_units, queries_.group, rest.components);
}

void ProductScan::FinishRest(RestSums& rest) const {
  if (rest.segments == 0) return;
  const int value_dim = view_.shape.value_dim;
  const ProductStretch& stretch = StretchOf(rest.first_segment * kSegmentBlocks);
  kernels::AddWeightedRows(
      rest.weights, RestSums::kSegments, queries_.group,
      stretch.value_means.get() + rest.first_segment % kStretchSegments * value_dim, value_dim,
      rest.segments, value_dim, rest.acc);
  kernels::AddWeightedRows(rest.components, kSketchDim, queries_.group,
                           stretch.codebook->sketch_rows.data(), value_dim, kSketchDim, value_dim,
                           rest.acc);
  rest.segments = 0;
}

void ProductScan::Weigh(int64_t block, int head, float reference, float* weights,
                        float* deviations) const {
  const std::vector<float> references(static_cast<size_t>(queries_.group), reference);
  kernels::ProductHead heads[kMaxGroup];
  FillHeads(block, {{}, references.data()}, heads);
  alignas(kCacheLine) uint8_t sums[kScanBlock];
  float estimates[kScanBlock];
  const uint8_t* const entries = TablesOf(block).entries + static_cast<ptrdiff_t>(head) *
                                                               layout_.Symbols() *
                                                               kernels::kTableSize;
  kernels::ScanProducts(Block(block), 1, layout_, entries, 1, sums, kScanBlock);
  kernels::EstimateProducts(sums, kScanBlock, Block(block), 1, layout_, heads + head, 1, estimates,
                            weights, deviations, kScanBlock);
}

void ProductScan::PrefetchRest(const SegmentPart& part) const {
  const int value_dim = view_.shape.value_dim;
  const int64_t number = part.block / kSegmentBlocks;
  if (!layout_.sketch) {
    PrefetchBlockMeans(*view_.segments[static_cast<size_t>(number)], part, value_dim);
    return;
  }
  const ProductStretch& stretch = StretchOf(part.block);
  kernels::PrefetchRange(stretch.value_means.get() + number % kStretchSegments * value_dim,
                         view_.shape.ValueRowBytes());
  const uint8_t* const sketches = stretch.Sketches(part.block % kStretchBlocks);
  for (int b = part.weighed.first; b < part.blocks; b += part.weighed.step) {
    kernels::PrefetchRange(sketches + static_cast<ptrdiff_t>(b) * kernels::kSketchBlockBytes,
                           kernels::kSketchBlockBytes);
  }
}

const uint8_t* ProductScan::Block(int64_t block) const {
  return StretchOf(block).Block(block % kStretchBlocks);
}

int64_t ProductScan::BytesRead(int64_t blocks, int64_t sampled, int weighed_step) const {
  const auto value_bytes = static_cast<int64_t>(view_.shape.ValueRowBytes());
  const int64_t dim = view_.shape.key_dim;
  const int64_t weighed = blocks / weighed_step;
  const int64_t means = layout_.sketch ? (blocks + kSegmentBlocks - 1) / kSegmentBlocks : weighed;
  const int64_t book = dim * (dim + kernels::kCentroids) * static_cast<int64_t>(sizeof(uint16_t)) +
                       kernels::kCentroids * static_cast<int64_t>(sizeof(float)) +
                       (layout_.sketch ? kSketchDim * value_bytes : 0);
  return (blocks + sampled) * layout_.BlockBytes() +
         (layout_.sketch ? weighed * kernels::kSketchBlockBytes : 0) + means * value_bytes +
         static_cast<int64_t>(tables_.size()) * book;
}

const ProductStretch& ProductScan::StretchOf(int64_t block) const {
  return *index_.stretches()[static_cast<size_t>(block / kStretchBlocks)];
}

const ProductScan::Tables& ProductScan::TablesOf(int64_t block) const {
  return tables_[tables_of_[static_cast<size_t>(block / kStretchBlocks - first_stretch_)]];
}

const float* ProductScan::CentreScores(int64_t block) const {
  return queries_.centre_scores +
         (block / kSegmentBlocks - queries_.first_segment) * queries_.group;
}

void ProductScan::FillHeads(int64_t block, const ScanBounds& bounds,
                            kernels::ProductHead* heads) const {
  const Tables& tables = TablesOf(block);
  const float* const centres = CentreScores(block);
  for (int h = 0; h < queries_.group; ++h) {
    const auto i = static_cast<size_t>(h);
    heads[h] = {tables.heads + i, centres[h],
                bounds.thresholds.empty() ? kInfinity : bounds.thresholds[i], bounds.reference[i]};
  }
}

}  // namespace kvseek::index
