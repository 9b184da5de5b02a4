#include "index/chosen_audit.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "absl/types/span.h"
#include "index/selection.h"
#include "kernels/cpu/attention.h"

namespace kvseek::index {
namespace {

constexpr double kEvenShare = 0.1;  ///< of the draws, without regard to weights
constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

class ChosenAudit {
 public:
  ChosenAudit(const KvView& view, const SearchQuery& query, const SearchOptions& options,
              const ChosenKeys& chosen, const float* queries, Scratch& scratch)
      : view_(view),
        query_(query),
        options_(options),
        chosen_(chosen),
        queries_(queries),
        scratch_(scratch),
        group_(static_cast<size_t>(query.group)),
        parts_(chosen.unread.size()) {}

  std::vector<RestRatio> Run() {
    TakeSinks();
    SetChances();
    Draw();
    const std::vector<float> sink_scores = Score(sinks_);
    const std::vector<float> scores = Score(drawn_);
    std::vector<RestRatio> ratios;
    for (size_t h = 0; h < group_; ++h) {
      ratios.push_back(
          Ratio(h, absl::MakeConstSpan(sink_scores).subspan(h * sinks_.size(), sinks_.size()),
                absl::MakeConstSpan(scores).subspan(h * drawn_.size(), drawn_.size())));
    }
    return ratios;
  }

 private:
  absl::Span<const float> Weights(size_t head) const {
    return absl::MakeConstSpan(chosen_.weights).subspan(head * parts_, parts_);
  }
  void TakeSinks();
  void SetChances();
  void Draw();
  std::vector<float> Score(absl::Span<const int64_t> positions);
  RestRatio Ratio(size_t head, absl::Span<const float> sink_scores,
                  absl::Span<const float> scores) const;

  const KvView& view_;
  const SearchQuery& query_;
  const SearchOptions& options_;
  const ChosenKeys& chosen_;
  const float* const queries_;
  Scratch& scratch_;
  const size_t group_;
  const size_t parts_;

  std::vector<int64_t> sinks_;   ///< unread ones
  std::vector<double> left_;     ///< (parts): unread keys that are no sinks
  std::vector<double> chances_;  ///< (parts): of a draw, summed over the part's keys
  std::vector<int64_t> drawn_;
  std::vector<double> log_chances_;  ///< of the keys drawn
};

void ChosenAudit::TakeSinks() {
  for (const UnreadPart& part : chosen_.unread) {
    left_.push_back(part.keys);
    if (part.parts->begin() + part.parts->Members(part.part).front() >= kSinkTokens) continue;
    for (const int64_t position : UnreadKeys(part, chosen_, query_)) {
      if (position >= kSinkTokens) break;
      sinks_.push_back(position);
      left_.back() -= 1.0;
    }
  }
}

void ChosenAudit::SetChances() {
  chances_.resize(parts_);
  std::vector<double> weights(parts_);
  double heads = 0.0;
  for (size_t h = 0; h < group_; ++h) {
    const absl::Span<const float> logs = Weights(h);
    const float largest = *std::max_element(logs.begin(), logs.end());
    if (!std::isfinite(largest)) continue;
    double sum = 0.0;
    for (size_t p = 0; p < parts_; ++p) {
      weights[p] = std::exp(double{logs[p]} - largest) * left_[p] / chosen_.unread[p].keys;
      sum += weights[p];
    }
    if (!(sum > 0.0)) continue;
    heads += 1.0;
    for (size_t p = 0; p < parts_; ++p) chances_[p] += weights[p] / sum;
  }
  double keys = 0.0;
  for (const double left : left_) keys += left;
  for (size_t p = 0; p < parts_ && keys > 0.0; ++p) {
    const double by_weight = heads > 0.0 ? chances_[p] / heads : 0.0;
    const double evenly = left_[p] / keys;
    chances_[p] = heads > 0.0 ? (1.0 - kEvenShare) * by_weight + kEvenShare * evenly : evenly;
  }
}

/// Evenly along the parts (systematic sampling), a random key of each part that is hit.
void ChosenAudit::Draw() {
  double total = 0.0;
  for (const double chance : chances_) total += chance;
  const size_t draws = group_ * static_cast<size_t>(options_.audit_samples);
  const double step = total / static_cast<double>(draws);
  double next = step * UniformHash(options_.seed, static_cast<uint64_t>(query_.end), 0);
  double passed = 0.0;
  for (size_t p = 0; p < parts_; ++p) {
    passed += chances_[p];
    if (next >= passed) continue;
    std::vector<int64_t> keys = UnreadKeys(chosen_.unread[p], chosen_, query_);
    std::erase_if(keys, [](int64_t position) { return position < kSinkTokens; });
    const auto count = static_cast<double>(keys.size());
    for (; next < passed && drawn_.size() < draws; next += step) {
      const double where = UniformHash(options_.seed + 1, drawn_.size(), 0);
      drawn_.push_back(keys[static_cast<size_t>(where * count)]);
      log_chances_.push_back(std::log(chances_[p] / total / count));
    }
  }
}

/// (group, positions.size()).
std::vector<float> ChosenAudit::Score(absl::Span<const int64_t> positions) {
  scratch_.Reset();
  auto* rows = scratch_.Take<const uint16_t*>(positions.size());
  for (size_t i = 0; i < positions.size(); ++i) rows[i] = FindRow(view_, positions[i]).key;
  std::vector<float> scores(group_ * positions.size());
  const auto count = static_cast<int>(positions.size());
  kernels::ScoreGathered(queries_, query_.group, rows, view_.shape.dtype, count,
                         view_.shape.key_dim, scores.data(), count);
  return scores;
}

RestRatio ChosenAudit::Ratio(size_t head, absl::Span<const float> sink_scores,
                             absl::Span<const float> scores) const {
  // What a key drawn says of the whole mass, ln; all below relative to the largest of them.
  std::vector<double> said;
  for (size_t i = 0; i < scores.size(); ++i) {
    said.push_back(double{scores[i]} - log_chances_[i]);
  }
  double largest = kMinusInfinity;
  for (const double one : said) largest = std::max(largest, one);
  for (const float score : sink_scores) largest = std::max(largest, double{score});
  double estimate = 0.0;
  for (const float weight : Weights(head)) estimate += std::exp(double{weight} - largest);
  double sinks = 0.0;
  for (const float score : sink_scores) sinks += std::exp(double{score} - largest);
  RestRatio rest{0.0F, 0.0F, 0.0F};
  if (!said.empty()) {
    std::vector<float> ratios;
    ratios.reserve(said.size());
    for (const double one : said) ratios.push_back(static_cast<float>(std::exp(one - largest)));
    rest = EstimateRatio(ratios, double{chosen_.spread[head]}, options_.audit_samples);
  }
  const auto with_sinks = [&](float mass) {
    return static_cast<float>(std::min((sinks + double{mass}) / estimate, double{kUnbounded}));
  };
  return {with_sinks(rest.mean), with_sinks(rest.low), with_sinks(rest.high)};
}

}  // namespace

std::vector<RestRatio> AuditChosen(const KvView& view, const SearchQuery& query,
                                   const SearchOptions& options, const ChosenKeys& chosen,
                                   const float* queries, Scratch& scratch) {
  return ChosenAudit(view, query, options, chosen, queries, scratch).Run();
}

}  // namespace kvseek::index
