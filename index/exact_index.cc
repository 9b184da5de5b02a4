// Every key of the range, exactly. Attend is one pass; TopK keeps each head's best of a piece,
// since the best of the group are among them whatever the heads' sums turn out to be.
#include <algorithm>
#include <cmath>

#include "index/key_index.h"
#include "index/selection.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/threshold.h"

namespace kvseek::index {
namespace {

constexpr int64_t kPieceTokens = 8 * kSegmentTokens;

class ExactPlan final : public SearchPlan {
 public:
  ExactPlan(Scratch& memory, const KvView& view, const SearchQuery& query,
            const SearchOptions& options)
      : memory_(memory),
        view_(view),
        query_(query),
        options_(options),
        queries_(ScaleQueries(query, view.shape, memory)) {
    const int64_t first = query.begin / kPieceTokens;
    const int64_t last = (query.end + kPieceTokens - 1) / kPieceTokens;
    const int64_t pieces = query.begin < query.end ? last - first : 0;
    pieces_.reserve(static_cast<size_t>(pieces));
    for (int64_t i = 0; i < pieces; ++i) {
      pieces_.push_back({std::max(query.begin, (first + i) * kPieceTokens),
                         std::min(query.end, (first + i + 1) * kPieceTokens),
                         MakeState(query.group, view.shape.value_dim, memory),
                         {}});
    }
  }

  int pieces() const override { return static_cast<int>(pieces_.size()); }

  void Run(int index, Scratch& scratch) override {
    Piece& piece = pieces_[static_cast<size_t>(index)];
    if (options_.k < 0) {
      VisitRows(view_, piece.begin, piece.end,
                [&](const uint16_t* keys, const uint16_t* values, int64_t, int tokens) {
                  kernels::AttendRows(queries_, keys, values, view_.shape.dtype, tokens,
                                      view_.shape.key_dim, piece.state);
                });
    } else {
      RunTopK(piece, scratch);
    }
  }

  void Finish(SearchResult& result, Scratch& scratch) override {
    const kernels::GroupState state = MakeState(query_.group, view_.shape.value_dim, memory_);
    ScoredKeys kept;
    for (const Piece& piece : pieces_) {
      kernels::MergeState(state, piece.state);
      kept.Append(piece.kept);
    }
    const int64_t range = query_.end - query_.begin;
    FillReport(range, result.report);
    if (options_.k >= 0) {
      TakeTopK(kept, range, state, result, scratch);
    } else if (options_.list_read) {
      for (int64_t position = query_.begin; position < query_.end; ++position) {
        result.positions.push_back(position);
      }
    }
    result.out.resize(static_cast<size_t>(query_.group) * view_.shape.value_dim);
    result.lse.resize(static_cast<size_t>(query_.group));
    kernels::FinishState(state, result.out.data(), result.lse.data());
  }

 private:
  struct Piece {
    int64_t begin;
    int64_t end;
    kernels::GroupState state;
    ScoredKeys kept;  ///< TopK: a superset of the piece's share of the answer
  };

  void RunTopK(Piece& piece, Scratch& scratch) {
    scratch.Reset();
    const int group = query_.group;
    const auto tokens = static_cast<int>(piece.end - piece.begin);
    auto* scores = scratch.Take<float>(static_cast<size_t>(group) * tokens);
    VisitRows(view_, piece.begin, piece.end,
              [&](const uint16_t* keys, const uint16_t* values, int64_t first, int count) {
                float* part = scores + (first - piece.begin);
                kernels::ScoreRows(queries_, group, keys, view_.shape.dtype, count,
                                   view_.shape.key_dim, part, tokens);
                kernels::AccumulateScored(part, tokens, values, view_.shape.dtype, count,
                                          piece.state);
              });
    auto* work = scratch.Take<int32_t>(static_cast<size_t>(tokens));
    auto* thresholds = scratch.Take<float>(static_cast<size_t>(group));
    for (int h = 0; h < group; ++h) {
      thresholds[h] = kernels::RankThreshold(scores + static_cast<ptrdiff_t>(h) * tokens, tokens,
                                             options_.k, work);
    }
    for (int t = 0; t < tokens; ++t) {
      bool keep = false;
      for (int h = 0; h < group; ++h) {
        keep = keep || scores[static_cast<ptrdiff_t>(h) * tokens + t] >= thresholds[h];
      }
      if (keep) piece.kept.Add(piece.begin + t, scores + t, tokens, group);
    }
  }

  void TakeTopK(const ScoredKeys& kept, int64_t range, const kernels::GroupState& state,
                SearchResult& result, Scratch& scratch) const {
    scratch.Reset();
    const int group = query_.group;
    const auto lse = LseOf(state, scratch);
    const auto best = BestIndices(GroupScores(kept, lse, scratch), options_.k, scratch);
    auto* scores = scratch.Take<float>(static_cast<size_t>(group) * best.size());
    auto* values = scratch.Take<const uint16_t*>(best.size());
    for (size_t i = 0; i < best.size(); ++i) {
      result.positions.push_back(kept.positions[best[i]]);
      values[i] = FindRow(view_, result.positions.back()).value;
      for (int h = 0; h < group; ++h) {
        scores[static_cast<size_t>(h) * best.size() + i] = kept.Scores(best[i], group)[h];
      }
    }
    const kernels::GroupState returned = MakeState(group, view_.shape.value_dim, scratch);
    const auto count = static_cast<int>(best.size());
    kernels::AccumulateScoredGathered(scores, count, values, view_.shape.dtype, count, returned);
    if (count == range) {
      kernels::ResetState(state);
    } else {
      SubtractState(state, returned);
    }
    const auto rest = LseOf(state, scratch);
    for (size_t h = 0; h < rest.size(); ++h) {
      const float missed = range > 0 ? std::exp(rest[h] - lse[h]) : 0.0F;
      result.report.missed_mass[h] = missed;
      result.report.missed_low[h] = missed;
      result.report.missed_high[h] = missed;
    }
  }

  void FillReport(int64_t range, SearchReport& report) const {
    report.keys_scanned = range;
    report.keys_exact = range;
    report.bytes_touched =
        range * static_cast<int64_t>(view_.shape.KeyRowBytes() + view_.shape.ValueRowBytes());
    report.missed_mass.assign(static_cast<size_t>(query_.group), 0.0F);
    report.missed_low = report.missed_mass;
    report.missed_high = report.missed_mass;
  }

  Scratch& memory_;
  KvView view_;
  SearchQuery query_;
  SearchOptions options_;
  const float* queries_;  ///< (group, key_dim), times softmax_scale
  std::pmr::vector<Piece> pieces_{&memory_};
};

class Exact final : public KeyIndex {
 public:
  absl::string_view name() const override { return "exact"; }
  PlanPtr Plan(const KvView& view, const SearchQuery& query, const SearchOptions& options,
               Scratch&) const override {
    return MakePlan<ExactPlan>(view, query, options);
  }
};

}  // namespace

const KeyIndex& ExactIndex() {
  static const Exact index;
  return index;
}

}  // namespace kvseek::index
