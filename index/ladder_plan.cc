#include "index/ladder_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "index/product_scan.h"
#include "index/sign_scan.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/reduce.h"
#include "kernels/cpu/rotation.h"
#include "kernels/cpu/threshold.h"

namespace kvseek::index {
namespace {

using kernels::kScanBlock;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// The sample that sets the threshold: one block in kSampleStride, but at least kSampleBlocksMin.
constexpr int64_t kSampleStride = 32;
constexpr int64_t kSampleBlocksMin = 64;
// One part in so many of the candidates is each head's own. Without it, heads with much noise or
// little mass left in the range find few of their best keys; a larger share changes little.
constexpr int64_t kHeadShare = 8;
// How far ahead the sample's blocks, which are far apart, and the segments' centres are fetched.
constexpr size_t kBlocksAhead = 3;
constexpr int64_t kCentresAhead = 8;

/// Block numbers of the sample: evenly spread, the first and the last always among them.
std::vector<int64_t> SampleBlocks(int64_t first, int64_t last) {
  const int64_t blocks = last - first;
  const int64_t wanted = std::min(blocks, std::max(kSampleBlocksMin, blocks / kSampleStride));
  std::vector<int64_t> sample;
  for (int64_t i = 0; i < wanted; ++i) {
    sample.push_back(wanted == 1 ? first : first + i * (blocks - 1) / (wanted - 1));
  }
  return sample;
}

}  // namespace

LadderPlan::LadderPlan(const KvView& view, const SearchQuery& query, const SearchOptions& options,
                       Scratch& scratch, Recall recall, const ProductIndex* product)
    : view_(view),
      query_(query),
      options_(options),
      group_(query.group),
      padded_dim_(kernels::PaddedDim(view.shape.key_dim)),
      scaled_(ScaleQueries(query, view.shape)),
      exact_state_(query.group, view.shape.value_dim),
      recall_(std::move(recall)) {
  first_block_ = (query.begin + kScanBlock - 1) / kScanBlock;
  const int64_t coded = product == nullptr ? view.SealedTokens() : product->covered();
  last_block_ = std::min(query.end, coded) / kScanBlock;
  last_block_ = std::max(last_block_, first_block_);
  if (recall_.last != nullptr) last_block_ = recall_.last->last_block;
  AttendExactPart(scratch);
  reference_ = exact_state_.Lse();
  if (first_block_ == last_block_) return;
  PrepareQueries(product);
  if (recall_.last != nullptr) {
    PrepareRecall();
  } else {
    ChooseThreshold(scratch);
  }
  constexpr int64_t kPieceBlocks = int64_t{kPieceSegments} * kSegmentBlocks;
  for (int64_t block = first_block_; block < last_block_;) {
    const int64_t end = std::min(last_block_, (block / kPieceBlocks + 1) * kPieceBlocks);
    pieces_.emplace_back(block, end, group_, view.shape.value_dim);
    block = end;
  }
}

void LadderPlan::PrepareQueries(const ProductIndex* product) {
  const auto group = static_cast<size_t>(group_);
  rotated_ = MakeAligned<float>(group * padded_dim_);
  kernels::Rotate(query_.queries, group_, view_.shape.key_dim, rotated_.get());
  quantised_ = MakeAligned<int16_t>(group * padded_dim_);
  query_units_.resize(group);
  kernels::QuantiseQueries(rotated_.get(), group_, padded_dim_, quantised_.get(),
                           query_units_.data());
  const int64_t first = first_block_ / kSegmentBlocks;
  const int64_t last = (last_block_ - 1) / kSegmentBlocks;
  centre_scores_.resize(static_cast<size_t>(last - first + 1) * group);
  for (int64_t s = first; s <= last; ++s) {
    if (s + kCentresAhead <= last) {
      kernels::PrefetchRange(view_.segments[static_cast<size_t>(s + kCentresAhead)]->centre(),
                             static_cast<size_t>(view_.shape.key_dim) * sizeof(float));
    }
    kernels::ScoreFloatRows(scaled_.get(), group_, view_.segments[static_cast<size_t>(s)]->centre(),
                            1, view_.shape.key_dim, centre_scores_.data() + (s - first) * group_,
                            1);
  }
  const ScanQueries queries = {group_, scaled_.get(), rotated_.get(), centre_scores_.data(), first};
  if (product != nullptr) {
    codes_ = std::make_unique<const ProductScan>(*product, view_, queries, last);
  } else {
    codes_ = std::make_unique<const SignScan>(view_, queries);
  }
}

void LadderPlan::AttendExactPart(Scratch& scratch) {
  const auto add = [&](int64_t begin, int64_t end) {
    VisitRows(view_, begin, end,
              [&](const uint16_t* keys, const uint16_t* values, int64_t first, int tokens) {
                exact_tokens_ += tokens;
                if (options_.k < 0) {
                  kernels::AttendRows(scaled_.get(), keys, values, view_.shape.dtype, tokens,
                                      view_.shape.key_dim, exact_state_.view());
                  return;
                }
                scratch.Reset();
                auto* scores = scratch.Take<float>(static_cast<size_t>(group_) * tokens);
                kernels::ScoreRows(scaled_.get(), group_, keys, view_.shape.dtype, tokens,
                                   view_.shape.key_dim, scores, tokens);
                kernels::AccumulateScored(scores, tokens, values, view_.shape.dtype, tokens,
                                          exact_state_.view());
                for (int t = 0; t < tokens; ++t) {
                  exact_keys_.Add(first + t, scores + t, tokens, group_);
                }
              });
  };
  if (first_block_ == last_block_) {
    add(query_.begin, query_.end);
  } else {
    add(query_.begin, first_block_ * kScanBlock);
    add(last_block_ * kScanBlock, query_.end);
  }
}

void LadderPlan::ChooseThreshold(Scratch& scratch) {
  scratch.Reset();
  const std::vector<int64_t> sample = SampleBlocks(first_block_, last_block_);
  sampled_blocks_ = static_cast<int64_t>(sample.size());
  const auto keys = static_cast<int>(sampled_blocks_ * kScanBlock);
  auto* estimates = scratch.Take<float>(static_cast<size_t>(group_) * keys);
  EstimateReference(sample, estimates, scratch);

  const int64_t wanted = std::max<int64_t>(
      WantedKeys(estimates, keys, std::max(options_.candidates, options_.k), scratch), options_.k);
  thresholds_ = Thresholds(estimates, keys, wanted, scratch);
  if (options_.keep == 0) return;
  keep_thresholds_ = Thresholds(estimates, keys, options_.keep, scratch);
  for (size_t h = 0; h < thresholds_.size(); ++h) {
    keep_thresholds_[h] = std::min(keep_thresholds_[h], thresholds_[h]);
  }
}

std::vector<float> LadderPlan::Thresholds(const float* estimates, int keys, int64_t wanted,
                                          Scratch& scratch) const {
  const int64_t all = (last_block_ - first_block_) * kScanBlock;
  std::vector<float> thresholds(static_cast<size_t>(group_), -kInfinity);
  if (wanted >= all) return thresholds;
  const auto sample_rank = [&](int64_t of_all) {
    return std::max<int64_t>((of_all * keys + all / 2) / all, 1) + 1;
  };
  auto* work = scratch.Take<int32_t>(static_cast<size_t>(keys));
  // Each head's own best: whatever exceeds this is chosen.
  const int64_t share = wanted / kHeadShare;
  for (int h = 0; h < group_; ++h) {
    thresholds[static_cast<size_t>(h)] = kernels::RankThreshold(
        estimates + static_cast<ptrdiff_t>(h) * keys, keys, sample_rank(share), work);
  }
  // The others by their share of softmax mass, with one threshold for all heads that fills the
  // budget.
  auto* best = scratch.Take<float>(static_cast<size_t>(keys));
  auto* over = scratch.Take<float>(static_cast<size_t>(keys));
  kernels::MaxOfShifted(estimates, keys, group_, reference_.data(), keys, best);
  kernels::MaxOfShifted(estimates, keys, group_, thresholds.data(), keys, over);
  for (int i = 0; i < keys; ++i) best[i] = over[i] > 0.0F ? kInfinity : best[i];
  const float mass = kernels::RankThreshold(best, keys, sample_rank(wanted), work);
  for (size_t h = 0; h < thresholds.size(); ++h) {
    thresholds[h] = std::min(thresholds[h], mass + reference_[h]);
  }
  return thresholds;
}

int64_t LadderPlan::WantedKeys(const float* estimates, int keys, int64_t wanted,
                               Scratch& scratch) const {
  const auto count = static_cast<size_t>(keys);
  size_t needed = count;
  if (options_.mass > 0.0F) needed = KeysForMass(estimates, count, scratch);
  if (options_.beta > 0.0F) {
    std::vector<bool> near(count);
    for (int h = 0; h < group_; ++h) {
      const float* const head = estimates + static_cast<size_t>(h) * count;
      const float bar = kernels::MaxElement(head, keys) - options_.beta;
      for (size_t i = 0; i < count; ++i) near[i] = near[i] || head[i] >= bar;
    }
    needed = std::min(needed, static_cast<size_t>(std::count(near.begin(), near.end(), true)));
  }
  if (needed == count) return wanted;
  const int64_t all = (last_block_ - first_block_) * kScanBlock;
  return std::clamp<int64_t>(static_cast<int64_t>(needed) * all / keys, 1, wanted);
}

size_t LadderPlan::KeysForMass(const float* estimates, size_t count, Scratch& scratch) const {
  const auto group = static_cast<size_t>(group_);
  auto* shares = scratch.Take<float>(group * count);
  std::vector<std::pair<float, uint32_t>> ranked(count, {-kInfinity, 0});
  for (size_t h = 0; h < group; ++h) {
    float sum = 0.0F;
    for (size_t i = 0; i < count; ++i) {
      const float rank = estimates[h * count + i] - reference_[h];
      ranked[i] = {std::max(ranked[i].first, rank), static_cast<uint32_t>(i)};
      shares[h * count + i] = std::exp(rank);
      sum += shares[h * count + i];
    }
    // As if all estimates of a head were equally noisy.
    const float factor = sampled_mass_[h] / std::max(sum, 1e-30F);
    for (size_t i = 0; i < count; ++i) shares[h * count + i] *= factor;
  }
  std::sort(ranked.begin(), ranked.end());
  std::vector<float> left(group, 0.0F);
  for (size_t passed = 0; passed < count; ++passed) {
    for (size_t h = 0; h < group; ++h) {
      left[h] += shares[h * count + ranked[passed].second];
      if (left[h] > options_.mass) return count - passed;
    }
  }
  return 0;
}

void LadderPlan::EstimateReference(const std::vector<int64_t>& sample, float* estimates,
                                   Scratch& scratch) {
  const auto group = static_cast<size_t>(group_);
  const auto keys = static_cast<int>(sample.size() * kScanBlock);
  auto* sums = scratch.Take<int16_t>(group * kScanBlock);
  auto* weights = scratch.Take<float>(group);
  const ScanResults results = {scratch.Take<uint32_t>(kScanBlock), weights,
                               scratch.Take<uint16_t>(group * kScanBlock)};
  std::vector<float> largest(group, -kInfinity);  // estimate so far, of each head
  std::vector<float> mass(group, 0.0F);           // sum of weights relative to it
  for (size_t i = 0; i < sample.size(); ++i) {
    if (i + kBlocksAhead < sample.size()) {
      kernels::PrefetchRange(codes_->Block(sample[i + kBlocksAhead]),
                             static_cast<size_t>(codes_->BlockBytes()));
    }
    float* block_estimates = estimates + i * kScanBlock;
    codes_->Scan(sample[i], 1, nullptr, sums);
    codes_->Estimate(sample[i], 1, sums, block_estimates, keys);
    for (size_t h = 0; h < group; ++h) {
      const float best = kernels::MaxElement(block_estimates + h * keys, kScanBlock);
      if (best > largest[h]) {
        mass[h] *= std::exp(largest[h] - best);
        largest[h] = best;
      }
    }
    codes_->Select(sample[i], 1, sums, {{}, largest.data()}, nullptr, results);
    for (size_t h = 0; h < group; ++h) mass[h] += weights[h];
  }
  // The sample's share, scaled up, beside the exact part's.
  const float scale_up =
      static_cast<float>(last_block_ - first_block_) / static_cast<float>(sample.size());
  for (size_t h = 0; h < group; ++h) {
    const float sampled = largest[h] + std::log(std::max(mass[h] * scale_up, 1e-30F));
    const float high = std::max(reference_[h], sampled);
    const float low = std::min(reference_[h], sampled);
    reference_[h] = high + std::log1p(std::exp(low - high));
    sampled_mass_.push_back(std::exp(sampled - reference_[h]));
  }
}

void LadderPlan::FillFineHeads(int64_t segment, kernels::FineHead* heads) const {
  const float* centres = centre_scores_.data() + (segment - first_block_ / kSegmentBlocks) * group_;
  const float scale = view_.shape.softmax_scale * kernels::kFourBitStep / 2.0F;
  for (int h = 0; h < group_; ++h) {
    heads[h] = {centres[h], scale * query_units_[static_cast<size_t>(h)]};
  }
}

}  // namespace kvseek::index
