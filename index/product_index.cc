#include "index/product_index.h"

#include <time.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "index/ladder_plan.h"
#include "index/query_space.h"

namespace kvseek::index {
namespace {

constexpr int64_t kSegmentBlocks = kSegmentTokens / kernels::kScanBlock;
// A stretch of fewer segments borrows the codebook of the one before it.
constexpr int kTrainSegmentsMin = 16;

/// CPU time of the calling thread.
double ThreadSeconds() {
  timespec now = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

/// The codebook of a stretch of `segments`: one that is there, or null for a new one.
/// `before`: that of the stretch before, or null.
std::shared_ptr<const ProductCodebook> FindCodebook(
    const ProductStretch* previous, const std::shared_ptr<const ProductCodebook>& before,
    int segments) {
  const bool borrowed = previous != nullptr && previous->codebook == before;
  if (previous != nullptr && !borrowed && segments < 2 * previous->codebook->trained_segments) {
    return previous->codebook;
  }
  return segments < kTrainSegmentsMin ? before : nullptr;
}

/// How many segments there is memory for where there are so many. Powers of two, so that stretches
/// that grow fit few kinds of slots (slab_memory.h).
size_t RoomFor(int segments) {
  return static_cast<size_t>(std::bit_ceil(static_cast<uint32_t>(segments)));
}

/// Codes of `segments` with `book`: those of `previous` where it has the same, then new ones. Null
/// when it is given up.
std::shared_ptr<const ProductStretch> EncodeStretch(
    const BuildInput& input, absl::Span<const std::shared_ptr<const Segment>> segments,
    const std::shared_ptr<const ProductCodebook>& book, const ProductStretch* previous) {
  const KvShape& shape = input.view.shape;
  const size_t codes_each = CodeBytes(book->layout);
  const size_t sketches_each = SketchBytes(book->layout);
  const size_t mean_each = book->layout.sketch ? static_cast<size_t>(shape.value_dim) : 0;
  auto stretch = std::make_shared<ProductStretch>(book, static_cast<int>(segments.size()),
                                                  shape.value_dim, shape.node);
  size_t done = 0;
  if (previous != nullptr && previous->codebook == book) {
    done = std::min(static_cast<size_t>(previous->segments), segments.size());
    std::memcpy(stretch->codes, previous->codes, done * codes_each);
    if (book->layout.sketch) {
      std::memcpy(stretch->sketches, previous->sketches, done * sketches_each);
      std::memcpy(stretch->value_means.get(), previous->value_means.get(),
                  done * mean_each * sizeof(uint16_t));
    }
  }
  for (; done < segments.size(); ++done) {
    if (input.give_up()) return nullptr;
    book->Encode(shape, *segments[done], stretch->codes + done * codes_each,
                 stretch->sketches + done * sketches_each,
                 stretch->value_means.get() + done * mean_each);
  }
  return stretch;
}

}  // namespace

size_t CodeBytes(const kernels::ProductLayout& layout) {
  return static_cast<size_t>(kSegmentBlocks * layout.BlockBytes());
}

size_t SketchBytes(const kernels::ProductLayout& layout) {
  return layout.sketch ? static_cast<size_t>(kSegmentBlocks * kernels::kSketchBlockBytes) : 0;
}

ProductStretch::ProductStretch(std::shared_ptr<const ProductCodebook> book, int count,
                               int value_dim, int node)
    : codebook(std::move(book)),
      segments(count),
      memory(MakeSlot(
          RoomFor(count) * (CodeBytes(codebook->layout) + SketchBytes(codebook->layout)), node)) {
  codes = reinterpret_cast<uint8_t*>(memory.get());
  if (!codebook->layout.sketch) return;
  sketches = codes + RoomFor(count) * CodeBytes(codebook->layout);
  value_means = MakeAligned<uint16_t>(static_cast<size_t>(count) * static_cast<size_t>(value_dim));
}

size_t ProductStretch::Bytes(int value_dim) const {
  const kernels::ProductLayout& layout = codebook->layout;
  const size_t means = layout.sketch ? static_cast<size_t>(value_dim) * sizeof(uint16_t) : 0;
  return RoomFor(segments) * (CodeBytes(layout) + SketchBytes(layout)) +
         static_cast<size_t>(segments) * means;
}

std::shared_ptr<const ProductIndex> ProductIndex::Build(const BuildInput& input,
                                                        const kernels::ProductLayout& layout) {
  const double started = ThreadSeconds();
  if (input.query_positions.size() < kProductQueriesMin) return nullptr;
  const auto* const previous = dynamic_cast<const ProductIndex*>(input.previous.get());
  const auto& segments = input.view.segments;
  std::unique_ptr<const QuerySpace> space;  // made when it is needed
  std::vector<std::shared_ptr<const ProductStretch>> stretches;
  std::shared_ptr<const ProductCodebook> book;
  for (size_t first = 0; first < segments.size(); first += kStretchSegments) {
    const auto part = segments.subspan(first, kStretchSegments);
    const auto count = static_cast<int>(part.size());
    const ProductStretch* const taken =
        previous != nullptr && stretches.size() < previous->stretches().size()
            ? previous->stretches()[stretches.size()].get()
            : nullptr;
    auto found = FindCodebook(taken, book, count);
    if (found == nullptr) {
      if (input.give_up()) return nullptr;
      if (space == nullptr) space = std::make_unique<const QuerySpace>(input);
      found = ProductCodebook::Train(input.view.shape, part, space->factor(), layout);
    }
    book = std::move(found);
    if (taken != nullptr && taken->codebook == book && taken->segments == count) {
      stretches.push_back(previous->stretches()[stretches.size()]);
      continue;
    }
    stretches.push_back(EncodeStretch(input, part, book, taken));
    if (stretches.back() == nullptr) return nullptr;
  }
  if (stretches.empty()) return nullptr;
  return std::make_shared<const ProductIndex>(std::move(stretches), input.view.shape.value_dim,
                                              ThreadSeconds() - started);
}

ProductIndex::ProductIndex(std::vector<std::shared_ptr<const ProductStretch>> stretches,
                           int value_dim, double build_core_seconds)
    : stretches_(std::move(stretches)),
      value_dim_(value_dim),
      build_core_seconds_(build_core_seconds) {}

int64_t ProductIndex::covered() const {
  const auto full = static_cast<int64_t>(stretches_.size() - 1) * kStretchSegments;
  return (full + stretches_.back()->segments) * kSegmentTokens;
}

size_t ProductIndex::Bytes() const {
  size_t bytes = 0;
  const ProductCodebook* last = nullptr;
  for (const auto& stretch : stretches_) {
    bytes += stretch->Bytes(value_dim_);
    if (stretch->codebook.get() != last) bytes += stretch->codebook->Bytes();
    last = stretch->codebook.get();
  }
  return bytes;
}

PlanPtr ProductIndex::Plan(const KvView& view, const SearchQuery& query,
                           const SearchOptions& options, Scratch& scratch) const {
  return MakePlan<LadderPlan>(view, query, options, scratch, Recall{}, this);
}

}  // namespace kvseek::index
