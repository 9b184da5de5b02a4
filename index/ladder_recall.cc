// A ladder search without its scan: candidates and the rest's weights come from an earlier search.
#include <algorithm>
#include <cmath>

#include "index/ladder_plan.h"
#include "kernels/cpu/attention.h"

namespace kvseek::index {
namespace {

using kernels::kScanBlock;

/// A block's keys that were not read, and how likely one draw is to fall among them.
struct UnreadBlock {
  int64_t block;
  int keys;
  double share;
};

/// How the rows of a sample were drawn.
struct UnreadSample {
  const uint16_t** rows;  ///< keys
  double* likelihoods;    ///< of one draw
  size_t count;
};

/// The unread key `index` of a block; `read` is ascending.
int64_t UnreadKey(const UnreadBlock& block, int index, absl::Span<const int64_t> read) {
  int64_t position = block.block * kScanBlock;
  for (auto next = std::lower_bound(read.begin(), read.end(), position);; ++position) {
    if (next != read.end() && *next == position) {
      ++next;
    } else if (index-- == 0) {
      return position;
    }
  }
}

/// Evenly spaced draws in proportion to the blocks' shares, any unread key of a block.
UnreadSample Draw(const KvView& view, absl::Span<const UnreadBlock> blocks,
                  absl::Span<const int64_t> read, size_t samples, uint64_t seed, uint64_t salt,
                  Scratch& scratch) {
  UnreadSample sample = {scratch.Take<const uint16_t*>(samples), scratch.Take<double>(samples), 0};
  double total = 0.0;
  for (const UnreadBlock& block : blocks) total += block.share;
  const double step = total / static_cast<double>(samples);
  double draw = step * UniformHash(seed, salt, 0);
  double passed = 0.0;
  for (const UnreadBlock& block : blocks) {
    passed += block.share;
    for (; draw < passed && sample.count < samples && block.keys > 0; draw += step) {
      const double where = UniformHash(seed + 1, salt, sample.count);
      const int64_t position = UnreadKey(block, static_cast<int>(where * block.keys), read);
      sample.rows[sample.count] = FindRow(view, position).key;
      sample.likelihoods[sample.count++] = block.share / total / block.keys;
    }
  }
  return sample;
}

}  // namespace

void LadderPlan::PrepareRecall() {
  const LastSearch& last = *recall_.last;
  const int dim = view_.shape.key_dim;
  const auto group = static_cast<size_t>(group_);
  auto* const change = memory_.Take<float>(group * static_cast<size_t>(dim));
  for (size_t i = 0; i < group * static_cast<size_t>(dim); ++i) {
    change[i] = scaled_[i] - view_.shape.softmax_scale * last.queries[i];
  }
  const int64_t first = first_block_ / kSegmentBlocks;
  const auto segments = static_cast<size_t>((last_block_ - 1) / kSegmentBlocks - first + 1);
  std::pmr::vector<float> shifts(group * segments, &memory_);
  for (size_t s = 0; s < segments; ++s) {
    kernels::ScoreFloatRows(change, group_,
                            view_.segments[static_cast<size_t>(first) + s]->centre(), 1, dim,
                            shifts.data() + s, static_cast<int>(segments));
  }
  const auto blocks = static_cast<size_t>(last_block_ - first_block_);
  recalled_weights_.resize(group * blocks);
  for (size_t h = 0; h < group; ++h) {
    const float* const shift = shifts.data() + h * segments;
    // No weight grows: what the largest shift adds goes into the reference.
    const float largest = *std::max_element(shift, shift + segments);
    reference_[h] = last.reference[h] + largest;
    for (size_t b = 0; b < blocks; ++b) {
      const int64_t segment = (first_block_ + static_cast<int64_t>(b)) / kSegmentBlocks - first;
      recalled_weights_[h * blocks + b] =
          last.block_weights[h * blocks + b] * std::exp(shift[segment] - largest);
    }
  }
}

void LadderPlan::RecallSegmentPart(const SegmentPart& part, const ScanBuffers& buffers,
                                   Chosen& chosen) const {
  chosen.segment = part.block / kSegmentBlocks;
  const int64_t end_block = part.block + part.blocks;
  chosen.count = 0;
  const std::vector<int64_t>& positions = recall_.last->positions;
  auto next = std::lower_bound(positions.begin(), positions.end(), part.block * kScanBlock);
  for (; next != positions.end() && *next < end_block * kScanBlock; ++next) {
    chosen.keys[chosen.count++] = static_cast<uint32_t>(*next % kSegmentTokens);
  }
  const int64_t all = last_block_ - first_block_;
  for (int64_t h = 0; h < group_; ++h) {
    std::copy_n(recalled_weights_.begin() + h * all + part.block - first_block_, part.blocks,
                buffers.results.block_weights + h * part.blocks);
  }
  SumBlockWeights(buffers.results, group_, part.blocks);
}

/// Half of the draws go where the weights are, the other half anywhere: a key that has become heavy
/// since is found there or not at all.
std::pmr::vector<RestRatio> LadderPlan::SampleUnread(const ScoredKeys& candidates,
                                                     absl::Span<const float> rest,
                                                     Scratch& scratch) const {
  const auto group = static_cast<size_t>(group_);
  const auto all = static_cast<size_t>(last_block_ - first_block_);
  const int64_t unread =
      static_cast<int64_t>(all) * kScanBlock - static_cast<int64_t>(candidates.positions.size());
  std::pmr::vector<RestRatio> ratios(group, &memory_);
  if (unread <= 0 || recall_.samples <= 0) return ratios;
  std::pmr::vector<UnreadBlock> blocks(&memory_);
  auto next = candidates.positions.begin();
  for (size_t b = 0; b < all; ++b) {
    const int64_t block = first_block_ + static_cast<int64_t>(b);
    const auto first = next;
    while (next != candidates.positions.end() && *next < (block + 1) * kScanBlock) ++next;
    const int keys = kScanBlock - static_cast<int>(next - first);
    double weight = 0.0;
    for (size_t h = 0; h < group && keys > 0; ++h) {
      if (rest[h] > 0.0F) weight += double{recalled_weights_[h * all + b] / rest[h]};
    }
    const double even = keys / static_cast<double>(unread);
    blocks.push_back({block, keys, 0.5 * even + 0.5 * weight / static_cast<double>(group)});
  }
  scratch.Reset();
  const auto samples = static_cast<size_t>(recall_.samples);
  const UnreadSample drawn = Draw(view_, blocks, candidates.positions, samples, options_.seed,
                                  static_cast<uint64_t>(query_.end), scratch);
  auto* scores = scratch.Take<float>(group * samples);
  kernels::ScoreGathered(scaled_, group_, drawn.rows, view_.shape.dtype,
                         static_cast<int>(drawn.count), view_.shape.key_dim, scores,
                         static_cast<int>(samples));
  for (size_t h = 0; h < group; ++h) {
    if (rest[h] <= 0.0F) continue;
    float* const ratio = scores + h * samples;
    double sum = 0.0;
    double squares = 0.0;
    for (size_t i = 0; i < drawn.count; ++i) {
      const double log_ratio = double{ratio[i]} - double{reference_[h]} -
                               std::log(drawn.likelihoods[i] * double{rest[h]});
      sum += log_ratio;
      squares += log_ratio * log_ratio;
      ratio[i] = static_cast<float>(std::exp(std::min(log_ratio, 80.0)));
    }
    const double mean = sum / static_cast<double>(drawn.count);
    const double variance = std::max(squares / static_cast<double>(drawn.count) - mean * mean, 0.0);
    ratios[h] =
        EstimateRatio({ratio, drawn.count}, std::sqrt(variance), static_cast<int>(drawn.count));
  }
  return ratios;
}

std::pmr::vector<RestRatio> LadderPlan::CheckRecall(absl::Span<const float> lse,
                                                    const ScoredKeys& candidates,
                                                    Scratch& scratch) {
  const auto rest = RestMass();
  std::pmr::vector<RestRatio> ratios = SampleUnread(candidates, rest, scratch);
  double missed = 0.0;
  double allowed = 0.0;
  for (size_t h = 0; h < lse.size(); ++h) {
    const float sampled = rest[h] * ratios[h].mean;
    const float read = std::max(std::exp(lse[h] - reference_[h]) - rest[h], 0.0F);
    missed += sampled > 0.0F ? double{sampled / (read + sampled)} : 0.0;
    allowed += double{recall_.last->missed[h] * recall_.tolerance};
    if (options_.audit_samples == 0) ratios[h].low = ratios[h].high = ratios[h].mean;
  }
  trusted_ = missed <= allowed;
  return ratios;
}

std::shared_ptr<const LastSearch> LadderPlan::MakeLast(absl::Span<const float> lse) const {
  auto last = std::make_shared<LastSearch>();
  last->group = group_;
  last->begin = query_.begin;
  last->first_block = first_block_;
  last->last_block = last_block_;
  last->reference.assign(reference_.begin(), reference_.end());
  last->queries.assign(query_.queries,
                       query_.queries + static_cast<ptrdiff_t>(group_) * view_.shape.key_dim);
  const auto rest = RestMass();
  for (size_t h = 0; h < lse.size(); ++h) {
    last->missed.push_back(std::min(1.0F, rest[h] * std::exp(reference_[h] - lse[h])));
  }
  size_t kept = 0;
  for (const Piece& piece : pieces_) kept += piece.kept.size();
  last->positions.reserve(kept);
  for (const Piece& piece : pieces_) {
    last->positions.insert(last->positions.end(), piece.kept.begin(), piece.kept.end());
  }
  for (int64_t h = 0; h < group_; ++h) {
    for (const Piece& piece : pieces_) {
      const int64_t blocks = piece.last_block - piece.first_block;
      const auto weights = piece.kept_weights.begin() + h * blocks;
      last->block_weights.insert(last->block_weights.end(), weights, weights + blocks);
    }
  }
  return last;
}

}  // namespace kvseek::index
