#include "cli/synthetic.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/dtype.h"

namespace kvseek::cli {
namespace {

ModelShape SmallShape() {
  ModelShape shape;
  shape.layers = 2;
  shape.kv_heads = 2;
  shape.query_heads = 6;
  return shape;
}

TEST(SyntheticTest, IsAFunctionOfItsSeed) {
  const SyntheticModel a(SmallShape(), 5);
  const SyntheticModel b(SmallShape(), 5);
  const SyntheticModel other(SmallShape(), 6);
  std::vector<uint16_t> keys[3];
  std::vector<uint16_t> values[3];
  a.Fill(1, 1, 0, 40, keys[0], values[0]);
  b.Fill(1, 1, 0, 40, keys[1], values[1]);
  other.Fill(1, 1, 0, 40, keys[2], values[2]);
  EXPECT_EQ(keys[0], keys[1]);
  EXPECT_EQ(values[0], values[1]);
  EXPECT_NE(keys[0], keys[2]);
  EXPECT_EQ(a.Queries(1, 3), b.Queries(1, 3));
  EXPECT_NE(a.Queries(1, 3), a.Queries(1, 4));
  // Blocks continue each other.
  b.Fill(1, 1, 30, 10, keys[1], values[1]);
  EXPECT_TRUE(std::equal(keys[1].begin(), keys[1].end(), keys[0].end() - 10 * 2 * 128));
}

TEST(SyntheticTest, ConcentratesAttentionAsRealHeadsDo) {
  const SyntheticModel model(SmallShape(), 1);
  constexpr size_t kTokens = 8192;
  std::vector<uint16_t> keys;
  std::vector<uint16_t> values;
  model.Fill(0, 0, 0, kTokens, keys, values);
  double share = 0.0;
  for (uint64_t step = 0; step < 4; ++step) {
    const std::vector<float> queries = model.Queries(0, step);
    std::vector<double> scores(kTokens, 0.0);
    for (size_t t = 0; t < kTokens; ++t) {
      for (size_t d = 0; d < 128; ++d) {
        scores[t] +=
            double{queries[d]} * double{kernels::Bf16ToFloat(keys[t * 256 + d])} / std::sqrt(128.0);
      }
    }
    const double max = *std::max_element(scores.begin(), scores.end());
    for (double& score : scores) score = std::exp(score - max);
    std::sort(scores.rbegin(), scores.rend());
    const double all = std::accumulate(scores.begin(), scores.end(), 0.0);
    share += std::accumulate(scores.begin(), scores.begin() + kTokens / 30, 0.0) / all / 4.0;
  }
  EXPECT_GT(share, 0.8);
  EXPECT_LT(share, 0.95);
}

}  // namespace
}  // namespace kvseek::cli
