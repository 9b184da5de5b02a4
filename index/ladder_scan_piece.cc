// The scan of one piece: estimates for all keys, 4 bits for the candidates.
#include <algorithm>
#include <utility>

#include "index/ladder_plan.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/threshold.h"

namespace kvseek::index {
namespace {

// A piece that has this many times the whole budget in candidates chooses no more: the sample had
// missed a crowd, and the cost of a search must stay bounded. The estimate and the report still
// cover what is left out.
constexpr int64_t kCandidateBoundFactor = 2;

// What unread keys weigh is estimated from one block in up to so many of the range, as long as at
// least so many are left: they are many and none of them weighs much, so that weighing all hardly
// changes an answer (docs/performance.md).
constexpr int64_t kWeighedStepMax = 8;
constexpr int64_t kWeighedBlocksMin = 192;

}  // namespace

int LadderPlan::WeighedStep() const {
  // A recalled search's weights are there already.
  if (recall_.last != nullptr) return 1;
  const int64_t step = (last_block_ - first_block_) / kWeighedBlocksMin;
  return static_cast<int>(std::clamp<int64_t>(step, 1, kWeighedStepMax));
}

SegmentPart LadderPlan::PartOf(int64_t begin_block, int64_t end_block) const {
  const auto blocks = static_cast<int>(end_block - begin_block);
  const int step = std::min(WeighedStep(), blocks);
  // Not the same ones in each segment: texts repeat themselves at regular distances.
  const uint64_t segment = static_cast<uint64_t>(begin_block / kSegmentBlocks);
  const uint64_t mixed = segment * 0x9E3779B97F4A7C15U >> 32U;
  return {begin_block, blocks, {static_cast<int>(mixed % static_cast<uint64_t>(step)), step}};
}

void LadderPlan::RunScan(Piece& piece, Scratch& scratch) {
  const auto group = static_cast<size_t>(group_);
  const auto piece_blocks = static_cast<size_t>(piece.last_block - piece.first_block);
  if (options_.audit_samples > 0) piece.block_weights.resize(piece_blocks * group);
  if (options_.keep > 0) piece.kept_weights.resize(piece_blocks * group);
  scratch.Reset();
  const bool by_block =
      options_.audit_samples > 0 || recall_.last != nullptr || codes_->RestByBlock();
  const ScanBuffers buffers = {
      scratch.Take<std::byte>(group * kSegmentTokens * kSumBytes),
      {nullptr, by_block ? scratch.Take<float>(group * kSegmentBlocks) : nullptr,
       scratch.Take<uint8_t>(group * kSegmentTokens), scratch.Take<float>(group),
       scratch.Take<float>(group)},
      scratch.Take<uint32_t>(kSegmentTokens),
      scratch.Take<float>(group * kSegmentBlocks)};
  Pending pending = {0, scratch.Take<kernels::FineRow>(kPendingWhole + kSegmentTokens)};
  Chosen chosen = {0, 0, scratch.Take<uint32_t>(kSegmentTokens)};
  Chosen before = {0, 0, scratch.Take<uint32_t>(kSegmentTokens)};
  // The estimated rest is summed relative to reference_.
  const kernels::GroupState rest = MakeState(group_, view_.shape.value_dim, scratch);
  for (size_t h = 0; h < group; ++h) rest.max[h] = reference_[h];
  RestSums rest_sums = {rest.acc, scratch.Take<float>(group * RestSums::kSegments),
                        scratch.Take<float>(group * kernels::kSketchDim)};
  for (int64_t block = piece.first_block; block < piece.last_block;) {
    const int64_t end = std::min(piece.last_block, (block / kSegmentBlocks + 1) * kSegmentBlocks);
    const SegmentPart part = PartOf(block, end);
    if (recall_.last != nullptr) {
      RecallSegmentPart(part, buffers, chosen);
    } else {
      ScanSegmentPart(piece, part, buffers, chosen);
    }
    AddRest(piece, part, buffers, rest, rest_sums);
    // Records arrive from memory while the next segment is scanned. In two halves, since all at
    // once are more lines than a core waits for.
    const int half = chosen.count / 2;
    PrefetchRecords(chosen, 0, half);
    AddCandidates(piece, before, pending);
    PrefetchRecords(chosen, half, chosen.count);
    std::swap(chosen, before);
    block = end;
  }
  AddCandidates(piece, before, pending);
  ReadPending(piece, pending, pending.count);
  codes_->FinishRest(rest_sums);
  for (size_t h = 0; h < group; ++h) piece.rest[h] = rest.sum[h];
  kernels::MergeState(piece.state, rest);
}

void LadderPlan::ScanSegmentPart(Piece& piece, const SegmentPart& part, const ScanBuffers& buffers,
                                 Chosen& chosen) {
  const auto bound = kCandidateBoundFactor * std::max(options_.candidates, options_.k);
  const bool full = piece.candidates.count >= bound;

  chosen.segment = part.block / kSegmentBlocks;
  // Its pointers are read when its codes are asked for, while the segment before it is scanned.
  const auto after_next = static_cast<size_t>(chosen.segment) + 2;
  if (after_next < view_.segments.size()) {
    kernels::PrefetchRange(view_.segments[after_next].get(), sizeof(Segment));
  }
  const uint8_t* next = NextCodes(part);
  codes_->PrefetchRest(part);
  codes_->Scan(part, next, buffers.sums);
  if (options_.keep > 0) KeepKeys(piece, part, buffers);
  const ScanBounds bounds = {full ? absl::Span<const float>() : thresholds_, reference_.data()};
  ScanResults results = buffers.results;
  results.chosen = chosen.keys;
  chosen.count = codes_->Select(part, buffers.sums, bounds, next, results);
}

void LadderPlan::KeepKeys(Piece& piece, const SegmentPart& part, const ScanBuffers& buffers) {
  const bool full =
      static_cast<int64_t>(piece.kept.size()) >= kCandidateBoundFactor * options_.keep;
  const ScanBounds bounds = {full ? absl::Span<const float>() : keep_thresholds_,
                             reference_.data()};
  ScanResults results = buffers.results;
  results.chosen = buffers.kept;
  results.block_weights = buffers.kept_weights;
  const SegmentPart whole = {part.block, part.blocks};  // later searches ask for each block's
  const int count = codes_->Select(whole, buffers.sums, bounds, nullptr, results);
  const int64_t segment_start = part.block / kSegmentBlocks * kSegmentTokens;
  for (int i = 0; i < count; ++i) piece.kept.push_back(segment_start + buffers.kept[i]);
  const int64_t piece_blocks = piece.last_block - piece.first_block;
  for (int h = 0; h < group_; ++h) {
    std::copy_n(buffers.kept_weights + static_cast<ptrdiff_t>(h) * part.blocks, part.blocks,
                piece.kept_weights.begin() + h * piece_blocks + part.block - piece.first_block);
  }
}

void LadderPlan::AddRest(Piece& piece, const SegmentPart& part, const ScanBuffers& buffers,
                         const kernels::GroupState& rest, RestSums& rest_sums) {
  codes_->AddRest(part, buffers.results, rest_sums);
  for (int h = 0; h < group_; ++h) rest.sum[h] += buffers.results.sums[h];
  if (options_.audit_samples == 0) return;
  const auto piece_blocks = piece.last_block - piece.first_block;
  const int weighed = part.Weighed();
  const float share = 1.0F / part.Factor();
  for (int h = 0; h < group_; ++h) {
    const float* const weights =
        buffers.results.block_weights + static_cast<ptrdiff_t>(h) * weighed;
    float* const of_blocks =
        piece.block_weights.data() + h * piece_blocks + part.block - piece.first_block;
    for (int b = 0; b < part.blocks; ++b) of_blocks[b] = share * weights[b * weighed / part.blocks];
  }
}

const uint8_t* LadderPlan::NextCodes(const SegmentPart& part) const {
  const int64_t next = part.block + part.blocks;
  return next + part.blocks <= last_block_ ? codes_->Block(next) : nullptr;
}

void LadderPlan::PrefetchRecords(const Chosen& chosen, int begin, int end) const {
  const Segment& codes = *view_.segments[static_cast<size_t>(chosen.segment)];
  const auto record_bytes =
      static_cast<size_t>(kernels::FineRecordBytes(padded_dim_, view_.shape.value_dim));
  for (int i = begin; i < end; ++i) {
    kernels::PrefetchRange(codes.fine_records() + chosen.keys[i] * record_bytes, record_bytes);
    kernels::PrefetchRange(codes.fine_factors() + chosen.keys[i], 1);
  }
}

void LadderPlan::AddCandidates(Piece& piece, const Chosen& chosen, Pending& pending) const {
  if (chosen.count == 0) return;
  const auto record_bytes =
      static_cast<size_t>(kernels::FineRecordBytes(padded_dim_, view_.shape.value_dim));
  const Segment& segment = *view_.segments[static_cast<size_t>(chosen.segment)];
  Candidates& candidates = piece.candidates;
  candidates.Reserve(chosen.count, group_);
  kernels::FineRow* const rows = pending.rows + pending.count;
  uint16_t* const keys = candidates.keys + candidates.count;
  const int64_t first = chosen.segment * kSegmentTokens - piece.FirstPosition();
  for (int i = 0; i < chosen.count; ++i) {
    rows[i] = {segment.fine_records() + chosen.keys[i] * record_bytes,
               segment.fine_factors() + chosen.keys[i]};
    keys[i] = static_cast<uint16_t>(first + chosen.keys[i]);
  }
  const float* const centres = centre_scores_ + (chosen.segment - FirstSegment()) * group_;
  for (int h = 0; h < group_; ++h) {
    float* const scores =
        candidates.scores + static_cast<ptrdiff_t>(h) * candidates.capacity + candidates.count;
    std::fill_n(scores, chosen.count, centres[h]);
  }
  candidates.count += chosen.count;
  pending.count += chosen.count;
  ReadPending(piece, pending, pending.count / kPendingWhole * kPendingWhole);
}

void LadderPlan::ReadPending(Piece& piece, Pending& pending, int count) const {
  if (count == 0) return;
  const Candidates& candidates = piece.candidates;
  float* const scores = candidates.scores + candidates.count - pending.count;
  kernels::ScoreFine(pending.rows, count,
                     kernels::FineRecordBytes(padded_dim_, view_.shape.value_dim), quantised_,
                     padded_dim_, fine_slopes_, group_, scores, candidates.capacity);
  kernels::AccumulateFine(pending.rows, count, kernels::FineValueOffset(padded_dim_), scores,
                          candidates.capacity, piece.state);
  std::copy(pending.rows + count, pending.rows + pending.count, pending.rows);
  pending.count -= count;
}

void LadderPlan::ListBest(Piece& piece, Scratch& scratch) const {
  const Lists& lists = piece.lists;
  if (lists.capacity == 0) return;
  const Candidates& candidates = piece.candidates;
  auto* const reached = scratch.Take<uint32_t>(static_cast<size_t>(candidates.count));
  int end = 0;
  for (int h = 0; h < group_; ++h) {
    const float* const scores = candidates.scores + static_cast<ptrdiff_t>(h) * candidates.capacity;
    const auto count = static_cast<int>(kernels::IndicesFrom(
        scores, candidates.count, listing_thresholds_[static_cast<size_t>(h)], reached));
    const int room = std::clamp(lists.capacity - end, 0, count);
    for (int i = 0; i < room; ++i) {
      const uint32_t number = reached[i];
      lists.keys[end + i] = {scores[number], static_cast<uint16_t>(number),
                             candidates.keys[number]};
    }
    end += count;
    lists.ends[h] = end;
  }
}

kernels::FineRow LadderPlan::FindFine(int64_t position) const {
  const Segment& codes = *view_.segments[static_cast<size_t>(position / kSegmentTokens)];
  const int64_t key = position % kSegmentTokens;
  return {codes.fine_records() + key * kernels::FineRecordBytes(padded_dim_, view_.shape.value_dim),
          codes.fine_factors() + key};
}

}  // namespace kvseek::index
