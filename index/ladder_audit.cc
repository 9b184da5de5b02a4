#include "index/ladder_audit.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kernels/cpu/attention.h"

namespace kvseek::index {
namespace {

using kernels::kScanBlock;

/// A number in [0, 1) that depends on its arguments only (splitmix64).
double UniformHash(uint64_t seed, uint64_t a, uint64_t b) {
  uint64_t x = seed ^ (a * 0x9e3779b97f4a7c15ULL) ^ (b * 0xd1b54a32d192ed03ULL);
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  x ^= x >> 31;
  return static_cast<double>(x >> 11) * 0x1p-53;
}

constexpr float kUnbounded = 1e30F;
constexpr double kNormal95 = 1.96;
// What a sample does not see of a mean but its logarithmic interval still covers.
constexpr double kUnseenAllowed = 0.15;

/// Share of a lognormal mean (of logarithmic deviation `noise`) that lies beyond the largest of
/// `count` draws.
double UnseenShare(double count, double noise) {
  const double log_count = std::log(std::max(count, 3.0));
  const double largest = std::sqrt(2.0 * log_count - std::log(4.0 * std::numbers::pi * log_count));
  return 0.5 * std::erfc((largest - noise) / std::numbers::sqrt2);
}

}  // namespace

RestRatio EstimateRatio(absl::Span<const float> ratios, double noise) {
  const auto count = static_cast<double>(ratios.size());
  double sum = 0.0;
  for (const float ratio : ratios) sum += ratio;
  const double mean = sum / count;
  double squares = 0.0;
  for (const float ratio : ratios) squares += (ratio - mean) * (ratio - mean);
  if (ratios.size() < 2 || !(mean > 0.0)) return {static_cast<float>(mean), 0.0F, kUnbounded};
  const double relative_error = std::sqrt(squares / (count - 1.0) / count) / mean;
  // Student's quantile, nearly.
  const double factor = std::exp(kNormal95 * (1.0 + 1.25 / (count - 1.0)) * relative_error);
  const double unseen =
      std::max(0.0, (UnseenShare(count, noise) - kUnseenAllowed) / (1.0 - kUnseenAllowed));
  const double high = mean * factor / std::max(1.0 - unseen, 1e-20);
  return {static_cast<float>(mean), static_cast<float>(mean / factor),
          static_cast<float>(std::min<double>(high, kUnbounded))};
}

RestRatio LadderAudit::Sample(const LadderPlan& plan, const ScoredKeys& candidates, int head,
                              Scratch& scratch) {
  scratch.Reset();
  const int planes = plan.view_.shape.scan_bits;
  const auto samples = static_cast<size_t>(plan.options_.audit_samples);
  const int8_t* table =
      plan.tables_.get() + static_cast<ptrdiff_t>(head) * plan.symbols_ * kernels::kTableSize;
  auto* sums = scratch.Take<int16_t>(kScanBlock);
  auto* estimates = scratch.Take<float>(kScanBlock);
  auto* weights = scratch.Take<float>(kScanBlock);
  auto* heads = scratch.Take<kernels::ScanHead>(static_cast<size_t>(plan.group_));
  auto* rows = scratch.Take<const uint16_t*>(samples);
  auto* drawn_weights = scratch.Take<float>(samples);
  auto* scores = scratch.Take<float>(samples);

  double total = 0.0;
  for (const LadderPlan::Piece& piece : plan.pieces_) {
    const auto blocks = static_cast<size_t>(piece.last_block - piece.first_block);
    for (size_t b = 0; b < blocks; ++b) {
      total += piece.block_weights[static_cast<size_t>(head) * blocks + b];
    }
  }
  const double step = total / static_cast<double>(samples);
  double next = step * UniformHash(plan.options_.seed, static_cast<uint64_t>(plan.query_.end),
                                   static_cast<uint64_t>(head));
  double passed = 0.0;
  size_t drawn = 0;
  double variance = 0.0;  // summed over the sample
  for (const LadderPlan::Piece& piece : plan.pieces_) {
    const auto blocks = static_cast<size_t>(piece.last_block - piece.first_block);
    for (size_t b = 0; b < blocks && drawn < samples; ++b) {
      const float block_weight = piece.block_weights[static_cast<size_t>(head) * blocks + b];
      if (passed + block_weight <= next) {
        passed += block_weight;
        continue;
      }
      const int64_t block = piece.first_block + static_cast<int64_t>(b);
      plan.FillScanHeads(block / LadderPlan::kSegmentBlocks, false, heads);
      kernels::ScanCodes(plan.Block(block), 1, plan.symbols_, planes, table, 1, sums, kScanBlock);
      kernels::EstimateScores(sums, kScanBlock, plan.Block(block), 1, plan.symbols_, planes,
                              heads + head, 1, estimates, kScanBlock, weights);
      const auto* gains = reinterpret_cast<const uint16_t*>(
          plan.Block(block) + kernels::ScanGainOffset(plan.symbols_, planes));
      double inside = passed;
      for (int i = 0; i < kScanBlock && drawn < samples; ++i) {
        const int64_t position = block * kScanBlock + i;
        if (std::binary_search(candidates.positions.begin(), candidates.positions.end(),
                               position)) {
          continue;
        }
        inside += weights[i];
        for (; next < inside && drawn < samples; next += step) {
          const float noise = heads[head].noise * kernels::Bf16ToFloat(gains[i]);
          variance += noise * noise;
          rows[drawn] = FindRow(plan.view_, position).key;
          drawn_weights[drawn++] = weights[i];
        }
      }
      passed += block_weight;
    }
  }
  const float* query = plan.scaled_.get() + static_cast<ptrdiff_t>(head) * plan.view_.shape.key_dim;
  kernels::ScoreGathered(query, 1, rows, plan.view_.shape.dtype, static_cast<int>(drawn),
                         plan.view_.shape.key_dim, scores, static_cast<int>(samples));
  for (size_t i = 0; i < drawn; ++i) {
    scores[i] = std::exp(scores[i] - plan.reference_[static_cast<size_t>(head)]) / drawn_weights[i];
  }
  return EstimateRatio({scores, drawn}, std::sqrt(variance / static_cast<double>(drawn)));
}

}  // namespace kvseek::index
