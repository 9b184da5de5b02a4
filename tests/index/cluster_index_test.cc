#include "index/cluster_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "index/parts_index.h"
#include "index/query_space.h"
#include "tests/index/random_trace.h"

namespace kvseek::index {
namespace {

const PartsIndex& Parts(const BuiltIndex& built) { return dynamic_cast<const PartsIndex&>(built); }

/// Training queries of random_trace's kind, `group` a position.
std::vector<float> TrainingQueries(const cli::HeadTrace& trace) {
  return RandomTrace({.tokens = 1,
                      .key_dim = trace.key_dim,
                      .value_dim = trace.value_dim,
                      .group = trace.group,
                      .steps = 100,
                      .seed = 77})
      .queries;
}

TEST(ClusterIndexTest, ClustersHaveTheSizeAskedFor) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 5 * kSegmentTokens});
  const cli::StoredHead head(trace, 2);
  for (const int keys : {4, 16, 100, 256}) {
    const auto built = BuildCluster({.view = head.view()}, {.keys_per_cluster = keys});
    for (const auto& run : Parts(*built).runs()) {
      const auto tokens = static_cast<double>(run->parts->end() - run->parts->begin());
      EXPECT_NEAR(run->parts->count(), tokens / keys, 0.1 * tokens / keys + 5.0);
    }
  }
}

TEST(ClusterIndexTest, TheSameInputGivesTheSameIndex) {
  const cli::HeadTrace trace = RandomTrace({.tokens = 3 * kSegmentTokens, .key_dim = 80});
  const cli::StoredHead head(trace, 2);
  const std::vector<float> queries = TrainingQueries(trace);
  const std::vector<int64_t> positions(100, 5);
  const BuildInput input{
      .view = head.view(), .group = trace.group, .queries = queries, .query_positions = positions};
  const auto a = BuildCluster(input, {});
  const auto b = BuildCluster(input, {});
  const KeyParts& parts_a = *Parts(*a).runs()[0]->parts;
  const KeyParts& parts_b = *Parts(*b).runs()[0]->parts;
  ASSERT_EQ(parts_a.count(), parts_b.count());
  for (int p = 0; p < parts_a.count(); ++p) EXPECT_EQ(parts_a.Members(p), parts_b.Members(p));
}

TEST(ClusterIndexTest, QueriesDecideWhatIsAlike) {
  // Keys differ by far most in dimension 0, which queries do not look at, and in dimension 1, with
  // two values, which they do.
  cli::HeadTrace trace = RandomTrace({.tokens = kSegmentTokens, .key_dim = 16, .group = 1});
  for (int64_t t = 0; t < trace.tokens; ++t) {
    trace.keys[static_cast<size_t>(t * 16)] =
        kernels::FloatToBf16(static_cast<float>(t * 37 % 1024));
    trace.keys[static_cast<size_t>(t * 16 + 1)] = kernels::FloatToBf16(t % 2 == 0 ? 10.0F : -10.0F);
  }
  std::vector<float> queries;
  for (int i = 0; i < 16 * 50; ++i) queries.push_back(i % 16 == 1 ? 30.0F : 0.0F);
  const std::vector<int64_t> positions(50, 0);
  const cli::StoredHead head(trace, 2);
  const auto built =
      BuildCluster({.view = head.view(), .queries = queries, .query_positions = positions}, {});
  const KeyParts& parts = *Parts(*built).runs()[0]->parts;
  for (int p = 0; p < parts.count(); ++p) {
    const auto members = parts.Members(p);
    for (const uint16_t member : members) ASSERT_EQ(member % 2, members[0] % 2);
  }
}

TEST(ClusterIndexTest, KeysThatStandOutAreOnTheirOwn) {
  cli::HeadTrace trace = RandomTrace({.tokens = 2 * kSegmentTokens, .seed = 5});
  for (const int64_t sink : {3, 1500}) {
    for (int d = 0; d < trace.key_dim; ++d) {
      trace.keys[static_cast<size_t>(sink * trace.key_dim + d)] =
          kernels::FloatToBf16(d % 2 == 0 ? 9.0F : -9.0F);
    }
  }
  // One of them alone, or both together, since they are alike.
  const cli::StoredHead head(trace, 2);
  const auto built = BuildCluster({.view = head.view()}, {});
  const KeyParts& parts = *Parts(*built).runs()[0]->parts;
  for (int p = 0; p < parts.count(); ++p) {
    const auto members = parts.Members(p);
    if (std::find(members.begin(), members.end(), 3) == members.end()) continue;
    for (const uint16_t member : members) EXPECT_TRUE(member == 3 || member == 1500);
  }
}

TEST(QuerySpaceTest, DistanceIsTheMeanSquaredDifferenceOfScores) {
  const cli::HeadTrace trace = RandomTrace({.tokens = kSegmentTokens, .key_dim = 24, .group = 2});
  const cli::StoredHead head(trace, 2);
  const std::vector<float> queries = TrainingQueries(trace);
  const std::vector<int64_t> positions(100, 0);
  const BuildInput input{
      .view = head.view(), .group = trace.group, .queries = queries, .query_positions = positions};
  const FloatRows keys = QuerySpace(input).Keys(0, kSegmentTokens);
  for (const auto& [a, b] : std::vector<std::pair<size_t, size_t>>{{0, 1}, {5, 900}, {77, 78}}) {
    double distance = 0.0;
    for (size_t d = 0; d < 24; ++d) {
      const double difference = keys.row(a)[d] - keys.row(b)[d];
      distance += difference * difference;
    }
    double mean = 0.0;
    for (size_t q = 0; q < 200; ++q) {
      double difference = 0.0;
      for (size_t d = 0; d < 24; ++d) {
        difference += queries[q * 24 + d] * (kernels::Bf16ToFloat(trace.keys[a * 24 + d]) -
                                             kernels::Bf16ToFloat(trace.keys[b * 24 + d]));
      }
      mean += std::pow(difference * trace.softmax_scale, 2.0) / 200.0;
    }
    EXPECT_NEAR(distance, mean, 0.01 * mean);
  }
}

TEST(QuerySpaceTest, OutliersGetPartsOfTheirOwn) {
  FloatRows rows{1, {}};
  std::vector<uint16_t> part_of;
  for (int i = 0; i < 512; ++i) {
    rows.elements.push_back(i == 40 || i == 300 ? 100.0F : static_cast<float>(i % 2));
    part_of.push_back(static_cast<uint16_t>(i / 128));
  }
  EXPECT_EQ(SplitOutliers(rows, part_of), 6);
  EXPECT_EQ(part_of[40] + part_of[300], 4 + 5);
  EXPECT_EQ(std::count(part_of.begin(), part_of.end(), 0), 127);
}

}  // namespace
}  // namespace kvseek::index
