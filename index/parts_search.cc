#include "index/parts_search.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "index/selection.h"
#include "kernels/cpu/attention.h"

namespace kvseek::index {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

PartsSearch::PartsSearch(absl::Span<const std::shared_ptr<const PartsRun>> runs, PartRank rank,
                         const KvView& view, const SearchQuery& query, const SearchOptions& options,
                         Scratch& scratch)
    : runs_(runs),
      rank_(rank),
      view_(view),
      query_(query),
      options_(options),
      scratch_(scratch),
      group_(static_cast<size_t>(query.group)),
      end_(std::min(query.end, runs.back()->parts->end())),
      queries_(query, view.shape, *runs.front()->parts->basis()),
      prove_(rank == PartRank::kBound && options.exact_top > 0),
      best_(prove_ ? group_ : 0) {
  chosen_.covered = runs.back()->parts->end();
}

ChosenKeys PartsSearch::Choose() {
  for (const auto& run : runs_) {
    // A node's bound is far above its parts': no part would be within beta of the best node.
    const bool flat = run->nodes == nullptr || options_.beta > 0.0F;
    const KeyParts& top = flat ? *run->parts : *run->nodes;
    if (top.begin() >= end_ || top.end() <= query_.begin) continue;
    Score(*run, top, 0, top.count());
    for (int h = 0; h < query_.group && prove_; ++h) {
      margin_ = std::max(margin_, run->parts->RoundingMargin(queries_, h));
    }
  }
  SetLse();
  Queue(0);
  TakeParts(options_.candidates, false);
  if (options_.keep > options_.candidates && !prove_) TakeParts(options_.keep, true);
  return Finish();
}

void PartsSearch::TakeParts(int64_t keys, bool all) {
  while (!queue_.empty() && std::chrono::steady_clock::now() < options_.stop_at) {
    const uint32_t slot = queue_.front().second;
    const Scored scored = scored_[slot];
    const int64_t budget = keys - taken_;
    // A part that is cut off or let in by no more than its half: the budget holds on average.
    const bool fits = scored.keys <= 2 * budget || taken_ == 0;
    if (!IsNode(scored) && !fits && !prove_) break;
    if (!all && !prove_ && Enough()) break;
    std::pop_heap(queue_.begin(), queue_.end());
    queue_.pop_back();
    if (prove_ && budget <= 0 && Beaten(slot)) {
      beaten_.push_back(slot);
    } else if (IsNode(scored)) {
      Open(slot);
    } else {
      const bool read = !all && (prove_ || Passes(slot));
      if (!read) kept_.push_back(slot);
      for (size_t h = 0; h < group_ && options_.mass > 0.0F; ++h) left_[h] -= Share(slot, h);
      Take(scored, read ? chosen_.positions : chosen_.kept);
    }
  }
}

double PartsSearch::Share(size_t slot, size_t head) const {
  return std::exp(double{weights_[slot * group_ + head]} - double{lse_[head]});
}

bool PartsSearch::Enough() const {
  if (taken_ < options_.k) return false;
  // A part's best key outranks their mean, unless a landmark says so, and the heads' sum its best.
  const bool descends = rank_ != PartRank::kLandmark && options_.beta == 0.0F;
  if (options_.threshold < 0.0F && descends && queue_.front().first < options_.threshold) {
    return true;
  }
  if (options_.beta > 0.0F && queue_.front().first < -options_.beta) return true;
  return options_.mass > 0.0F &&
         *std::max_element(left_.begin(), left_.end()) <= double{options_.mass};
}

bool PartsSearch::Passes(size_t slot) const {
  if (options_.threshold == 0.0F || taken_ < options_.k) return true;
  const float keys = std::log(static_cast<float>(scored_[slot].keys));
  for (size_t h = 0; h < group_; ++h) {
    if (weights_[slot * group_ + h] - keys - lse_[h] >= options_.threshold) return true;
  }
  return false;
}

void PartsSearch::Score(const PartsRun& run, const KeyParts& of, int first, int last) {
  const int count = last - first;
  const size_t size = group_ * static_cast<size_t>(count);
  scratch_.Reset();
  auto* means = scratch_.Take<float>(size);
  auto* variances = scratch_.Take<float>(size);
  auto* ranks = scratch_.Take<float>(size);
  auto* work = scratch_.Take<float>(size);
  of.ScoreMoments(queries_, first, count, means, variances, count);
  chosen_.bytes_touched += count * static_cast<int64_t>(of.SummaryBytes());
  if (rank_ == PartRank::kBound) {
    of.UpperBounds(queries_, first, count, ranks, work, count);
  } else if (rank_ == PartRank::kLandmark) {
    const int dim = view_.shape.key_dim;
    kernels::ScoreFloatRows(queries_.scaled(), query_.group,
                            run.landmarks.data() + static_cast<ptrdiff_t>(first) * dim, count, dim,
                            ranks, count);
    chosen_.bytes_touched += static_cast<int64_t>(count * sizeof(float)) * dim;
  } else {
    for (size_t i = 0; i < size; ++i) ranks[i] = means[i] + std::sqrt(variances[i]);
  }
  for (int i = 0; i < count; ++i) {
    const int keys = KeysInRange(of, first + i);
    if (keys == 0) continue;
    scored_.push_back({&run, &of, first + i, keys});
    for (size_t h = 0; h < group_; ++h) {
      const size_t at = h * static_cast<size_t>(count) + static_cast<size_t>(i);
      ranks_.push_back(ranks[at]);
      variances_.push_back(variances[at]);
      weights_.push_back(PartWeight(means[at], variances[at], keys));
    }
  }
}

int PartsSearch::KeysInRange(const KeyParts& of, int part) const {
  const absl::Span<const uint16_t> members = of.Members(part);
  if (query_.begin <= of.begin() && of.end() <= end_) return static_cast<int>(members.size());
  const auto at = [&](int64_t position) {
    return std::lower_bound(members.begin(), members.end(), position - of.begin());
  };
  return static_cast<int>(at(end_) - at(query_.begin));
}

/// Each head's lse over what was scored first. It need not be right: it puts the heads on one
/// scale.
void PartsSearch::SetLse() {
  for (size_t h = 0; h < group_; ++h) {
    float largest = -kInfinity;
    for (size_t i = h; i < weights_.size(); i += group_) largest = std::max(largest, weights_[i]);
    float sum = 0.0F;
    for (size_t i = h; i < weights_.size(); i += group_) sum += std::exp(weights_[i] - largest);
    lse_.push_back(largest + std::log(sum));
    left_.push_back(1.0);
    float best = -kInfinity;
    for (size_t i = h; i < ranks_.size(); i += group_) best = std::max(best, ranks_[i]);
    best_rank_.push_back(best);
  }
}

/// With beta the heads' best parts are level, otherwise their masses are.
float PartsSearch::Rank(size_t slot) const {
  const std::vector<float>& level = options_.beta > 0.0F ? best_rank_ : lse_;
  float largest = -kInfinity;
  for (size_t h = 0; h < group_; ++h) {
    largest = std::max(largest, ranks_[slot * group_ + h] - level[h]);
  }
  if (options_.vote == Vote::kMax || options_.beta > 0.0F) return largest;
  float sum = 0.0F;
  for (size_t h = 0; h < group_; ++h) {
    sum += std::exp(ranks_[slot * group_ + h] - level[h] - largest);
  }
  return largest + std::log(sum);
}

void PartsSearch::Queue(size_t first) {
  for (size_t slot = first; slot < scored_.size(); ++slot) {
    queue_.emplace_back(Rank(slot), static_cast<uint32_t>(slot));
    if (first > 0) std::push_heap(queue_.begin(), queue_.end());
  }
  if (first == 0) std::make_heap(queue_.begin(), queue_.end());
}

void PartsSearch::Open(size_t slot) {
  const Scored node = scored_[slot];
  const size_t first = scored_.size();
  const int part = node.part * kNodeParts;
  Score(*node.run, *node.run->parts, part, std::min(part + kNodeParts, node.run->parts->count()));
  for (size_t h = 0; h < group_ && options_.mass > 0.0F; ++h) {
    left_[h] -= Share(slot, h);
    for (size_t child = first; child < scored_.size(); ++child) left_[h] += Share(child, h);
  }
  Queue(first);
}

void PartsSearch::Take(const Scored& part, std::vector<int64_t>& positions) {
  const size_t first = positions.size();
  for (const uint16_t member : part.of->Members(part.part)) {
    const int64_t position = part.of->begin() + member;
    if (position >= query_.begin && position < end_) positions.push_back(position);
  }
  taken_ += part.keys;
  if (prove_) RaiseBars(first);
}

void PartsSearch::RaiseBars(size_t first) {
  const size_t count = chosen_.positions.size() - first;
  scratch_.Reset();
  auto* keys = scratch_.Take<const uint16_t*>(count);
  auto* scores = scratch_.Take<float>(group_ * count);
  for (size_t i = 0; i < count; ++i) keys[i] = FindRow(view_, chosen_.positions[first + i]).key;
  kernels::ScoreGathered(queries_.scaled(), query_.group, keys, view_.shape.dtype,
                         static_cast<int>(count), view_.shape.key_dim, scores,
                         static_cast<int>(count));
  for (size_t h = 0; h < group_; ++h) {
    std::vector<float>& best = best_[h];
    for (const float score : absl::MakeConstSpan(scores + h * count, count)) {
      if (best.size() == static_cast<size_t>(options_.exact_top)) {
        if (score <= best.front()) continue;
        std::pop_heap(best.begin(), best.end(), std::greater<>());
        best.pop_back();
      }
      best.push_back(score);
      std::push_heap(best.begin(), best.end(), std::greater<>());
    }
  }
}

/// A true bound may be higher than the computed one, and the true score at the bar lower, by the
/// margin each.
bool PartsSearch::Beaten(size_t slot) const {
  for (size_t h = 0; h < group_; ++h) {
    const std::vector<float>& best = best_[h];
    if (best.size() < static_cast<size_t>(options_.exact_top)) return false;
    if (ranks_[slot * group_ + h] + 2.0F * margin_ >= best.front()) return false;
  }
  return true;
}

ChosenKeys PartsSearch::Finish() {
  for (const auto& [rank, slot] : queue_) beaten_.push_back(slot);
  beaten_.insert(beaten_.end(), kept_.begin(), kept_.end());
  std::sort(beaten_.begin(), beaten_.end());
  std::sort(kept_.begin(), kept_.end());
  std::sort(chosen_.kept.begin(), chosen_.kept.end());
  std::sort(chosen_.positions.begin(), chosen_.positions.end());
  for (const uint32_t slot : beaten_) {
    const Scored& scored = scored_[slot];
    const bool kept = std::binary_search(kept_.begin(), kept_.end(), slot);
    chosen_.unread.push_back({scored.of, scored.part, scored.keys, kept});
  }
  for (size_t h = 0; h < group_; ++h) {
    double sum = 0.0;
    double variance = 0.0;
    for (const uint32_t slot : beaten_) {
      const size_t at = slot * group_ + h;
      chosen_.weights.push_back(weights_[at]);
      const double weight = std::exp(double{weights_[at]} - lse_[h]);
      sum += weight;
      variance += weight * variances_[at];
    }
    chosen_.spread.push_back(sum > 0.0 ? static_cast<float>(std::sqrt(variance / sum)) : 0.0F);
  }
  return std::move(chosen_);
}

}  // namespace kvseek::index
