#include "index/graph_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "index/selection.h"
#include "kernels/cpu/attention.h"
#include "kernels/dtype.h"

namespace kvseek::index {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kOptimism = 0.5F;  ///< standard deviations added to a prediction
constexpr int kBatch = 16;         ///< keys scored before their neighbours are looked at
constexpr int kKeysPerPart = 64;   ///< of the budget, for each stretch that is entered
constexpr size_t kQueue = 256;     ///< best waiting keys that are kept in order
constexpr float kHalfSqrt2 = 0.70710678F;
constexpr uint32_t kUnseen = 0;
constexpr uint32_t kScored = ~uint32_t{0};

/// ln of what is left of the mean of exp(x), x normal around 0 with the given deviation, when only
/// x < limit are counted. A prediction errs by about the deviation, which is added to the limit.
float LogBelow(float limit, float deviation) {
  if (!(deviation > 0.0F)) return 0.0F;
  const auto below = [](float z) { return 0.5F * std::erfc(-z * kHalfSqrt2); };
  const float z = std::max(limit / deviation + 1.0F, -3.0F);
  return std::log(std::max(below(z - deviation) / below(z), 1e-3F));
}

class GraphSearch {
 public:
  GraphSearch(const KeyGraph& graph, absl::Span<const std::shared_ptr<const KeyParts>> parts,
              const KvView& view, const SearchQuery& query, const SearchOptions& options,
              Scratch& scratch)
      : graph_(graph),
        parts_(parts),
        view_(view),
        query_(query),
        options_(options),
        bounded_(options.beta > 0.0F || options.threshold < 0.0F),
        scratch_(scratch),
        group_(static_cast<size_t>(query.group)),
        end_(std::min({query.end, graph.Keys(), view.SealedTokens()})),
        first_part_(query.begin / kGraphPartTokens),
        part_count_(query.begin < end_
                        ? static_cast<size_t>((end_ - 1) / kGraphPartTokens + 1 - first_part_)
                        : 0),
        queries_(query, view.shape, *parts.front()->basis()) {}

  ChosenKeys Run() {
    scratch_.Reset();
    ChosenKeys chosen;
    chosen.covered = std::min(graph_.Keys(), view_.SealedTokens());
    chosen.spread.assign(group_, 0.0F);
    if (part_count_ == 0) return chosen;
    if (end_ - query_.begin <= options_.candidates && !bounded_) {
      for (int64_t p = query_.begin; p < end_; ++p) chosen.positions.push_back(p);
      return chosen;
    }
    ScoreParts();
    Prepare();
    Enter();
    Traverse();
    Choose(chosen);
    Estimate(chosen);
    chosen.keys_scored = static_cast<int64_t>(keys_.size());
    chosen.bytes_touched = bytes_ + static_cast<int64_t>((keys_.size() - chosen.positions.size()) *
                                                         view_.shape.KeyRowBytes());
    return chosen;
  }

 private:
  struct Waiting {
    float priority;
    uint32_t key;
    bool operator<(const Waiting& other) const {
      return priority != other.priority ? priority < other.priority : key > other.key;
    }
  };

  int KeysOfPart(size_t part) const {
    const int64_t first = (first_part_ + static_cast<int64_t>(part)) * kGraphPartTokens;
    return static_cast<int>(std::min(end_, first + kGraphPartTokens) -
                            std::max(query_.begin, first));
  }
  size_t PartOf(uint32_t key) const {
    return static_cast<size_t>(int64_t{key} / kGraphPartTokens - first_part_);
  }
  UnreadPart FindPart(size_t part) const;

  void ScoreParts();
  float QueryPower(size_t head) const;
  void Prepare();
  void Enter();
  void Traverse();
  void Score(absl::Span<const uint32_t> keys);
  void Tell(size_t scored);
  void Observe(uint32_t key, float precision, const float* scores);
  float Priority(uint32_t slot) const;
  /// The least score of a head that beta and threshold let pass.
  float Bar(size_t head) const;
  bool WorthALook(uint32_t slot) const;
  void Enqueue();
  void TrimQueue();
  void RefillQueue();
  void Choose(ChosenKeys& chosen) const;
  void Estimate(ChosenKeys& chosen) const;

  const KeyGraph& graph_;
  const absl::Span<const std::shared_ptr<const KeyParts>> parts_;
  const KvView& view_;
  const SearchQuery& query_;
  const SearchOptions& options_;
  const bool bounded_;  ///< by beta or threshold
  Scratch& scratch_;
  const size_t group_;
  const int64_t end_;  ///< of the graph's share of the range
  const int64_t first_part_;
  const size_t part_count_;
  const PartQueries queries_;

  float* means_ = nullptr;        ///< (group, part_count_): each part's mean score
  float* variances_ = nullptr;    ///< (group, part_count_): and its variance
  std::vector<float> reference_;  ///< (group): estimated lse
  std::vector<float> noise_;      ///< (group): standard deviation of scores at distance 1
  std::vector<float> best_;       ///< (group): largest score so far

  // A key that is next to a scored one has a slot.
  uint32_t* slots_ = nullptr;  ///< (keys of the range): kUnseen, kScored or the key's slot
  std::vector<float> sums_;    ///< (slots, group): observations times their precision
  std::vector<float> precisions_;
  std::vector<float> priorities_;
  std::vector<uint32_t> waiting_;    ///< (slots): the key
  std::vector<uint32_t> changed_;    ///< slots that have been told of since the last Enqueue
  std::vector<uint8_t> is_changed_;  ///< (slots)
  /// A heap of all waiting keys of priority floor_ or more; an entry whose priority is not its
  /// slot's any longer is stale.
  std::vector<Waiting> queue_;
  float floor_ = -kInfinity;

  std::vector<uint32_t> keys_;  ///< scored
  std::vector<float> scores_;   ///< (keys_.size(), group)
  size_t told_ = 0;             ///< of keys_, those whose neighbours have been looked at
  float cutoff_ = kInfinity;    ///< what waits is predicted to be below it
  int64_t bytes_ = 0;
};

UnreadPart GraphSearch::FindPart(size_t part) const {
  const int64_t position = (first_part_ + static_cast<int64_t>(part)) * kGraphPartTokens;
  const KeyParts& parts = *parts_[static_cast<size_t>(position / kMaxPartsTokens)];
  return {&parts, static_cast<int>((position - parts.begin()) / kGraphPartTokens),
          KeysOfPart(part)};
}

void GraphSearch::ScoreParts() {
  means_ = scratch_.Take<float>(group_ * part_count_);
  variances_ = scratch_.Take<float>(group_ * part_count_);
  for (size_t at = 0; at < part_count_;) {
    const UnreadPart first = FindPart(at);
    const int count =
        std::min(first.parts->count() - first.part, static_cast<int>(part_count_ - at));
    first.parts->ScoreMoments(queries_, first.part, count, means_ + at, variances_ + at,
                              static_cast<int>(part_count_));
    at += static_cast<size_t>(count);
    bytes_ += static_cast<int64_t>(first.parts->SummaryBytes()) * count;
  }
}

/// How much further apart than the average training query this one sees keys, squared.
float GraphSearch::QueryPower(size_t head) const {
  const auto dim = static_cast<size_t>(view_.shape.key_dim);
  std::vector<float> query(query_.queries + head * dim, query_.queries + (head + 1) * dim);
  graph_.query_factor->Solve(query.data());
  double power = 0.0;
  for (const float x : query) power += double{x} * x;
  return static_cast<float>(power / static_cast<double>(dim));
}

void GraphSearch::Prepare() {
  for (size_t h = 0; h < group_; ++h) {
    std::vector<float> weights(part_count_);
    for (size_t p = 0; p < part_count_; ++p) {
      const size_t at = h * part_count_ + p;
      weights[p] = PartWeight(means_[at], variances_[at], KeysOfPart(p));
    }
    const float largest = *std::max_element(weights.begin(), weights.end());
    double sum = 0.0;
    for (const float weight : weights) sum += std::exp(weight - largest);
    reference_.push_back(largest + static_cast<float>(std::log(sum)));
    noise_.push_back(view_.shape.softmax_scale * std::sqrt(QueryPower(h)));
  }
  best_.assign(group_, -kInfinity);
  const auto keys = static_cast<size_t>(end_ - query_.begin);
  slots_ = scratch_.Take<uint32_t>(keys);
  std::fill_n(slots_, keys, kUnseen);
  // Slot 0 stands for no slot.
  sums_.resize(group_);
  precisions_.resize(1);
  priorities_.resize(1, -kInfinity);
  waiting_.resize(1);
  is_changed_.resize(1);
}

void GraphSearch::Enter() {
  std::vector<uint32_t> keys;
  const auto add = [&](uint32_t key) {
    if (key >= query_.begin && key < end_) keys.push_back(key);
  };
  for (const uint32_t key : graph_.entries) add(key);
  std::vector<float> ranks(part_count_, -kInfinity);
  for (size_t h = 0; h < group_; ++h) {
    for (size_t p = 0; p < part_count_; ++p) {
      ranks[p] = std::max(ranks[p], means_[h * part_count_ + p] - reference_[h]);
    }
  }
  const int parts = std::max(options_.candidates / kKeysPerPart, 1);
  for (const uint32_t p : BestIndices(ranks, parts, scratch_)) {
    const size_t part = static_cast<size_t>(first_part_) + p;
    size_t entered = keys.size();
    for (size_t i = 0; i < kGraphPartEntries; ++i) {
      add(graph_.part_entries[part * kGraphPartEntries + i]);
    }
    // The range may have cut them off.
    const int64_t first = static_cast<int64_t>(part) * kGraphPartTokens;
    if (entered == keys.size()) add(static_cast<uint32_t>(std::max(query_.begin, first)));
  }
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  keys.resize(std::min(keys.size(), static_cast<size_t>(options_.candidates)));
  Score(keys);
}

void GraphSearch::Traverse() {
  const auto budget = static_cast<size_t>(options_.candidates);
  std::vector<uint32_t> batch;
  while (true) {
    for (; told_ < keys_.size(); ++told_) Tell(told_);
    Enqueue();
    const size_t room = std::min<size_t>(kBatch, budget - keys_.size());
    batch.clear();
    while (batch.size() < room) {
      if (queue_.empty()) RefillQueue();
      if (queue_.empty()) break;
      const Waiting next = queue_.front();
      std::pop_heap(queue_.begin(), queue_.end());
      queue_.pop_back();
      const uint32_t slot = slots_[next.key - query_.begin];
      if (slot == kScored || priorities_[slot] != next.priority) continue;
      if (!WorthALook(slot)) {
        priorities_[slot] = -kInfinity;
        continue;
      }
      slots_[next.key - query_.begin] = kScored;
      batch.push_back(next.key);
      cutoff_ = next.priority;
    }
    if (batch.empty()) return;
    Score(batch);
  }
}

/// Exactly, for all heads.
void GraphSearch::Score(absl::Span<const uint32_t> keys) {
  std::vector<const uint16_t*> rows;
  for (const uint32_t key : keys) {
    slots_[key - query_.begin] = kScored;
    rows.push_back(FindRow(view_, key).key);
  }
  const auto count = static_cast<int>(keys.size());
  std::vector<float> scores(group_ * keys.size());
  kernels::ScoreGathered(queries_.scaled(), query_.group, rows.data(), view_.shape.dtype, count,
                         view_.shape.key_dim, scores.data(), count);
  for (size_t i = 0; i < keys.size(); ++i) {
    keys_.push_back(keys[i]);
    for (size_t h = 0; h < group_; ++h) {
      scores_.push_back(scores[h * keys.size() + i]);
      best_[h] = std::max(best_[h], scores_.back());
    }
  }
}

/// What a scored key says of its neighbours.
void GraphSearch::Tell(size_t scored) {
  const uint32_t key = keys_[scored];
  const absl::Span<const uint32_t> neighbours = graph_.Neighbours(key);
  const uint16_t* const distances = graph_.distances.data() + graph_.starts[key];
  bytes_ += static_cast<int64_t>(neighbours.size() * (sizeof(uint32_t) + sizeof(uint16_t)) +
                                 2 * sizeof(uint32_t));
  for (size_t i = 0; i < neighbours.size(); ++i) {
    if (neighbours[i] < query_.begin || neighbours[i] >= end_) continue;
    const float precision = 1.0F / kernels::Bf16ToFloat(distances[i]);
    Observe(neighbours[i], precision, scores_.data() + scored * group_);
  }
}

void GraphSearch::Observe(uint32_t key, float precision, const float* scores) {
  uint32_t& slot = slots_[key - query_.begin];
  if (slot == kScored) return;
  if (slot == kUnseen) {
    slot = static_cast<uint32_t>(precisions_.size());
    const size_t part = PartOf(key);
    const float prior = 1.0F / kernels::Bf16ToFloat(graph_.deviations[key]);
    precisions_.push_back(prior);
    priorities_.push_back(-kInfinity);
    waiting_.push_back(key);
    is_changed_.push_back(0);
    for (size_t h = 0; h < group_; ++h) {
      sums_.push_back(prior * means_[h * part_count_ + part]);
    }
  }
  precisions_[slot] += precision;
  float* const sums = sums_.data() + slot * group_;
  for (size_t h = 0; h < group_; ++h) sums[h] += precision * scores[h];
  if (is_changed_[slot] == 0) changed_.push_back(slot);
  is_changed_[slot] = 1;
}

void GraphSearch::Enqueue() {
  for (const uint32_t slot : changed_) {
    is_changed_[slot] = 0;
    const uint32_t key = waiting_[slot];
    if (slots_[key - query_.begin] == kScored) continue;
    const float priority = Priority(slot);
    if (priority == priorities_[slot]) continue;
    priorities_[slot] = priority;
    if (priority < floor_) continue;
    queue_.push_back({priority, key});
    std::push_heap(queue_.begin(), queue_.end());
  }
  changed_.clear();
  if (queue_.size() > 2 * kQueue) TrimQueue();
}

float GraphSearch::Priority(uint32_t slot) const {
  const float variance = 1.0F / precisions_[slot];
  const float deviation = kOptimism * std::sqrt(variance);
  const float* const sums = sums_.data() + slot * group_;
  float priority = -kInfinity;
  for (size_t h = 0; h < group_; ++h) {
    priority = std::max(priority, sums[h] * variance + deviation * noise_[h] - reference_[h]);
  }
  return priority;
}

float GraphSearch::Bar(size_t head) const {
  const float near = options_.beta > 0.0F ? best_[head] - options_.beta : -kInfinity;
  const float heavy =
      options_.threshold < 0.0F ? reference_[head] + options_.threshold : -kInfinity;
  return std::max(near, heavy);
}

bool GraphSearch::WorthALook(uint32_t slot) const {
  if (!bounded_ || static_cast<int64_t>(keys_.size()) < options_.k) return true;
  const float variance = 1.0F / precisions_[slot];
  const float deviation = kOptimism * std::sqrt(variance);
  const float* const sums = sums_.data() + slot * group_;
  for (size_t h = 0; h < group_; ++h) {
    if (sums[h] * variance + deviation * noise_[h] >= Bar(h)) return true;
  }
  return false;
}

/// Leaves the best kQueue, and raises the floor to them.
void GraphSearch::TrimQueue() {
  std::erase_if(queue_, [&](const Waiting& waiting) {
    const uint32_t slot = slots_[waiting.key - query_.begin];
    return slot == kScored || priorities_[slot] != waiting.priority;
  });
  if (queue_.size() > kQueue) {
    std::nth_element(queue_.begin(), queue_.begin() + kQueue - 1, queue_.end(),
                     [](const Waiting& a, const Waiting& b) { return b < a; });
    floor_ = queue_[kQueue - 1].priority;
    queue_.resize(kQueue);
  }
  std::make_heap(queue_.begin(), queue_.end());
}

/// From all slots: the queue holds those above the floor only.
void GraphSearch::RefillQueue() {
  if (floor_ == -kInfinity) return;
  floor_ = -kInfinity;
  for (size_t slot = 1; slot < waiting_.size(); ++slot) {
    if (slots_[waiting_[slot] - query_.begin] != kScored && priorities_[slot] > -kInfinity) {
      queue_.push_back({priorities_[slot], waiting_[slot]});
    }
  }
  TrimQueue();
}

void GraphSearch::Choose(ChosenKeys& chosen) const {
  if (!bounded_) {
    chosen.positions.assign(keys_.begin(), keys_.end());
    std::sort(chosen.positions.begin(), chosen.positions.end());
    return;
  }
  // How far above its bar a key is; TopK's in that order.
  std::vector<float> bars;
  for (size_t h = 0; h < group_; ++h) bars.push_back(Bar(h));
  std::vector<float> above(keys_.size(), -kInfinity);
  for (size_t i = 0; i < keys_.size(); ++i) {
    for (size_t h = 0; h < group_; ++h) {
      above[i] = std::max(above[i], scores_[i * group_ + h] - bars[h]);
    }
  }
  const auto pass = std::count_if(above.begin(), above.end(), [](float x) { return x >= 0.0F; });
  for (const uint32_t i : BestIndices(above, std::max<int64_t>(pass, options_.k), scratch_)) {
    chosen.positions.push_back(keys_[i]);
  }
  std::sort(chosen.positions.begin(), chosen.positions.end());
}

/// The unread keys' mean and variance are the part's with the scored keys' share taken out: what
/// has been chosen is the best of it, and the rest is taken to be below what the search got down
/// to.
void GraphSearch::Estimate(ChosenKeys& chosen) const {
  std::vector<int> counts(part_count_);
  std::vector<float> sums(group_ * part_count_);
  std::vector<float> squares(group_ * part_count_);
  for (size_t i = 0; i < keys_.size(); ++i) {
    if (!std::binary_search(chosen.positions.begin(), chosen.positions.end(), keys_[i])) continue;
    const size_t part = PartOf(keys_[i]);
    ++counts[part];
    for (size_t h = 0; h < group_; ++h) {
      const float score = scores_[i * group_ + h] - means_[h * part_count_ + part];
      sums[h * part_count_ + part] += score;
      squares[h * part_count_ + part] += score * score;
    }
  }
  std::vector<size_t> parts;
  for (size_t p = 0; p < part_count_; ++p) {
    UnreadPart unread = FindPart(p);
    unread.keys -= counts[p];
    if (unread.keys == 0) continue;
    parts.push_back(p);
    chosen.unread.push_back(unread);
  }
  for (size_t h = 0; h < group_; ++h) {
    double spread = 0.0;
    for (const size_t p : parts) {
      const size_t at = h * part_count_ + p;
      const auto keys = static_cast<float>(KeysOfPart(p) - counts[p]);
      const float shift = -sums[at] / keys;
      const float all = variances_[at] * static_cast<float>(KeysOfPart(p));
      const float variance =
          std::clamp((all - squares[at]) / keys - shift * shift, 0.0F, variances_[at]);
      const auto left = static_cast<int>(keys);
      const float mean = means_[at] + shift;
      chosen.weights.push_back(PartWeight(mean, variance, left) +
                               LogBelow(reference_[h] + cutoff_ - mean, std::sqrt(variance)));
      spread += variance;
    }
    if (!parts.empty()) {
      chosen.spread[h] = static_cast<float>(std::sqrt(spread / static_cast<double>(parts.size())));
    }
  }
}

}  // namespace

ChosenKeys SearchGraph(const KeyGraph& graph,
                       absl::Span<const std::shared_ptr<const KeyParts>> parts, const KvView& view,
                       const SearchQuery& query, const SearchOptions& options, Scratch& scratch) {
  return GraphSearch(graph, parts, view, query, options, scratch).Run();
}

}  // namespace kvseek::index
