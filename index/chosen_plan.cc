#include "index/chosen_plan.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>

#include "index/chosen_audit.h"
#include "index/rest_audit.h"
#include "index/reuse.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/ladder_codes.h"

namespace kvseek::index {
namespace {

constexpr int64_t kPieceTokens = 8 * kSegmentTokens;  ///< of consecutive keys
constexpr size_t kPieceRows = 1024;                   ///< of chosen keys
// Of scores within a part, in nats: half of it is the largest gain over the mean's weight.
constexpr float kVarianceMax = 4.0F;

/// ln(exp(a) + exp(b)).
float LogAdd(float a, float b) {
  const float larger = std::max(a, b);
  return std::isfinite(larger) ? larger + std::log1p(std::exp(std::min(a, b) - larger)) : larger;
}

class ChosenPlan final : public SearchPlan {
 public:
  ChosenPlan(Scratch& memory, const KvView& view, const SearchQuery& query,
             const SearchOptions& options, ChosenKeys chosen)
      : view_(view),
        query_(query),
        options_(options),
        chosen_(std::move(chosen)),
        queries_(ScaleQueries(query, view.shape, memory)) {
    for (size_t i = 0; i < chosen_.positions.size(); i += kPieceRows) {
      AddPiece({.first = i, .last = std::min(i + kPieceRows, chosen_.positions.size())});
    }
    for (int64_t at = std::max(query.begin, chosen_.covered); at < query.end;) {
      const int64_t end = std::min((at / kPieceTokens + 1) * kPieceTokens, query.end);
      AddPiece({.begin = at, .end = end});
      at = end;
    }
  }

  int pieces() const override { return static_cast<int>(pieces_.size()); }
  void Run(int index, Scratch& scratch) override;
  void Finish(SearchResult& result, Scratch& scratch) override;

 private:
  /// Either chosen keys [first, last) or consecutive ones [begin, end).
  struct Range {
    size_t first = 0;
    size_t last = 0;
    int64_t begin = 0;
    int64_t end = 0;
  };
  struct Piece {
    Range range;
    OwnedState state;
    ScoredKeys kept;  ///< TopK: all keys of the piece
  };

  void AddPiece(const Range& range) {
    pieces_.push_back({range, OwnedState(query_.group, view_.shape.value_dim), {}});
  }
  void ReadChosen(Piece& piece, Scratch& scratch) const;
  void ReadRun(Piece& piece, Scratch& scratch) const;
  /// Of the unread parts, from their means.
  OwnedState RestState() const;
  void ReportMissed(absl::Span<const float> read, absl::Span<const float> rest,
                    SearchReport& report, Scratch& scratch) const;
  std::shared_ptr<const LastSearch> MakeLast(absl::Span<const float> read,
                                             absl::Span<const float> rest) const;
  void TakeTopK(const ScoredKeys& kept, absl::Span<const float> read, absl::Span<const float> rest,
                OwnedState& state, SearchResult& result, Scratch& scratch) const;

  const KvView view_;
  const SearchQuery query_;
  const SearchOptions options_;
  const ChosenKeys chosen_;
  const float* const queries_;  ///< (group, key_dim), times softmax_scale
  std::vector<Piece> pieces_;
};

void ChosenPlan::Run(int index, Scratch& scratch) {
  scratch.Reset();
  Piece& piece = pieces_[static_cast<size_t>(index)];
  if (piece.range.first < piece.range.last) {
    ReadChosen(piece, scratch);
  } else {
    ReadRun(piece, scratch);
  }
}

void ChosenPlan::ReadChosen(Piece& piece, Scratch& scratch) const {
  const size_t count = piece.range.last - piece.range.first;
  auto* keys = scratch.Take<const uint16_t*>(count);
  auto* values = scratch.Take<const uint16_t*>(count);
  auto* scores = scratch.Take<float>(static_cast<size_t>(query_.group) * count);
  for (size_t i = 0; i < count; ++i) {
    const RowPointers row = FindRow(view_, chosen_.positions[piece.range.first + i]);
    keys[i] = row.key;
    values[i] = row.value;
  }
  const auto rows = static_cast<int>(count);
  kernels::ScoreGathered(queries_, query_.group, keys, view_.shape.dtype, rows, view_.shape.key_dim,
                         scores, rows);
  kernels::AccumulateScoredGathered(scores, rows, values, view_.shape.dtype, rows,
                                    piece.state.view());
  if (options_.k < 0) return;
  for (size_t i = 0; i < count; ++i) {
    piece.kept.Add(chosen_.positions[piece.range.first + i], scores + i, rows, query_.group);
  }
}

void ChosenPlan::ReadRun(Piece& piece, Scratch& scratch) const {
  const auto tokens = static_cast<int>(piece.range.end - piece.range.begin);
  const int group = query_.group;
  float* const scores =
      options_.k < 0 ? nullptr : scratch.Take<float>(static_cast<size_t>(group) * tokens);
  VisitRows(view_, piece.range.begin, piece.range.end,
            [&](const uint16_t* keys, const uint16_t* values, int64_t first, int count) {
              if (scores == nullptr) {
                kernels::AttendRows(queries_, keys, values, view_.shape.dtype, count,
                                    view_.shape.key_dim, piece.state.view());
                return;
              }
              float* const part = scores + (first - piece.range.begin);
              kernels::ScoreRows(queries_, group, keys, view_.shape.dtype, count,
                                 view_.shape.key_dim, part, tokens);
              kernels::AccumulateScored(part, tokens, values, view_.shape.dtype, count,
                                        piece.state.view());
            });
  for (int t = 0; t < tokens && scores != nullptr; ++t) {
    piece.kept.Add(piece.range.begin + t, scores + t, tokens, group);
  }
}

OwnedState ChosenPlan::RestState() const {
  OwnedState rest(query_.group, view_.shape.value_dim);
  std::vector<const uint16_t*> values;
  values.reserve(chosen_.unread.size());
  for (const UnreadPart& part : chosen_.unread) {
    values.push_back(part.parts->mean_values() +
                     static_cast<ptrdiff_t>(part.part) * view_.shape.value_dim);
  }
  const auto count = static_cast<int>(values.size());
  kernels::AccumulateScoredGathered(chosen_.weights.data(), count, values.data(),
                                    kernels::DType::kBf16, count, rest.view());
  return rest;
}

void ChosenPlan::Finish(SearchResult& result, Scratch& scratch) {
  OwnedState state(query_.group, view_.shape.value_dim);
  ScoredKeys kept;
  for (const Piece& piece : pieces_) {
    kernels::MergeState(state.view(), piece.state.view());
    kept.Append(piece.kept);
  }
  const std::vector<float> read_lse = state.Lse();
  const OwnedState rest = RestState();
  const std::vector<float> rest_lse = rest.Lse();
  std::shared_ptr<const LastSearch> last;
  if (options_.keep > 0) last = MakeLast(read_lse, rest_lse);
  if (options_.estimate_rest) kernels::MergeState(state.view(), rest.view());

  result.last = std::move(last);
  const int64_t run = query_.end - std::min(query_.end, std::max(query_.begin, chosen_.covered));
  const auto chosen = static_cast<int64_t>(chosen_.positions.size());
  result.report.keys_scanned = std::max(chosen_.keys_scored, chosen) + run;
  result.report.keys_exact = chosen + run;
  result.report.keys_chosen = chosen;
  result.report.bytes_touched =
      chosen_.bytes_touched +
      result.report.keys_exact *
          static_cast<int64_t>(view_.shape.KeyRowBytes() + view_.shape.ValueRowBytes()) +
      static_cast<int64_t>(chosen_.unread.size() * view_.shape.ValueRowBytes());
  if (options_.k >= 0) {
    scratch.Reset();
    TakeTopK(kept, read_lse, rest_lse, state, result, scratch);
  } else {
    ReportMissed(read_lse, rest_lse, result.report, scratch);
    if (options_.list_read) {
      result.positions = chosen_.positions;
      for (int64_t p = query_.end - run; p < query_.end; ++p) result.positions.push_back(p);
    }
  }
  result.out.resize(static_cast<size_t>(query_.group) * view_.shape.value_dim);
  result.lse.resize(static_cast<size_t>(query_.group));
  kernels::FinishState(state.view(), result.out.data(), result.lse.data());
}

/// `read` and `rest`: (group), logarithms of the masses.
void ChosenPlan::ReportMissed(absl::Span<const float> read, absl::Span<const float> rest,
                              SearchReport& report, Scratch& scratch) const {
  std::vector<RestRatio> ratios(read.size());
  if (options_.audit_samples > 0 && !chosen_.unread.empty()) {
    ratios = AuditChosen(view_, query_, options_, chosen_, queries_, scratch);
  }
  for (size_t h = 0; h < read.size(); ++h) {
    const bool has_rest = std::isfinite(rest[h]);
    const float log_odds = has_rest ? rest[h] - read[h] : -std::numeric_limits<float>::infinity();
    const auto share = [&](float factor) {
      return has_rest ? 1.0F / (1.0F + std::exp(-log_odds) / factor) : 0.0F;
    };
    report.missed_mass.push_back(share(ratios[h].mean));
    report.missed_low.push_back(share(ratios[h].low));
    report.missed_high.push_back(share(ratios[h].high));
  }
}

std::shared_ptr<const LastSearch> ChosenPlan::MakeLast(absl::Span<const float> read,
                                                       absl::Span<const float> rest) const {
  constexpr int64_t kBlock = kernels::kScanBlock;
  auto last = std::make_shared<LastSearch>();
  last->group = query_.group;
  last->begin = query_.begin;
  last->first_block = (query_.begin + kBlock - 1) / kBlock;
  last->last_block = std::max(last->first_block, std::min(query_.end, chosen_.covered) / kBlock);
  last->queries.assign(query_.queries,
                       query_.queries + static_cast<ptrdiff_t>(query_.group) * view_.shape.key_dim);
  const auto whole = [&](int64_t position) {
    return position >= last->first_block * kBlock && position < last->last_block * kBlock;
  };
  std::merge(chosen_.positions.begin(), chosen_.positions.end(), chosen_.kept.begin(),
             chosen_.kept.end(), std::back_inserter(last->positions));
  std::erase_if(last->positions, [&](int64_t position) { return !whole(position); });
  for (size_t h = 0; h < read.size(); ++h) {
    last->reference.push_back(LogAdd(read[h], rest[h]));
    last->missed.push_back(std::exp(rest[h] - last->reference[h]));
  }
  const auto blocks = static_cast<size_t>(last->last_block - last->first_block);
  last->block_weights.resize(read.size() * blocks);
  for (size_t p = 0; p < chosen_.unread.size(); ++p) {
    const UnreadPart& part = chosen_.unread[p];
    if (part.kept) continue;
    for (const int64_t position : UnreadKeys(part, chosen_, query_)) {
      if (!whole(position)) continue;
      const auto block = static_cast<size_t>(position / kBlock - last->first_block);
      for (size_t h = 0; h < read.size(); ++h) {
        last->block_weights[h * blocks + block] +=
            std::exp(chosen_.weights[h * chosen_.unread.size() + p] - last->reference[h]) /
            static_cast<float>(part.keys);
      }
    }
  }
  return last;
}

/// The parts that were read and are not returned stay in the state. They are summed anew: a
/// difference of nearly equal sums is noise.
void ChosenPlan::TakeTopK(const ScoredKeys& kept, absl::Span<const float> read,
                          absl::Span<const float> rest, OwnedState& state, SearchResult& result,
                          Scratch& scratch) const {
  std::vector<float> all;
  for (size_t h = 0; h < read.size(); ++h) all.push_back(LogAdd(read[h], rest[h]));
  const size_t keys = kept.positions.size();
  std::vector<bool> returned(keys);
  for (const uint32_t i : BestIndices(GroupScores(kept, all, scratch), options_.k, scratch)) {
    returned[i] = true;
    result.positions.push_back(kept.positions[i]);
  }
  std::vector<float> scores(read.size() * keys);
  std::vector<const uint16_t*> values;
  for (size_t i = 0; i < keys; ++i) {
    if (returned[i]) continue;
    for (size_t h = 0; h < read.size(); ++h) {
      scores[h * keys + values.size()] = kept.Scores(i, query_.group)[h];
    }
    values.push_back(FindRow(view_, kept.positions[i]).value);
  }
  kernels::ResetState(state.view());
  kernels::AccumulateScoredGathered(scores.data(), static_cast<int>(keys), values.data(),
                                    view_.shape.dtype, static_cast<int>(values.size()),
                                    state.view());
  const std::vector<float> left = state.Lse();
  if (options_.estimate_rest) kernels::MergeState(state.view(), RestState().view());
  for (size_t h = 0; h < all.size(); ++h) {
    const float missed = LogAdd(left[h], rest[h]);
    result.report.missed_mass.push_back(std::isfinite(missed) ? std::exp(missed - all[h]) : 0.0F);
  }
  result.report.missed_low = result.report.missed_mass;
  result.report.missed_high = result.report.missed_mass;
}

}  // namespace

float PartWeight(float mean, float variance, int keys) {
  return mean + 0.5F * std::min(variance, kVarianceMax) + std::log(static_cast<float>(keys));
}

std::vector<int64_t> UnreadKeys(const UnreadPart& part, const ChosenKeys& chosen,
                                const SearchQuery& query) {
  std::vector<int64_t> keys;
  for (const uint16_t member : part.parts->Members(part.part)) {
    const int64_t position = part.parts->begin() + member;
    if (position >= query.begin && position < query.end &&
        !std::binary_search(chosen.positions.begin(), chosen.positions.end(), position)) {
      keys.push_back(position);
    }
  }
  return keys;
}

PlanPtr PlanChosen(const KvView& view, const SearchQuery& query, const SearchOptions& options,
                   ChosenKeys chosen) {
  return MakePlan<ChosenPlan>(view, query, options, std::move(chosen));
}

}  // namespace kvseek::index
