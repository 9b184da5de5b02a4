// Putting a ladder search together: merge, exact rows or the returned keys, report.
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "index/ladder_audit.h"
#include "index/ladder_plan.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/prefetch.h"

namespace kvseek::index {
namespace {

using kernels::kScanBlock;

}  // namespace

void LadderPlan::MergePieces(Scratch& scratch) {
  step_ = Step::kRefine;
  const int64_t exact_rows =
      options_.k < 0 ? std::min<int64_t>(options_.exact_rows, CandidateCount()) : 0;
  const bool refines = exact_rows > 0;
  picks_.resize(refines ? static_cast<size_t>(group_) : 0);
  for (auto& picks : picks_) picks.reserve(static_cast<size_t>(exact_rows));
  // Else each head's worker does it.
  merged_ = !refines || recall_.last != nullptr || options_.keep > 0;
  for (int h = 0; h < group_ && merged_; ++h) MergeHead(h);
  if (options_.k >= 0 || options_.list_read || options_.audit_samples > 0 ||
      recall_.last != nullptr) {
    candidates_ = AllCandidates();
  }
  if (recall_.last != nullptr) {
    recall_ratios_ = CheckRecall(LseOf(state_, memory_), candidates_, scratch);
  } else if (options_.keep > 0 && !pieces_.empty()) {
    last_ = MakeLast(LseOf(state_, memory_));
  }
}

void LadderPlan::MergeHead(int head) {
  const kernels::GroupState state = HeadState(state_, head);
  kernels::MergeState(state, HeadState(exact_state_, head));
  for (const Piece& piece : pieces_) kernels::MergeState(state, HeadState(piece.state, head));
}

int64_t LadderPlan::CandidateCount() const {
  int64_t count = 0;
  for (const Piece& piece : pieces_) count += piece.candidates.count;
  return count;
}

ScoredKeys LadderPlan::AllCandidates() const {
  ScoredKeys all(memory_);
  all.Reserve(static_cast<size_t>(CandidateCount()), group_);
  for (const Piece& piece : pieces_) {
    const Candidates& candidates = piece.candidates;
    for (int i = 0; i < candidates.count; ++i) {
      all.Add(piece.FirstPosition() + candidates.keys[i], candidates.scores + i,
              candidates.capacity, group_);
    }
  }
  return all;
}

void LadderPlan::Finish(SearchResult& result, Scratch& scratch) {
  if (options_.k >= 0) {
    TakeTopK(candidates_, result, scratch);
  } else {
    ReportMissed(LseOf(state_, memory_), candidates_, recall_ratios_, result.report, scratch);
    if (options_.list_read) ListRead(result.positions);
  }
  ReportReads(result.report, scratch);
  result.report.reused = recall_.last != nullptr;
  result.report.trusted = trusted_;
  result.last = std::move(last_);
  result.out.resize(static_cast<size_t>(group_) * static_cast<size_t>(view_.shape.value_dim));
  result.lse.resize(static_cast<size_t>(group_));
  kernels::FinishState(state_, result.out.data(), result.lse.data());
}

void LadderPlan::ListRead(std::vector<int64_t>& positions) const {
  for (int64_t p = query_.begin; p < first_block_ * kScanBlock && p < query_.end; ++p) {
    positions.push_back(p);
  }
  positions.insert(positions.end(), candidates_.positions.begin(), candidates_.positions.end());
  const int64_t ladder_end = std::max(query_.begin, last_block_ * kScanBlock);
  for (int64_t p = ladder_end; p < query_.end; ++p) positions.push_back(p);
}

LadderPlan::HeadCandidates LadderPlan::BestOrAll(int head, Scratch& scratch) const {
  bool complete = true;
  size_t listed = 0;
  for (const Piece& piece : pieces_) {
    const auto [begin, end] = piece.lists.Of(head);
    complete = complete && end <= piece.lists.capacity;
    listed += static_cast<size_t>(end - begin);
  }
  const auto all = static_cast<size_t>(CandidateCount());
  const bool enough = complete && listed >= std::min(all, static_cast<size_t>(options_.exact_rows));
  const size_t count = enough ? listed : all;
  const HeadCandidates found = {count, scratch.Take<uint32_t>(count), scratch.Take<int64_t>(count),
                                scratch.Take<float>(count)};
  size_t at = 0;
  size_t before = 0;  // candidates of earlier pieces
  for (const Piece& piece : pieces_) {
    const Candidates& candidates = piece.candidates;
    const auto piece_count = static_cast<size_t>(candidates.count);
    if (enough) {
      const auto [begin, end] = piece.lists.Of(head);
      for (int i = begin; i < end; ++i, ++at) {
        const Listed& key = piece.lists.keys[i];
        found.numbers[at] = static_cast<uint32_t>(before + key.number);
        found.positions[at] = piece.FirstPosition() + key.key;
        found.scores[at] = key.score;
      }
    } else {
      std::iota(found.numbers + before, found.numbers + before + piece_count,
                static_cast<uint32_t>(before));
      std::transform(candidates.keys, candidates.keys + piece_count, found.positions + before,
                     [&piece](uint16_t key) { return piece.FirstPosition() + key; });
      std::copy_n(candidates.scores + static_cast<ptrdiff_t>(head) * candidates.capacity,
                  piece_count, found.scores + before);
    }
    before += piece_count;
  }
  return found;
}

LadderPlan::HeadCandidates LadderPlan::FindBest(int head, Scratch& scratch) const {
  HeadCandidates best = BestOrAll(head, scratch);
  const auto picks = BestIndices({best.scores, best.count}, options_.exact_rows, scratch);
  best.count = picks.size();
  for (size_t i = 0; i < picks.size(); ++i) {  // ascending: none is overwritten before it is read
    best.numbers[i] = best.numbers[picks[i]];
    best.positions[i] = best.positions[picks[i]];
    best.scores[i] = best.scores[picks[i]];
  }
  return best;
}

void LadderPlan::PrefetchPieces(int head) const {
  for (const Piece& piece : pieces_) {
    const auto [begin, end] = piece.lists.Of(head);
    const int listed = std::min(end, piece.lists.capacity) - begin;
    if (listed > 0) {
      kernels::PrefetchRange(piece.lists.keys + begin,
                             static_cast<size_t>(listed) * sizeof(Listed));
    }
    if (merged_) continue;
    const kernels::GroupState state = HeadState(piece.state, head);
    kernels::PrefetchRange(state.acc, static_cast<size_t>(state.value_dim) * sizeof(float));
    kernels::PrefetchRange(state.max, sizeof(float));
  }
}

void LadderPlan::RefineBest(int head, Scratch& scratch) {
  PrefetchPieces(head);
  scratch.Reset();
  const HeadCandidates best = FindBest(head, scratch);
  picks_[static_cast<size_t>(head)].assign(best.numbers, best.numbers + best.count);
  const auto count = static_cast<int>(best.count);
  auto* const fine_rows = scratch.Take<kernels::FineRow>(best.count);
  auto* const keys = scratch.Take<const uint16_t*>(best.count);
  auto* const values = scratch.Take<const uint16_t*>(best.count);
  auto* const scores = scratch.Take<float>(best.count);
  const auto value_offset = static_cast<size_t>(kernels::FineValueOffset(padded_dim_));
  const auto record_bytes =
      static_cast<size_t>(kernels::FineRecordBytes(padded_dim_, view_.shape.value_dim));
  for (size_t i = 0; i < best.count; ++i) {
    const RowPointers row = FindRow(view_, best.positions[i]);
    keys[i] = row.key;
    values[i] = row.value;
    fine_rows[i] = FindFine(best.positions[i]);
    kernels::PrefetchRange(fine_rows[i].record + value_offset, record_bytes - value_offset);
    kernels::PrefetchRange(fine_rows[i].factors, sizeof(kernels::FineFactors));
  }
  for (size_t i = 0; i < best.count; ++i) {
    kernels::PrefetchRange(keys[i], view_.shape.KeyRowBytes());
    kernels::PrefetchRange(values[i], view_.shape.ValueRowBytes());
  }
  // While the rows arrive.
  if (!merged_) MergeHead(head);
  const kernels::GroupState fine = MakeState(1, view_.shape.value_dim, scratch);
  kernels::AccumulateFine(fine_rows, count, static_cast<int>(value_offset), best.scores, count,
                          fine);
  const float* query = scaled_ + static_cast<ptrdiff_t>(head) * view_.shape.key_dim;
  kernels::ScoreGathered(query, 1, keys, view_.shape.dtype, count, view_.shape.key_dim, scores,
                         count);
  const kernels::GroupState exact = MakeState(1, view_.shape.value_dim, scratch);
  kernels::AccumulateScoredGathered(scores, count, values, view_.shape.dtype, count, exact);
  const kernels::GroupState state = HeadState(state_, head);
  kernels::MergeState(state, exact);
  SubtractState(state, fine);
}

void LadderPlan::TakeTopK(const ScoredKeys& candidates, SearchResult& result, Scratch& scratch) {
  scratch.Reset();
  const auto lse = LseOf(state_, scratch);
  ScoredKeys keys(scratch);
  keys.Reserve(candidates.positions.size() + exact_keys_.positions.size(), group_);
  keys.Append(candidates);
  keys.Append(exact_keys_);
  const auto best = BestIndices(GroupScores(keys, lse, scratch), options_.k, scratch);
  std::pmr::vector<uint32_t> fine(&scratch);   // indices into candidates
  std::pmr::vector<uint32_t> exact(&scratch);  // indices into exact_keys_
  result.positions.reserve(best.size());
  fine.reserve(best.size());
  exact.reserve(best.size());
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

  const kernels::GroupState returned = MakeState(group_, view_.shape.value_dim, scratch);
  AddFine(candidates, fine, returned, scratch);
  const auto count = static_cast<int>(exact.size());
  auto* scores = scratch.Take<float>(static_cast<size_t>(group_) * exact.size());
  auto* values = scratch.Take<const uint16_t*>(exact.size());
  for (size_t i = 0; i < exact.size(); ++i) {
    values[i] = FindRow(view_, exact_keys_.positions[exact[i]]).value;
    for (int h = 0; h < group_; ++h) {
      scores[static_cast<size_t>(h) * exact.size() + i] = exact_keys_.Scores(exact[i], group_)[h];
    }
  }
  kernels::AccumulateScoredGathered(scores, count, values, view_.shape.dtype, count, returned);
  if (static_cast<int64_t>(best.size()) == query_.end - query_.begin) {
    kernels::ResetState(state_);
  } else {
    SubtractState(state_, returned);
  }
  const auto rest = LseOf(state_, scratch);
  result.report.missed_mass.resize(rest.size());
  for (size_t h = 0; h < rest.size(); ++h) {
    const float missed = std::isfinite(lse[h]) ? std::exp(rest[h] - lse[h]) : 0.0F;
    result.report.missed_mass[h] = missed;
  }
  result.report.missed_low = result.report.missed_mass;
  result.report.missed_high = result.report.missed_mass;
}

void LadderPlan::AddFine(const ScoredKeys& candidates, absl::Span<const uint32_t> picks,
                         const kernels::GroupState& state, Scratch& scratch) const {
  auto* rows = scratch.Take<kernels::FineRow>(picks.size());
  auto* scores = scratch.Take<float>(static_cast<size_t>(state.group) * picks.size());
  for (size_t i = 0; i < picks.size(); ++i) {
    rows[i] = FindFine(candidates.positions[picks[i]]);
    const float* const of_key = candidates.Scores(picks[i], group_);
    for (size_t h = 0; h < static_cast<size_t>(state.group); ++h) {
      scores[h * picks.size() + i] = of_key[h];
    }
  }
  const auto count = static_cast<int>(picks.size());
  kernels::AccumulateFine(rows, count, kernels::FineValueOffset(padded_dim_), scores, count, state);
}

std::pmr::vector<float> LadderPlan::RestMass() const {
  std::pmr::vector<float> masses(static_cast<size_t>(group_), 0.0F, &memory_);
  for (const Piece& piece : pieces_) {
    for (size_t h = 0; h < masses.size(); ++h) masses[h] += piece.rest[h];
  }
  return masses;
}

void LadderPlan::ReportMissed(absl::Span<const float> lse, const ScoredKeys& candidates,
                              absl::Span<const RestRatio> ratios, SearchReport& report,
                              Scratch& scratch) const {
  const auto masses = RestMass();
  for (auto* const missed : {&report.missed_mass, &report.missed_low, &report.missed_high}) {
    missed->reserve(masses.size());
  }
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

void LadderPlan::ReportReads(SearchReport& report, Scratch& scratch) const {
  const KvShape& shape = view_.shape;
  const int64_t blocks = last_block_ - first_block_;
  const int64_t fine = CandidateCount();
  // One bit a candidate: several heads may have picked the same one.
  scratch.Reset();
  const auto words = static_cast<size_t>(fine + 63) / 64;
  auto* const read = scratch.Take<uint64_t>(words);
  std::fill_n(read, words, 0);
  for (const auto& picks : picks_) {
    for (const uint32_t i : picks) read[i / 64] |= uint64_t{1} << (i % 64);
  }
  int64_t refined = 0;
  for (size_t w = 0; w < words; ++w) refined += std::popcount(read[w]);
  const auto row_bytes = static_cast<int64_t>(shape.KeyRowBytes() + shape.ValueRowBytes());
  report.keys_fine = fine;
  report.keys_chosen = fine;
  report.keys_exact = ExactTokens() + refined;
  int64_t chosen_by = 0;  // bytes
  if (recall_.last == nullptr) {
    report.keys_scanned = query_.end - query_.begin;
    chosen_by = codes_ == nullptr ? 0
                                  : codes_->BytesRead(blocks, static_cast<int64_t>(sample_.size()),
                                                      WeighedStep());
  } else {
    report.keys_scanned = fine + ExactTokens() + recall_.samples;
    chosen_by = static_cast<int64_t>(recalled_weights_.size() * sizeof(float)) +
                recall_.samples * static_cast<int64_t>(shape.KeyRowBytes()) +
                blocks * static_cast<int64_t>(shape.ValueRowBytes());
  }
  report.bytes_touched =
      chosen_by +
      static_cast<int64_t>(Segments()) * shape.key_dim * static_cast<int64_t>(sizeof(float)) +
      fine * static_cast<int64_t>(kernels::FineRecordBytes(padded_dim_, shape.value_dim) +
                                  sizeof(kernels::FineFactors)) +
      report.keys_exact * row_bytes;
}

}  // namespace kvseek::index
