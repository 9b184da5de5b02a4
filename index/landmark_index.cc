#include "index/landmark_index.h"

#include <algorithm>
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

/// The landmarks of a run's blocks: (count, key_dim), the client's where there is one.
std::vector<float> LandmarksOf(const BuildInput& input, const KeyParts& parts, int block) {
  const auto dim = static_cast<size_t>(input.view.shape.key_dim);
  const auto count = static_cast<size_t>(parts.count());
  std::vector<float> landmarks(parts.mean_keys(), parts.mean_keys() + count * dim);
  const absl::Span<const int64_t> positions = input.landmark_positions;
  const auto first = std::lower_bound(positions.begin(), positions.end(), parts.begin());
  for (auto i = static_cast<size_t>(first - positions.begin());
       i < positions.size() && positions[i] < parts.end(); ++i) {
    const auto at = static_cast<size_t>((positions[i] - parts.begin()) / block);
    const absl::Span<const float> given = input.landmarks.subspan(i * dim, dim);
    std::copy(given.begin(), given.end(), landmarks.begin() + static_cast<ptrdiff_t>(at * dim));
  }
  return landmarks;
}

}  // namespace

std::shared_ptr<const BuiltIndex> BuildLandmark(const BuildInput& input,
                                                const LandmarkOptions& options) {
  const bool bounds = options.summary == LandmarkSummary::kBounds;
  const bool given = options.summary == LandmarkSummary::kGiven;
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
    if (given) run->landmarks = LandmarksOf(input, *run->parts, options.block);
    return std::shared_ptr<const PartsRun>(std::move(run));
  };
  // A landmark may come later than the run that its block is in was built.
  const auto renew = [&](const std::shared_ptr<const PartsRun>& run) {
    if (!given) return run;
    std::vector<float> landmarks = LandmarksOf(input, *run->parts, options.block);
    if (landmarks == run->landmarks) return run;
    auto renewed = std::make_shared<PartsRun>(*run);
    renewed->landmarks = std::move(landmarks);
    return std::shared_ptr<const PartsRun>(std::move(renewed));
  };
  return BuildParts(input, "landmark", RankOf(options.summary), make, renew);
}

}  // namespace kvseek::index
