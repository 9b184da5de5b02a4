#include "index/landmark_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "index/parts_index.h"
#include "tests/index/double_attention.h"
#include "tests/index/random_trace.h"

namespace kvseek::index {
namespace {

/// Scores of one head over [begin, end) that are not below its k-th best, as positions. Scores
/// within rounding of the k-th best are left out: any of them may be the k-th.
std::vector<int64_t> TopKeys(const cli::HeadTrace& trace, int step, int head, int64_t begin,
                             int64_t end, int k) {
  std::vector<std::pair<double, int64_t>> scores;
  for (int64_t p = begin; p < end; ++p) scores.emplace_back(ScoreOf(trace, step, head, p), p);
  std::sort(scores.rbegin(), scores.rend());
  std::vector<int64_t> keys;
  const size_t count = std::min<size_t>(static_cast<size_t>(k), scores.size());
  for (size_t i = 0; i < count; ++i) {
    const bool tied = scores.size() > count && scores[i].first < scores[count].first + 1e-4;
    if (!tied) keys.push_back(scores[i].second);
  }
  return keys;
}

std::vector<int64_t> Sorted(std::vector<int64_t> keys) {
  std::sort(keys.begin(), keys.end());
  return keys;
}

void ExpectTopIsRead(const cli::HeadTrace& trace, int block, int64_t begin, int64_t end, int top,
                     int64_t* keys_read = nullptr) {
  const cli::StoredHead head(trace, 2);
  const auto built = BuildLandmark({.view = head.view()}, {.block = block});
  Scratch scratch;
  for (int step = 0; step < trace.steps; ++step) {
    const SearchResult result =
        built->Search(head.view(), {trace.StepQueries(step), trace.group, begin, end},
                      {.candidates = 1, .list_read = true, .exact_top = top}, scratch);
    if (keys_read != nullptr) *keys_read += result.report.keys_exact;
    for (int h = 0; h < trace.group; ++h) {
      const std::vector<int64_t> best = Sorted(TopKeys(trace, step, h, begin, end, top));
      ASSERT_TRUE(
          std::includes(result.positions.begin(), result.positions.end(), best.begin(), best.end()))
          << "head " << h << " step " << step << " block " << block;
    }
  }
}

TEST(LandmarkIndexTest, RunToTheEndItHasReadEveryHeadsBestKeys) {
  for (const int block : {16, 32, 64, 128, 256}) {
    ExpectTopIsRead(RandomTrace({.tokens = 5200, .key_dim = 8, .group = 5}), block, 0, 5200, 10);
    ExpectTopIsRead(RandomTrace({.tokens = 5200, .group = 2, .seed = 2}), block, 777, 5001, 100);
  }
  ExpectTopIsRead(
      RandomTrace({.tokens = 2100, .key_dim = 16, .dtype = kernels::DType::kFp16, .seed = 3}), 16,
      0, 2100, 1);
  ExpectTopIsRead(RandomTrace({.tokens = 1500, .key_dim = 16, .seed = 4}), 16, 0, 1500, 5000);
}

TEST(LandmarkIndexTest, WhereBoundsAreTightItReadsFewKeys) {
  // Keys that move slowly with position, so that a block's box is small.
  cli::HeadTrace trace = RandomTrace({.tokens = 8192, .key_dim = 8, .group = 2, .steps = 6});
  for (int64_t t = 0; t < trace.tokens; ++t) {
    for (int d = 0; d < 8; ++d) {
      const float phase = static_cast<float>(t) * 0.003F * static_cast<float>(d + 1);
      trace.keys[static_cast<size_t>(t * 8 + d)] = kernels::FloatToBf16(5.0F * std::sin(phase));
    }
  }
  int64_t keys_read = 0;
  ExpectTopIsRead(trace, 16, 0, 8192, 20, &keys_read);
  EXPECT_LT(keys_read / trace.steps, 8192 / 4);
}

TEST(LandmarkIndexTest, BoundsHoldToTheLastBit) {
  // Large numbers that nearly cancel: scores differ by less than fp32 sums are off by.
  cli::HeadTrace trace = RandomTrace({.tokens = 4096, .key_dim = 64, .group = 2, .seed = 5});
  std::mt19937_64 random(6);
  for (int64_t t = 0; t < trace.tokens; ++t) {
    for (int d = 0; d < 64; d += 2) {
      const auto at = static_cast<size_t>(t * 64 + d);
      trace.keys[at] = kernels::FloatToBf16(3000.0F);
      trace.keys[at + 1] = kernels::FloatToBf16(-3000.0F);
    }
    trace.keys[static_cast<size_t>(t * 64)] =
        kernels::FloatToBf16(3000.0F + 16.0F * static_cast<float>(random() % 4));
  }
  for (float& query : trace.queries) query = 1.0F + 1e-3F * query;
  ExpectTopIsRead(trace, 16, 0, 4096, 50);
}

TEST(LandmarkIndexTest, OneHeavyKeyIsFoundWhereverItIs) {
  std::mt19937_64 random(7);
  for (int trial = 0; trial < 20; ++trial) {
    cli::HeadTrace trace =
        RandomTrace({.tokens = 4096, .group = 1, .steps = 1, .seed = 100U + trial});
    const auto heavy = static_cast<int64_t>(random() % 4096);
    for (int d = 0; d < 64; ++d) {
      trace.keys[static_cast<size_t>(heavy * 64 + d)] =
          kernels::FloatToBf16(3.0F * trace.queries[static_cast<size_t>(d)]);
    }
    ExpectTopIsRead(trace, 64, 0, 4096, 1);
    const cli::StoredHead head(trace, 2);
    const auto built = BuildLandmark({.view = head.view()}, {});
    Scratch scratch;
    const SearchResult best = built->Search(head.view(), {trace.StepQueries(0), 1, 0, 4096},
                                            {.k = 1, .candidates = 16, .exact_top = 1}, scratch);
    EXPECT_THAT(best.positions, testing::ElementsAre(heavy));
  }
}

TEST(LandmarkIndexTest, TreeTakesTheBlocksOfHighestBound) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 8192, .key_dim = 16, .group = 1});
  const cli::StoredHead head(trace, 2);
  const auto built = BuildLandmark({.view = head.view()}, {.block = 16});
  Scratch scratch;
  const SearchResult result = built->Search(head.view(), {trace.StepQueries(0), 1, 0, 8192},
                                            {.candidates = 480, .list_read = true}, scratch);
  ASSERT_EQ(result.positions.size(), 480U);
  std::vector<std::pair<float, int64_t>> bounds;
  for (const auto& run : dynamic_cast<const PartsIndex&>(*built).runs()) {
    const KeyParts& parts = *run->parts;
    const PartQueries queries({trace.StepQueries(0), 1}, head.view().shape, *parts.basis());
    std::vector<float> bound(static_cast<size_t>(parts.count()));
    std::vector<float> work(bound.size());
    parts.UpperBounds(queries, 0, parts.count(), bound.data(), work.data(), parts.count());
    for (size_t i = 0; i < bound.size(); ++i) {
      bounds.emplace_back(bound[i], parts.begin() + static_cast<int64_t>(i) * 16);
    }
  }
  std::sort(bounds.rbegin(), bounds.rend());
  std::vector<int64_t> blocks;
  for (size_t i = 0; i < 30; ++i) blocks.push_back(bounds[i].second);
  std::vector<int64_t> read;
  for (size_t i = 0; i < result.positions.size(); i += 16) read.push_back(result.positions[i]);
  EXPECT_EQ(read, Sorted(blocks));
}

constexpr LandmarkOptions kGiven64{.block = 64, .summary = LandmarkSummary::kGiven};

/// Landmarks of some blocks of 64: the query itself for block `best`, its opposite for the others.
struct Landmarks {
  Landmarks(const cli::HeadTrace& trace, const std::vector<int64_t>& blocks, int64_t best) {
    for (const int64_t block : blocks) {
      positions.push_back(block * 64);
      for (int d = 0; d < trace.key_dim; ++d) {
        rows.push_back((block == best ? 1.0F : -1.0F) * trace.queries[static_cast<size_t>(d)]);
      }
    }
  }
  BuildInput Input(const cli::StoredHead& head,
                   std::shared_ptr<const BuiltIndex> previous = nullptr) const {
    return {.view = head.view(),
            .landmarks = rows,
            .landmark_positions = positions,
            .previous = std::move(previous)};
  }

  std::vector<int64_t> positions;
  std::vector<float> rows;
};

std::vector<int64_t> Blocks(int64_t count) {
  std::vector<int64_t> blocks(static_cast<size_t>(count));
  std::iota(blocks.begin(), blocks.end(), 0);
  return blocks;
}

/// First position of the 64 that a search of one block's budget reads.
int64_t BlockRead(const BuiltIndex& built, const cli::HeadTrace& trace,
                  const cli::StoredHead& head) {
  Scratch scratch;
  const SearchResult result =
      built.Search(head.view(), {trace.StepQueries(0), trace.group, 0, built.covered()},
                   {.candidates = 64, .list_read = true}, scratch);
  EXPECT_EQ(result.positions.size(), 64U);
  return result.positions.empty() ? -1 : result.positions.front();
}

TEST(LandmarkIndexTest, RanksByTheClientsKeys) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 5 * kSegmentTokens, .group = 1});
  const cli::StoredHead head(trace, 2);
  const Landmarks all(trace, Blocks(80), 70);
  EXPECT_EQ(BlockRead(*BuildLandmark(all.Input(head), kGiven64), trace, head), 70 * 64);
}

TEST(LandmarkIndexTest, ABlockWithoutALandmarkIsRankedByItsMean) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 5 * kSegmentTokens + 70, .group = 1});
  const cli::StoredHead head(trace, 2);
  // Blocks 3 and 66 have none, and one that is not sealed whole has one.
  std::vector<int64_t> blocks = Blocks(81);
  blocks.erase(blocks.begin() + 66);
  blocks.erase(blocks.begin() + 3);
  const Landmarks some(trace, blocks, -1);
  const auto built = BuildLandmark(some.Input(head), kGiven64);
  const auto& runs = dynamic_cast<const PartsIndex&>(*built).runs();
  ASSERT_EQ(runs.size(), 2U);
  for (const int64_t block : Blocks(80)) {
    const PartsRun& run = *runs[static_cast<size_t>(block / 64)];
    const size_t at = static_cast<size_t>(block % 64) * 64;
    const bool given = block != 3 && block != 66;
    for (size_t d = 0; d < 64; ++d) {
      ASSERT_EQ(run.landmarks[at + d], given ? -trace.queries[d] : run.parts->mean_keys()[at + d])
          << block;
    }
  }
  // Of random keys, means score about 0 and opposites of the query far below.
  const int64_t read = BlockRead(*built, trace, head);
  EXPECT_TRUE(read == 3 * 64 || read == 66 * 64) << read;
  // None at all.
  const auto means = BuildLandmark({.view = head.view()}, kGiven64);
  EXPECT_EQ(dynamic_cast<const PartsIndex&>(*means).runs()[1]->landmarks[5],
            runs[1]->parts->mean_keys()[5]);
}

TEST(LandmarkIndexTest, ALandmarkThatComesLateCountsInTheNextBuild) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 9 * kSegmentTokens, .group = 1});
  const cli::StoredHead head(trace, 2);
  std::vector<int64_t> blocks = Blocks(144);
  blocks.erase(blocks.begin() + 10);
  const Landmarks before(trace, blocks, 100);
  const auto old = BuildLandmark(before.Input(head), kGiven64);
  EXPECT_EQ(BlockRead(*old, trace, head), 100 * 64);
  Landmarks after(trace, Blocks(144), 10);
  const auto renewed = BuildLandmark(after.Input(head, old), kGiven64);
  EXPECT_EQ(BlockRead(*renewed, trace, head), 10 * 64);
  const auto& were = dynamic_cast<const PartsIndex&>(*old).runs();
  const auto& are = dynamic_cast<const PartsIndex&>(*renewed).runs();
  EXPECT_NE(are[0], were[0]);
  EXPECT_EQ(are[0]->parts, were[0]->parts);
  EXPECT_NE(are[1], were[1]);  // block 100 is one of the others now
  const auto again = BuildLandmark(after.Input(head, renewed), kGiven64);
  EXPECT_EQ(dynamic_cast<const PartsIndex&>(*again).runs()[0], are[0]);
}

}  // namespace
}  // namespace kvseek::index
