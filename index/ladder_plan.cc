#include "index/ladder_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/reduce.h"
#include "kernels/cpu/rotation.h"
#include "kernels/cpu/threshold.h"

namespace kvseek::index {
namespace {

using kernels::kScanBlock;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr size_t kCentresAhead = 16;       // fetched before any is scored
constexpr int64_t kExactPartTokens = 128;  // a part has no fewer, unless it is all

}  // namespace

LadderPlan::LadderPlan(Scratch& memory, const KvView& view, const SearchQuery& query,
                       const SearchOptions& options, Scratch& scratch, Recall recall,
                       const ProductIndex* product)
    : memory_(memory),
      view_(view),
      query_(query),
      options_(options),
      group_(query.group),
      padded_dim_(kernels::PaddedDim(view.shape.key_dim)),
      scaled_(ScaleQueries(query, view.shape, memory)),
      exact_state_(MakeState(query.group, view.shape.value_dim, memory)),
      recall_(std::move(recall)),
      state_(MakeState(query.group, view.shape.value_dim, memory)) {
  first_block_ = (query.begin + kScanBlock - 1) / kScanBlock;
  const int64_t coded = product == nullptr ? view.SealedTokens() : product->covered();
  last_block_ = std::min(query.end, coded) / kScanBlock;
  last_block_ = std::max(last_block_, first_block_);
  if (recall_.last != nullptr) last_block_ = recall_.last->last_block;
  if (first_block_ == last_block_) {
    AttendExactPart(scratch);
    reference_ = LseOf(exact_state_, memory_);
    MergePieces(scratch);
    return;
  }
  PrepareQueries(product);
  if (recall_.last == nullptr) {
    step_ = codes_->TableParts() > 0 ? Step::kTables : Step::kSample;
    exact_step_ = step_;
    PlanExactParts(true);
    PlanSample();
    return;
  }
  for (int p = 0; p < codes_->TableParts(); ++p) {
    scratch.Reset();
    codes_->BuildTables(p, scratch);
  }
  AttendExactPart(scratch);
  reference_ = LseOf(exact_state_, memory_);
  ScoreCentres(FirstSegment(), LastSegment(), scratch);
  PrepareRecall();
  PlanScan();
}

SearchPhase LadderPlan::phase() const {
  switch (step_) {
    case Step::kTables:
    case Step::kSample:
      return SearchPhase::kSample;
    case Step::kScan:
      return SearchPhase::kScan;
    case Step::kRefine:
      break;
  }
  return SearchPhase::kRefine;
}

int LadderPlan::pieces() const {
  switch (step_) {
    case Step::kTables:
      return static_cast<int>(ExactPieces()) + codes_->TableParts();
    case Step::kSample:
      return static_cast<int>(ExactPieces() + sample_parts_.size());
    case Step::kScan:
      return static_cast<int>(pieces_.size());
    case Step::kRefine:
      break;
  }
  return static_cast<int>(picks_.size());
}

void LadderPlan::Run(int index, Scratch& scratch) {
  auto i = static_cast<size_t>(index);
  if (i < ExactPieces()) return AttendExactPart(exact_parts_[i], scratch);
  i -= ExactPieces();
  switch (step_) {
    case Step::kTables:
      scratch.Reset();
      codes_->BuildTables(static_cast<int>(i), scratch);
      break;
    case Step::kSample:
      RunSample(sample_parts_[i], scratch);
      break;
    case Step::kScan:
      kernels::ResetState(pieces_[i].state);
      RunScan(pieces_[i], scratch);
      ListBest(pieces_[i], scratch);
      break;
    case Step::kRefine:
      RefineBest(static_cast<int>(i), scratch);
      break;
  }
}

bool LadderPlan::NextStep(Scratch& scratch) {
  switch (step_) {
    case Step::kTables:
      step_ = Step::kSample;
      return true;
    case Step::kSample:
      MergeExactParts();
      ChooseThreshold(scratch);
      PlanScan();
      return true;
    case Step::kScan:
      MergePieces(scratch);
      return true;
    case Step::kRefine:
      break;
  }
  return false;
}

void LadderPlan::PlanScan() {
  step_ = Step::kScan;
  const int64_t piece_blocks =
      kSegmentBlocks *
      std::clamp((LastSegment() - FirstSegment()) / kPieces, kPieceSegmentsMin, kPieceSegmentsMax);
  const auto group = static_cast<size_t>(group_);
  const int64_t all = last_block_ - first_block_;
  const int64_t budget = std::max(options_.candidates, options_.k);
  pieces_.reserve(static_cast<size_t>(all / piece_blocks + 2));
  for (int64_t block = first_block_; block < last_block_;) {
    const int64_t end = std::min(last_block_, (block / piece_blocks + 1) * piece_blocks);
    const int floats = kernels::GroupStateFloats(group_, view_.shape.value_dim);
    float* const state = memory_.Take<float>(static_cast<size_t>(floats));
    Piece piece = {block, end, kernels::BindState(state, group_, view_.shape.value_dim)};
    piece.rest = memory_.Take<float>(group);
    // Room for half as many again as the budget's even share.
    const int64_t share = (end - block) * budget / all;
    const int64_t room = std::min(share + share / 2 + kScanBlock, (end - block) * kScanBlock);
    piece.candidates.capacity = static_cast<int>(room);
    piece.candidates.keys = memory_.Take<uint16_t>(static_cast<size_t>(room));
    piece.candidates.scores = memory_.Take<float>(static_cast<size_t>(room) * group);
    if (!listing_thresholds_.empty()) {
      // A head's threshold is for an eighth of the budget: room for twice as much and more.
      const int listed = static_cast<int>(room) * std::max(1, group_ / 4);
      piece.lists = {listed, memory_.Take<int>(group),
                     memory_.Take<Listed>(static_cast<size_t>(listed))};
    }
    pieces_.push_back(std::move(piece));
    block = end;
  }
}

void LadderPlan::Candidates::Reserve(int more, int group) {
  if (count + more <= capacity) return;
  const int room = std::max(2 * capacity, count + more);
  const auto size = static_cast<size_t>(room);
  auto memory = MakeAligned<std::byte>(
      size * (sizeof(uint16_t) + sizeof(float) * static_cast<size_t>(group)));
  auto* const scores_to = reinterpret_cast<float*>(memory.get());
  auto* const to = reinterpret_cast<uint16_t*>(scores_to + size * static_cast<size_t>(group));
  std::copy_n(keys, count, to);
  for (int h = 0; h < group; ++h) {
    std::copy_n(scores + static_cast<ptrdiff_t>(h) * capacity, count,
                scores_to + static_cast<ptrdiff_t>(h) * room);
  }
  grown = std::move(memory);
  keys = to;
  scores = scores_to;
  capacity = room;
}

void LadderPlan::PrepareQueries(const ProductIndex* product) {
  const auto group = static_cast<size_t>(group_);
  auto* const rotated = memory_.Take<float>(group * padded_dim_);
  kernels::Rotate(query_.queries, group_, view_.shape.key_dim, rotated);
  quantised_ = memory_.Take<int8_t>(group * padded_dim_);
  fine_slopes_ = memory_.Take<float>(group);
  kernels::QuantiseQueries(rotated, group_, padded_dim_, quantised_, fine_slopes_);
  const float scale = view_.shape.softmax_scale * kernels::kFourBitStep / 2.0F;
  for (int h = 0; h < group_; ++h) fine_slopes_[h] *= scale;
  centre_scores_ = memory_.Take<float>(Segments() * group);
  const ScanQueries queries = {group_, scaled_, rotated, centre_scores_, FirstSegment()};
  if (product != nullptr) {
    codes_ = &scan_.emplace<ProductScan>(*product, view_, queries, LastSegment() - 1, memory_);
  } else {
    codes_ = &scan_.emplace<SignScan>(view_, queries, memory_);
  }
}

void LadderPlan::ScoreCentres(int64_t first, int64_t last, Scratch& scratch) {
  scratch.Reset();
  const auto count = static_cast<size_t>(last - first);
  auto* const rows = scratch.Take<const float*>(count);
  auto* const scores = scratch.Take<float>(static_cast<size_t>(group_) * count);
  for (size_t s = 0; s < count; ++s) {
    rows[s] = view_.segments[static_cast<size_t>(first) + s]->centre();
    if (s < kCentresAhead) {  // the kernel fetches the others
      kernels::PrefetchRange(rows[s], static_cast<size_t>(view_.shape.key_dim) * sizeof(float));
    }
  }
  kernels::ScoreGatheredFloatRows(scaled_, group_, rows, static_cast<int>(count),
                                  view_.shape.key_dim, scores, static_cast<int>(count));
  float* to = centre_scores_ + (first - FirstSegment()) * group_;
  for (size_t s = 0; s < count; ++s) {
    for (int h = 0; h < group_; ++h) *to++ = scores[static_cast<size_t>(h) * count + s];
  }
}

void LadderPlan::PlanExactParts(bool may_cut) {
  const int64_t tokens = ExactTokens();
  if (tokens == 0) return;
  if (options_.k >= 0) {
    exact_keys_.positions.resize(static_cast<size_t>(tokens));
    exact_keys_.scores.resize(static_cast<size_t>(tokens * group_));
  }
  exact_part_count_ = 1;
  exact_parts_[0] = {0, tokens, exact_state_};
  if (!may_cut) return;
  // At whole chunks of the tail.
  const int64_t before = first_block_ * kScanBlock - query_.begin;
  const int64_t chunks = (tokens - before) / kTailChunkTokens;
  const int64_t parts = std::clamp<int64_t>(tokens / kExactPartTokens, 1, kExactPartsMax);
  for (int64_t p = 1; p < parts; ++p) {
    const int64_t cut = before + chunks * p / parts * kTailChunkTokens;
    exact_parts_[exact_part_count_ - 1].end = cut;
    exact_parts_[exact_part_count_++] = {cut, tokens,
                                         MakeState(group_, view_.shape.value_dim, memory_)};
  }
}

void LadderPlan::AttendExactPart(const ExactPart& part, Scratch& scratch) {
  int64_t index = part.begin;
  const auto visit = [&](const uint16_t* keys, const uint16_t* values, int64_t first, int tokens) {
    if (options_.k < 0) {
      kernels::AttendRows(scaled_, keys, values, view_.shape.dtype, tokens, view_.shape.key_dim,
                          part.state);
      return;
    }
    scratch.Reset();
    auto* scores = scratch.Take<float>(static_cast<size_t>(group_) * tokens);
    kernels::ScoreRows(scaled_, group_, keys, view_.shape.dtype, tokens, view_.shape.key_dim,
                       scores, tokens);
    kernels::AccumulateScored(scores, tokens, values, view_.shape.dtype, tokens, part.state);
    for (int t = 0; t < tokens; ++t, ++index) {
      exact_keys_.positions[static_cast<size_t>(index)] = first + t;
      for (int h = 0; h < group_; ++h) {
        exact_keys_.scores[static_cast<size_t>(index * group_ + h)] =
            scores[static_cast<ptrdiff_t>(h) * tokens + t];
      }
    }
  };
  const bool ladder = first_block_ < last_block_;
  const int64_t before = ladder ? first_block_ * kScanBlock - query_.begin : ExactTokens();
  const int64_t after = query_.end - ExactTokens();
  if (part.begin < before) {
    VisitRows(view_, query_.begin + part.begin, query_.begin + std::min(part.end, before), visit);
  }
  if (part.end > before) {
    VisitRows(view_, after + std::max(part.begin, before), after + part.end, visit);
  }
}

void LadderPlan::AttendExactPart(Scratch& scratch) {
  PlanExactParts(false);
  for (size_t p = 0; p < exact_part_count_; ++p) AttendExactPart(exact_parts_[p], scratch);
}

void LadderPlan::MergeExactParts() {
  for (size_t p = 1; p < exact_part_count_; ++p) {
    kernels::MergeState(exact_state_, exact_parts_[p].state);
  }
}

}  // namespace kvseek::index
