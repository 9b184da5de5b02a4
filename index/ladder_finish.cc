// Putting a ladder search together: merge, exact rows or the returned keys, report.
#include <algorithm>
#include <cmath>

#include "index/ladder_audit.h"
#include "index/ladder_plan.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/prefetch.h"

namespace kvseek::index {
namespace {

using kernels::kScanBlock;

/// Scores of head `head` of all keys.
std::vector<float> HeadScores(const ScoredKeys& keys, int head, int group) {
  std::vector<float> scores(keys.positions.size());
  for (size_t i = 0; i < scores.size(); ++i) scores[i] = keys.Scores(i, group)[head];
  return scores;
}

}  // namespace

void LadderPlan::MergePieces(Scratch& scratch) {
  step_ = Step::kRefine;
  kernels::MergeState(state_.view(), exact_state_.view());
  size_t keys = 0;
  for (const Piece& piece : pieces_) keys += piece.candidates.positions.size();
  candidates_.Reserve(keys, group_);
  for (const Piece& piece : pieces_) {
    kernels::MergeState(state_.view(), piece.state.view());
    candidates_.Append(piece.candidates);
  }
  if (recall_.last != nullptr) {
    recall_ratios_ = CheckRecall(state_.Lse(), candidates_, result_.report, scratch);
  } else if (options_.keep > 0 && !pieces_.empty()) {
    result_.last = MakeLast(state_.Lse());
  }
  const bool refines = options_.k < 0 && options_.exact_rows > 0 && keys > 0;
  picks_.resize(refines ? static_cast<size_t>(group_) : 0);
}

SearchResult LadderPlan::Finish(Scratch& scratch) {
  if (options_.k >= 0) {
    TakeTopK(candidates_, state_, result_, scratch);
  } else {
    ReportMissed(state_.Lse(), candidates_, recall_ratios_, result_.report, scratch);
    if (options_.list_read) ListRead();
  }
  ReportReads(candidates_, result_.report);
  result_.out.resize(static_cast<size_t>(group_) * static_cast<size_t>(view_.shape.value_dim));
  result_.lse.resize(static_cast<size_t>(group_));
  kernels::FinishState(state_.view(), result_.out.data(), result_.lse.data());
  return std::move(result_);
}

void LadderPlan::ListRead() {
  std::vector<int64_t>& positions = result_.positions;
  for (int64_t p = query_.begin; p < first_block_ * kScanBlock && p < query_.end; ++p) {
    positions.push_back(p);
  }
  positions.insert(positions.end(), candidates_.positions.begin(), candidates_.positions.end());
  const int64_t ladder_end = std::max(query_.begin, last_block_ * kScanBlock);
  for (int64_t p = ladder_end; p < query_.end; ++p) positions.push_back(p);
}

void LadderPlan::RefineBest(int head, Scratch& scratch) {
  std::vector<uint32_t>& picks = picks_[static_cast<size_t>(head)];
  picks = BestIndices(HeadScores(candidates_, head, group_), options_.exact_rows);
  scratch.Reset();
  const auto count = static_cast<int>(picks.size());
  auto* keys = scratch.Take<const uint16_t*>(picks.size());
  auto* values = scratch.Take<const uint16_t*>(picks.size());
  auto* scores = scratch.Take<float>(picks.size());
  for (size_t i = 0; i < picks.size(); ++i) {
    const RowPointers row = FindRow(view_, candidates_.positions[picks[i]]);
    keys[i] = row.key;
    values[i] = row.value;
    kernels::PrefetchRange(row.key, view_.shape.KeyRowBytes());
    kernels::PrefetchRange(row.value, view_.shape.ValueRowBytes());
  }
  // While the rows arrive.
  OwnedState fine(1, view_.shape.value_dim);
  AddFine(candidates_, picks, head, fine.view(), scratch);
  const float* query = scaled_.get() + static_cast<ptrdiff_t>(head) * view_.shape.key_dim;
  kernels::ScoreGathered(query, 1, keys, view_.shape.dtype, count, view_.shape.key_dim, scores,
                         count);
  OwnedState exact(1, view_.shape.value_dim);
  kernels::AccumulateScoredGathered(scores, count, values, view_.shape.dtype, count, exact.view());
  const kernels::GroupState state = HeadState(state_.view(), head);
  kernels::MergeState(state, exact.view());
  SubtractState(state, fine.view());
}

void LadderPlan::TakeTopK(const ScoredKeys& candidates, OwnedState& state, SearchResult& result,
                          Scratch& scratch) {
  const std::vector<float> lse = state.Lse();
  ScoredKeys keys = candidates;
  keys.Append(exact_keys_);
  const std::vector<uint32_t> best = BestIndices(GroupScores(keys, lse), options_.k);
  std::vector<uint32_t> fine;   // indices into candidates
  std::vector<uint32_t> exact;  // indices into exact_keys_
  const auto split = static_cast<uint32_t>(candidates.positions.size());
  for (const uint32_t i : best) {
    result.positions.push_back(keys.positions[i]);
    if (i < split) {
      fine.push_back(i);
    } else {
      exact.push_back(i - split);
    }
  }
  std::sort(result.positions.begin(), result.positions.end());

  OwnedState returned(group_, view_.shape.value_dim);
  AddFine(candidates, fine, 0, returned.view(), scratch);
  scratch.Reset();
  const auto count = static_cast<int>(exact.size());
  auto* scores = scratch.Take<float>(static_cast<size_t>(group_) * exact.size());
  auto* values = scratch.Take<const uint16_t*>(exact.size());
  for (size_t i = 0; i < exact.size(); ++i) {
    values[i] = FindRow(view_, exact_keys_.positions[exact[i]]).value;
    for (int h = 0; h < group_; ++h) {
      scores[static_cast<size_t>(h) * exact.size() + i] = exact_keys_.Scores(exact[i], group_)[h];
    }
  }
  kernels::AccumulateScoredGathered(scores, count, values, view_.shape.dtype, count,
                                    returned.view());
  if (static_cast<int64_t>(best.size()) == query_.end - query_.begin) {
    kernels::ResetState(state.view());
  } else {
    SubtractState(state.view(), returned.view());
  }
  const std::vector<float> rest = state.Lse();
  for (size_t h = 0; h < rest.size(); ++h) {
    const float missed = std::isfinite(lse[h]) ? std::exp(rest[h] - lse[h]) : 0.0F;
    result.report.missed_mass.push_back(missed);
  }
  result.report.missed_low = result.report.missed_mass;
  result.report.missed_high = result.report.missed_mass;
}

void LadderPlan::AddFine(const ScoredKeys& candidates, absl::Span<const uint32_t> picks, int head,
                         const kernels::GroupState& state, Scratch& scratch) const {
  auto* rows = scratch.Take<kernels::FineRow>(picks.size());
  auto* scores = scratch.Take<float>(static_cast<size_t>(state.group) * picks.size());
  for (size_t i = 0; i < picks.size(); ++i) {
    rows[i] = FindFine(candidates.positions[picks[i]]);
    const float* const of_key = candidates.Scores(picks[i], group_) + head;
    for (size_t h = 0; h < static_cast<size_t>(state.group); ++h) {
      scores[h * picks.size() + i] = of_key[h];
    }
  }
  const auto count = static_cast<int>(picks.size());
  kernels::AccumulateFine(rows, count, kernels::FineValueOffset(padded_dim_), scores, count, state);
}

std::vector<float> LadderPlan::RestMass() const {
  std::vector<float> masses(static_cast<size_t>(group_), 0.0F);
  for (const Piece& piece : pieces_) {
    for (size_t h = 0; h < masses.size(); ++h) masses[h] += piece.rest[h];
  }
  return masses;
}

void LadderPlan::ReportMissed(absl::Span<const float> lse, const ScoredKeys& candidates,
                              absl::Span<const RestRatio> ratios, SearchReport& report,
                              Scratch& scratch) const {
  const std::vector<float> masses = RestMass();
  for (int h = 0; h < group_; ++h) {
    const auto i = static_cast<size_t>(h);
    const float rest = masses[i];
    // Masses relative to exp(reference).
    const float all = std::isfinite(lse[i]) ? std::exp(lse[i] - reference_[i]) : 0.0F;
    const float read = std::max(all - rest, 0.0F);
    const auto share = [read](float missed) {
      return missed > 0.0F ? missed / (read + missed) : 0.0F;
    };
    RestRatio ratio;
    if (!ratios.empty()) {
      ratio = ratios[i];
    } else if (options_.audit_samples > 0 && rest > 0.0F) {
      ratio = LadderAudit::Sample(*this, candidates, h, scratch);
    }
    report.missed_mass.push_back(share(rest * ratio.mean));
    report.missed_low.push_back(share(rest * ratio.low));
    report.missed_high.push_back(share(rest * ratio.high));
  }
}

void LadderPlan::ReportReads(const ScoredKeys& candidates, SearchReport& report) const {
  const KvShape& shape = view_.shape;
  const int64_t blocks = last_block_ - first_block_;
  std::vector<bool> read(candidates.positions.size());
  for (const auto& picks : picks_) {
    for (const uint32_t i : picks) read[i] = true;
  }
  const auto fine = static_cast<int64_t>(candidates.positions.size());
  const auto row_bytes = static_cast<int64_t>(shape.KeyRowBytes() + shape.ValueRowBytes());
  report.keys_fine = fine;
  report.keys_chosen = fine;
  report.keys_exact = exact_tokens_ + std::count(read.begin(), read.end(), true);
  int64_t chosen_by = 0;  // bytes
  if (recall_.last == nullptr) {
    report.keys_scanned = query_.end - query_.begin;
    chosen_by =
        codes_ == nullptr ? 0 : codes_->BytesRead(blocks, static_cast<int64_t>(sample_.size()));
  } else {
    report.keys_scanned = fine + exact_tokens_ + recall_.samples;
    chosen_by = static_cast<int64_t>(recalled_weights_.size() * sizeof(float)) +
                recall_.samples * static_cast<int64_t>(shape.KeyRowBytes()) +
                blocks * static_cast<int64_t>(shape.ValueRowBytes());
  }
  report.bytes_touched =
      chosen_by +
      static_cast<int64_t>(centre_scores_.size()) / group_ * shape.key_dim *
          static_cast<int64_t>(sizeof(float)) +
      fine * static_cast<int64_t>(kernels::FineRecordBytes(padded_dim_, shape.value_dim) +
                                  sizeof(kernels::FineFactors)) +
      report.keys_exact * row_bytes;
}

}  // namespace kvseek::index
