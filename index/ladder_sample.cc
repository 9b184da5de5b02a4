// The sample of a ladder search: estimates of a few blocks set the thresholds for all.
#include <algorithm>
#include <cmath>
#include <limits>

#include "index/ladder_plan.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/reduce.h"
#include "kernels/cpu/threshold.h"

namespace kvseek::index {
namespace {

using kernels::kScanBlock;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// The sample that sets the threshold: one block in kSampleStride, or as many as have about
// kSampleCandidates of the candidates if these are fewer, but at least kSampleBlocksMin.
constexpr int64_t kSampleStride = 32;
constexpr int64_t kSampleCandidates = 256;
constexpr int64_t kSampleBlocksMin = 64;
// One part in so many of the candidates is each head's own. Without it, heads with much noise or
// little mass left in the range find few of their best keys; a larger share changes little.
constexpr int64_t kHeadShare = 8;
// The sample is cut into so many parts, of at least so many blocks.
constexpr size_t kPartsMax = 4;
constexpr size_t kPartBlocksMin = 8;

/// Block numbers of the sample: evenly spread, the first and the last always among them.
std::pmr::vector<int64_t> SampleBlocks(int64_t first, int64_t last, int64_t candidates,
                                       Scratch& memory) {
  const int64_t blocks = last - first;
  const int64_t stride = std::max(kSampleStride, candidates / kSampleCandidates);
  const int64_t wanted = std::min(blocks, std::max(kSampleBlocksMin, blocks / stride));
  std::pmr::vector<int64_t> sample(&memory);
  sample.reserve(static_cast<size_t>(wanted));
  for (int64_t i = 0; i < wanted; ++i) {
    sample.push_back(wanted == 1 ? first : first + i * (blocks - 1) / (wanted - 1));
  }
  return sample;
}

}  // namespace

void LadderPlan::PlanSample() {
  sample_ =
      SampleBlocks(first_block_, last_block_, std::max(options_.candidates, options_.k), memory_);
  const auto group = static_cast<size_t>(group_);
  estimates_ = memory_.Take<float>(group * sample_.size() * kScanBlock);
  // A part ends where a segment does, since it scores the centres of its own.
  const size_t parts = std::clamp<size_t>(sample_.size() / kPartBlocksMin, 1, kPartsMax);
  sample_parts_.reserve(parts);
  size_t block = 0;
  int64_t segment = FirstSegment();
  for (size_t p = 1; p <= parts && segment < LastSegment(); ++p) {
    const int64_t end = p == parts ? LastSegment()
                                   : FirstSegment() + (LastSegment() - FirstSegment()) *
                                                          static_cast<int64_t>(p) /
                                                          static_cast<int64_t>(parts);
    SamplePart part = {
        segment, end, block, block, memory_.Take<float>(group), memory_.Take<float>(group)};
    while (block < sample_.size() && sample_[block] / kSegmentBlocks < end) ++block;
    part.last_block = block;
    segment = end;
    sample_parts_.push_back(part);
  }
}

void LadderPlan::RunSample(SamplePart& part, Scratch& scratch) {
  const absl::Span<const int64_t> blocks =
      absl::MakeConstSpan(sample_).subspan(part.first_block, part.last_block - part.first_block);
  for (size_t i = 0; i < blocks.size() && i < kernels::kSampleAhead; ++i) {
    kernels::PrefetchRange(codes_->Block(blocks[i]), static_cast<size_t>(codes_->ScannedBytes()));
  }
  ScoreCentres(part.first_segment, part.last_segment, scratch);
  scratch.Reset();
  const auto group = static_cast<size_t>(group_);
  std::fill_n(part.largest, group, -kInfinity);
  std::fill_n(part.mass, group, 0.0F);
  auto* const factors = scratch.Take<float>(blocks.size());
  const auto others = static_cast<float>(std::max<size_t>(sample_.size() - 1, 1));
  std::fill_n(factors, blocks.size(), static_cast<float>(last_block_ - first_block_ - 1) / others);
  // The first block stands for itself: a sink in it would be counted many times.
  if (part.first_block == 0 && !blocks.empty()) factors[0] = 1.0F;
  codes_->Sample(blocks, factors,
                 {estimates_ + part.first_block * kScanBlock,
                  static_cast<int>(sample_.size() * kScanBlock), part.largest, part.mass},
                 scratch);
}

void LadderPlan::EstimateReference() {
  reference_ = LseOf(exact_state_, memory_);
  sampled_mass_.reserve(reference_.size());
  // The sample's share beside the exact part's.
  for (size_t h = 0; h < reference_.size(); ++h) {
    float largest = -kInfinity;
    for (const SamplePart& part : sample_parts_) largest = std::max(largest, part.largest[h]);
    float mass = 0.0F;
    for (const SamplePart& part : sample_parts_) {
      if (part.mass[h] > 0.0F) mass += part.mass[h] * std::exp(part.largest[h] - largest);
    }
    const float sampled = largest + std::log(std::max(mass, 1e-30F));
    const float high = std::max(reference_[h], sampled);
    const float low = std::min(reference_[h], sampled);
    reference_[h] = high + std::log1p(std::exp(low - high));
    sampled_mass_.push_back(std::exp(sampled - reference_[h]));
  }
}

void LadderPlan::ChooseThreshold(Scratch& scratch) {
  EstimateReference();
  scratch.Reset();
  const auto keys = static_cast<int>(sample_.size() * kScanBlock);
  const float* const estimates = estimates_;
  const int64_t wanted = std::max<int64_t>(
      WantedKeys(estimates, keys, std::max(options_.candidates, options_.k), scratch), options_.k);
  // Each head's own share is eight times its exact rows at the usual options. Its 4-bit scores are
  // less spread than estimates, so fewer reach the same threshold: four times, at the median.
  const bool lists = options_.k < 0 && options_.exact_rows > 0;
  thresholds_ =
      Thresholds(estimates, keys, wanted, scratch, lists ? &listing_thresholds_ : nullptr);
  if (options_.threshold < 0.0F) RaiseThresholds(estimates, keys, scratch);
  if (options_.keep == 0) return;
  keep_thresholds_ = Thresholds(estimates, keys, options_.keep, scratch);
  for (size_t h = 0; h < thresholds_.size(); ++h) {
    keep_thresholds_[h] = std::min(keep_thresholds_[h], thresholds_[h]);
  }
}

void LadderPlan::RaiseThresholds(const float* estimates, int keys, Scratch& scratch) {
  std::pmr::vector<float> highest(thresholds_.size(), kInfinity, &memory_);
  if (options_.k > 0) highest = Thresholds(estimates, keys, options_.k, scratch);
  for (size_t h = 0; h < thresholds_.size(); ++h) {
    const float passes = std::min(reference_[h] + options_.threshold, highest[h]);
    thresholds_[h] = std::max(thresholds_[h], passes);
  }
}

std::pmr::vector<float> LadderPlan::Thresholds(const float* estimates, int keys, int64_t wanted,
                                               Scratch& scratch,
                                               std::pmr::vector<float>* own) const {
  const int64_t all = (last_block_ - first_block_) * kScanBlock;
  std::pmr::vector<float> thresholds(static_cast<size_t>(group_), -kInfinity, &memory_);
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
  if (own != nullptr) *own = thresholds;
  // The others by their share of softmax mass, with one threshold for all heads that fills the
  // budget.
  auto* best = scratch.Take<float>(static_cast<size_t>(keys));
  kernels::MaxOfShifted(estimates, keys, group_, reference_.data(), thresholds.data(), keys, best);
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
    std::pmr::vector<uint8_t> near(count, 0, &scratch);
    for (int h = 0; h < group_; ++h) {
      const float* const head = estimates + static_cast<size_t>(h) * count;
      const float bar = kernels::MaxElement(head, keys) - options_.beta;
      for (size_t i = 0; i < count; ++i) near[i] |= static_cast<uint8_t>(head[i] >= bar);
    }
    needed = std::min(needed, static_cast<size_t>(std::count(near.begin(), near.end(), 1)));
  }
  if (needed == count) return wanted;
  const int64_t all = (last_block_ - first_block_) * kScanBlock;
  return std::clamp<int64_t>(static_cast<int64_t>(needed) * all / keys, 1, wanted);
}

size_t LadderPlan::KeysForMass(const float* estimates, size_t count, Scratch& scratch) const {
  const auto group = static_cast<size_t>(group_);
  auto* shares = scratch.Take<float>(group * count);
  std::pmr::vector<std::pair<float, uint32_t>> ranked(count, {-kInfinity, 0}, &scratch);
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
  std::pmr::vector<float> left(group, 0.0F, &scratch);
  for (size_t passed = 0; passed < count; ++passed) {
    for (size_t h = 0; h < group; ++h) {
      left[h] += shares[h * count + ranked[passed].second];
      if (left[h] > options_.mass) return count - passed;
    }
  }
  return 0;
}

}  // namespace kvseek::index
