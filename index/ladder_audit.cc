#include "index/ladder_audit.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/attention.h"

namespace kvseek::index {

using kernels::kScanBlock;

RestRatio LadderAudit::Sample(const LadderPlan& plan, const ScoredKeys& candidates, int head,
                              Scratch& scratch) {
  scratch.Reset();
  const auto samples = static_cast<size_t>(plan.options_.audit_samples);
  auto* weights = scratch.Take<float>(kScanBlock);
  auto* deviations = scratch.Take<float>(kScanBlock);
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
      plan.codes_->Weigh(block, head, plan.reference_[static_cast<size_t>(head)], weights,
                         deviations);
      double own = 0.0;
      for (int i = 0; i < kScanBlock; ++i) {
        if (std::binary_search(candidates.positions.begin(), candidates.positions.end(),
                               block * kScanBlock + i)) {
          weights[i] = 0.0F;
        }
        own += weights[i];
      }
      // The block has what the one that stands for it has.
      const double factor = own > 0.0 ? block_weight / own : 0.0;
      double inside = passed;
      for (int i = 0; i < kScanBlock && drawn < samples; ++i) {
        weights[i] = static_cast<float>(weights[i] * factor);
        if (weights[i] == 0.0F) continue;
        const int64_t position = block * kScanBlock + i;
        inside += weights[i];
        for (; next < inside && drawn < samples; next += step) {
          variance += deviations[i] * deviations[i];
          rows[drawn] = FindRow(plan.view_, position).key;
          drawn_weights[drawn++] = weights[i];
        }
      }
      passed += block_weight;
    }
  }
  const float* query = plan.scaled_ + static_cast<ptrdiff_t>(head) * plan.view_.shape.key_dim;
  kernels::ScoreGathered(query, 1, rows, plan.view_.shape.dtype, static_cast<int>(drawn),
                         plan.view_.shape.key_dim, scores, static_cast<int>(samples));
  for (size_t i = 0; i < drawn; ++i) {
    scores[i] = std::exp(scores[i] - plan.reference_[static_cast<size_t>(head)]) / drawn_weights[i];
  }
  return EstimateRatio({scores, drawn}, std::sqrt(variance / static_cast<double>(drawn)),
                       static_cast<int>(drawn));
}

}  // namespace kvseek::index
