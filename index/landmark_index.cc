#include "index/landmark_index.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "index/parts_index.h"
#include "index/query_space.h"

namespace kvseek::index {
namespace {

/// The block of each of `tokens` keys.
std::vector<uint16_t> BlocksOf(int64_t tokens, int block) {
  std::vector<uint16_t> block_of;
  for (int64_t i = 0; i < tokens; ++i) block_of.push_back(static_cast<uint16_t>(i / block));
  return block_of;
}

PartRank RankOf(LandmarkSummary summary) {
  switch (summary) {
    case LandmarkSummary::kBounds:
      return PartRank::kBound;
    case LandmarkSummary::kMean:
      return PartRank::kSpread;
    case LandmarkSummary::kGiven:
      return PartRank::kLandmark;
  }
  return PartRank::kBound;
}

}  // namespace

std::shared_ptr<const BuiltIndex> BuildLandmark(const BuildInput& input,
                                                const LandmarkOptions& options) {
  const bool bounds = options.summary == LandmarkSummary::kBounds;
  const QuerySpace space(input);
  const auto make = [&](int64_t begin, int64_t end, std::shared_ptr<const CholeskyFactor> basis) {
    auto run = std::make_shared<PartsRun>();
    std::vector<uint16_t> block_of = BlocksOf(end - begin, options.block);
    int count = block_of.back() + 1;
    if (options.summary == LandmarkSummary::kMean) {
      count = SplitOutliers(space.Keys(begin, end), block_of);
    }
    run->parts = KeyParts::Make(input.view, begin, block_of, count, bounds, std::move(basis));
    if (bounds) {
      const std::vector<uint16_t> node_of = BlocksOf(end - begin, options.block * kNodeParts);
      run->nodes = KeyParts::Make(input.view, begin, node_of, node_of.back() + 1, bounds,
                                  run->parts->basis());
    }
    if (options.summary == LandmarkSummary::kGiven) {
      const auto dim = static_cast<size_t>(input.view.shape.key_dim);
      const auto landmarks = options.landmarks.subspan(
          static_cast<size_t>(begin / options.block) * dim, static_cast<size_t>(count) * dim);
      run->landmarks.assign(landmarks.begin(), landmarks.end());
    }
    return std::shared_ptr<const PartsRun>(std::move(run));
  };
  return BuildParts(input, "landmark", RankOf(options.summary), make);
}

}  // namespace kvseek::index
