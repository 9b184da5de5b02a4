#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/simd_level.h"
#include "tests/kernels/reference.h"

namespace kvseek::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
/// What fp32 sums of a few hundred products, the largest about 30, may be off.
constexpr double kTolerance = 1e-4;
constexpr int kTokenCounts[] = {0, 1, 63, 64, 65, 200};

/// Stored values and queries of one head cache.
struct Case {
  Case(DType type, int heads, int keys_dim, int values_dim, int rows)
      : dtype(type), group(heads), key_dim(keys_dim), value_dim(values_dim), tokens(rows) {
    const auto rows_size = static_cast<size_t>(tokens);
    queries = reference::RandomFloats(1, static_cast<size_t>(group * key_dim), 0.2F);
    keys = reference::RandomElements(2, rows_size * static_cast<size_t>(key_dim), 1.0F, dtype);
    values = reference::RandomElements(3, rows_size * static_cast<size_t>(value_dim), 1.0F, dtype);
    for (size_t i = 0; i < keys.size(); i += 977) keys[i] = reference::Round(90.0F, dtype);
    for (size_t i = 0; i < values.size(); i += 1201) values[i] = reference::Round(-400.0F, dtype);
    scores = reference::Scores(queries.data(), group, keys.data(), dtype, tokens, key_dim);
    for (int t = 0; t < tokens; ++t) {
      key_rows.push_back(keys.data() + static_cast<size_t>(t) * static_cast<size_t>(key_dim));
      value_rows.push_back(values.data() + static_cast<size_t>(t) * static_cast<size_t>(value_dim));
    }
  }

  reference::Attention Expected() const {
    return reference::Attend(scores, group, values.data(), dtype, tokens, value_dim);
  }

  DType dtype;
  int group;
  int key_dim;
  int value_dim;
  int tokens;
  std::vector<float> queries;
  std::vector<uint16_t> keys;
  std::vector<uint16_t> values;
  std::vector<double> scores;  // (group, tokens)
  std::vector<const uint16_t*> key_rows;
  std::vector<const uint16_t*> value_rows;
};

/// A running state with its storage.
struct State {
  State(int group, int value_dim)
      : storage(static_cast<size_t>(GroupStateFloats(group, value_dim)), 7.0F),
        view(BindState(storage.data(), group, value_dim)) {
    ResetState(view);
  }
  std::vector<float> storage;
  GroupState view;
};

void ExpectClose(const reference::Attention& expected, const State& state) {
  const reference::AttentionError error = reference::Compare(expected, state.view);
  EXPECT_LE(error.out, kTolerance);
  EXPECT_LE(error.lse, kTolerance);
}

/// Level, element type, group.
class AttentionTest : public ::testing::TestWithParam<std::tuple<std::string, DType, int>> {
 protected:
  void SetUp() override { ASSERT_TRUE(ForceSimdLevel(std::get<0>(GetParam()))); }
  void TearDown() override { ForceSimdLevel(""); }

  template <class Check>
  void ForEachShape(Check check) {
    for (const auto& [key_dim, value_dim] :
         {std::pair{64, 64}, {80, 96}, {96, 80}, {128, 128}, {256, 64}, {8, 24}, {72, 200}}) {
      for (const int tokens : kTokenCounts) {
        SCOPED_TRACE(::testing::Message() << key_dim << "/" << value_dim << ", " << tokens);
        check(Case(std::get<1>(GetParam()), std::get<2>(GetParam()), key_dim, value_dim, tokens));
      }
    }
  }
};

TEST_P(AttentionTest, ScoresRows) {
  ForEachShape([](const Case& c) {
    // A stride above the count, to see that nothing is written between.
    const size_t stride = static_cast<size_t>(c.tokens) + 3;
    std::vector<float> contiguous(static_cast<size_t>(c.group) * stride, -1.0F);
    std::vector<float> gathered = contiguous;
    ScoreRows(c.queries.data(), c.group, c.keys.data(), c.dtype, c.tokens, c.key_dim,
              contiguous.data(), static_cast<int>(stride));
    ScoreGathered(c.queries.data(), c.group, c.key_rows.data(), c.dtype, c.tokens, c.key_dim,
                  gathered.data(), static_cast<int>(stride));
    EXPECT_EQ(contiguous, gathered);
    for (size_t h = 0; h < static_cast<size_t>(c.group); ++h) {
      for (size_t t = 0; t < stride; ++t) {
        const bool written = t < static_cast<size_t>(c.tokens);
        const double expected = written ? c.scores[h * static_cast<size_t>(c.tokens) + t] : -1.0;
        ASSERT_NEAR(contiguous[h * stride + t], expected, kTolerance)
            << "head " << h << " row " << t;
      }
    }
  });
}

TEST_P(AttentionTest, AttendsToRows) {
  ForEachShape([](const Case& c) {
    State state(c.group, c.value_dim);
    AttendRows(c.queries.data(), c.keys.data(), c.values.data(), c.dtype, c.tokens, c.key_dim,
               state.view);
    ExpectClose(c.Expected(), state);
  });
}

TEST_P(AttentionTest, AccumulatesScoredRows) {
  ForEachShape([](const Case& c) {
    const std::vector<float> scores(c.scores.begin(), c.scores.end());
    State contiguous(c.group, c.value_dim);
    State gathered(c.group, c.value_dim);
    AccumulateScored(scores.data(), c.tokens, c.values.data(), c.dtype, c.tokens, contiguous.view);
    AccumulateScoredGathered(scores.data(), c.tokens, c.value_rows.data(), c.dtype, c.tokens,
                             gathered.view);
    EXPECT_EQ(contiguous.storage, gathered.storage);
    ExpectClose(c.Expected(), contiguous);
  });
}

TEST_P(AttentionTest, ContinuesAState) {
  const auto& [level, dtype, group] = GetParam();
  const Case c(dtype, group, 128, 96, 200);
  const size_t split = 77;
  State state(group, 96);
  AttendRows(c.queries.data(), c.keys.data(), c.values.data(), dtype, split, 128, state.view);
  AttendRows(c.queries.data(), c.keys.data() + split * 128, c.values.data() + split * 96, dtype,
             static_cast<int>(200 - split), 128, state.view);
  ExpectClose(c.Expected(), state);
}

TEST_P(AttentionTest, ToleratesAMaximumAboveAllScores) {
  const auto& [level, dtype, group] = GetParam();
  const Case c(dtype, group, 64, 64, 65);
  State state(group, 64);
  std::fill_n(state.view.max, group, 60.0F);
  AttendRows(c.queries.data(), c.keys.data(), c.values.data(), dtype, 65, 64, state.view);
  EXPECT_THAT(std::vector<float>(state.view.max, state.view.max + group), ::testing::Each(60.0F));
  ExpectClose(c.Expected(), state);
}

TEST_P(AttentionTest, LeavesOutMinusInfinity) {
  const auto& [level, dtype, group] = GetParam();
  Case c(dtype, group, 64, 80, 200);
  // Head 0 sees nothing, the others miss a whole block of 64 rows and every third of the rest.
  for (int h = 0; h < group; ++h) {
    for (int t = 0; t < 200; ++t) {
      if (h == 0 || t < 64 || t % 3 == 0) {
        c.scores[static_cast<size_t>(h * 200 + t)] = -std::numeric_limits<double>::infinity();
      }
    }
  }
  const std::vector<float> scores(c.scores.begin(), c.scores.end());
  State state(group, 80);
  AccumulateScored(scores.data(), 200, c.values.data(), dtype, 200, state.view);
  ExpectClose(c.Expected(), state);
  EXPECT_EQ(state.view.max[0], -kInfinity);
  EXPECT_EQ(state.view.sum[0], 0.0F);
}

TEST_P(AttentionTest, SurvivesExtremeScores) {
  const auto& [level, dtype, group] = GetParam();
  Case c(dtype, group, 64, 64, 130);
  for (int h = 0; h < group; ++h) {
    for (int t = 0; t < 130; ++t) {
      double& score = c.scores[static_cast<size_t>(h * 130 + t)];
      if (h % 3 == 0) score += t < 100 ? -1e4 : 1e4;  // jumps within and between blocks
      if (h % 3 == 1) score = t == 70 ? 3e4 : score;  // one huge logit
      score = static_cast<double>(static_cast<float>(score));
    }
  }
  const std::vector<float> scores(c.scores.begin(), c.scores.end());
  State state(group, 64);
  AccumulateScored(scores.data(), 130, c.values.data(), dtype, 130, state.view);
  const reference::AttentionError error = reference::Compare(c.Expected(), state.view);
  EXPECT_LE(error.out, kTolerance);
  EXPECT_LE(error.lse, 2e-3);  // an fp32 step at 3e4
}

INSTANTIATE_TEST_SUITE_P(Levels, AttentionTest,
                         ::testing::Combine(::testing::ValuesIn(SupportedSimdLevels()),
                                            ::testing::Values(DType::kBf16, DType::kFp16),
                                            ::testing::Values(1, 3, 6, 7, 16)),
                         [](const auto& test) {
                           std::string name = std::get<0>(test.param) + "_" +
                                              DTypeName(std::get<1>(test.param)) + "_" +
                                              std::to_string(std::get<2>(test.param));
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

/// Every level in turn, for what depends on neither type nor group.
template <class Check>
void AtEveryLevel(Check check) {
  for (const std::string& level : SupportedSimdLevels()) {
    SCOPED_TRACE(level);
    ASSERT_TRUE(ForceSimdLevel(level));
    check();
  }
  ForceSimdLevel("");
}

TEST(Attention, TakesTheLargestGroupAndDims) {
  AtEveryLevel([] {
    const Case c(DType::kBf16, 64, 512, 512, 66);
    State state(64, 512);
    AttendRows(c.queries.data(), c.keys.data(), c.values.data(), c.dtype, 66, 512, state.view);
    ExpectClose(c.Expected(), state);
  });
}

TEST(Attention, WeightsAreExactToTwoInAMillion) {
  // One row each beside a maximum of 0: sum is the weight itself.
  AtEveryLevel([] {
    const std::vector<uint16_t> value(8, FloatToBf16(1.0F));
    for (float score = 0.0F; score > -87.0F; score -= 0.0371F) {
      State state(1, 8);
      state.view.max[0] = 0.0F;
      AccumulateScored(&score, 1, value.data(), DType::kBf16, 1, state.view);
      const double expected = std::exp(static_cast<double>(score));
      ASSERT_NEAR(state.view.sum[0] / expected, 1.0, 2e-6) << score;
      ASSERT_EQ(state.view.acc[0], state.view.sum[0]);
    }
  });
}

TEST(Attention, ScoresFloatRows) {
  AtEveryLevel([] {
    for (const int dim : {64, 80, 128, 512}) {
      for (const int count : {0, 1, 5, 130}) {
        const auto queries = reference::RandomFloats(4, static_cast<size_t>(7 * dim), 0.2F);
        const auto rows = reference::RandomFloats(5, static_cast<size_t>(count * dim), 1.0F);
        std::vector<float> scores(static_cast<size_t>(7 * count));
        ScoreFloatRows(queries.data(), 7, rows.data(), count, dim, scores.data(), count);
        EXPECT_THAT(scores, ::testing::Pointwise(::testing::DoubleNear(kTolerance),
                                                 reference::Scores(queries.data(), 7, rows.data(),
                                                                   DType::kFp32, count, dim)));
        std::vector<const float*> backwards;
        for (int t = count - 1; t >= 0; --t) backwards.push_back(rows.data() + t * dim);
        std::vector<float> gathered(scores.size());
        ScoreGatheredFloatRows(queries.data(), 7, backwards.data(), count, dim, gathered.data(),
                               count);
        std::reverse(gathered.begin(), gathered.end());
        for (int h = 0; h < 7; ++h) {  // the heads are backwards now, too
          EXPECT_TRUE(std::equal(scores.begin() + h * count, scores.begin() + (h + 1) * count,
                                 gathered.begin() + (6 - h) * count));
        }
      }
    }
  });
}

TEST(Attention, AddsWeightedRows) {
  AtEveryLevel([] {
    for (const int dim : {64, 80, 128, 200}) {
      for (const int count : {0, 1, 64, 131}) {
        const auto rows =
            reference::RandomElements(6, static_cast<size_t>(count * dim), 1.0F, DType::kBf16);
        const auto weights = reference::RandomFloats(7, static_cast<size_t>(7 * count), 1.0F);
        std::vector<double> expected =
            reference::WeightedRows(weights.data(), 7, rows.data(), DType::kBf16, count, dim);
        for (double& x : expected) x += 2.5;
        std::vector<float> acc(static_cast<size_t>(7 * dim), 2.5F);
        AddWeightedRows(weights.data(), count, 7, rows.data(), dim, count, dim, acc.data());
        EXPECT_THAT(acc, ::testing::Pointwise(::testing::DoubleNear(kTolerance), expected));
        // With other rows between.
        std::vector<uint16_t> apart(static_cast<size_t>(count * 3 * dim), 0x7fc0);
        for (int t = 0; t < count; ++t) {
          std::copy_n(rows.begin() + t * dim, dim, apart.begin() + t * 3 * dim);
        }
        std::vector<float> same(static_cast<size_t>(7 * dim), 2.5F);
        AddWeightedRows(weights.data(), count, 7, apart.data(), 3 * dim, count, dim, same.data());
        EXPECT_EQ(same, acc);
      }
    }
  });
}

TEST(Attention, FindsBadElements) {
  AtEveryLevel([] {
    for (const int64_t count : {0, 1, 7, 16, 100}) {
      std::vector<float> floats(static_cast<size_t>(count), 65504.0F);
      std::vector<uint16_t> bf16(static_cast<size_t>(count), FloatToBf16(-65280.0F));
      std::vector<uint16_t> fp16(static_cast<size_t>(count), FloatToFp16(-65504.0F));
      EXPECT_EQ(FindBadElement(floats.data(), DType::kFp32, count), -1);
      EXPECT_EQ(FindBadElement(bf16.data(), DType::kBf16, count), -1);
      EXPECT_EQ(FindBadElement(fp16.data(), DType::kFp16, count), -1);
      for (const float bad : {kInfinity, -kInfinity, std::nanf(""), 65536.0F, -1e30F}) {
        for (int64_t i = 0; i < count; i += 5) {
          const auto index = static_cast<size_t>(i);
          auto one_float = floats;
          auto one_bf16 = bf16;
          auto one_fp16 = fp16;
          one_float[index] = bad;
          one_bf16[index] = FloatToBf16(bad);
          one_fp16[index] = FloatToFp16(bad);
          EXPECT_EQ(FindBadElement(one_float.data(), DType::kFp32, count), i) << bad;
          EXPECT_EQ(FindBadElement(one_bf16.data(), DType::kBf16, count), i) << bad;
          EXPECT_EQ(FindBadElement(one_fp16.data(), DType::kFp16, count), i) << bad;
        }
      }
    }
  });
}

}  // namespace
}  // namespace kvseek::kernels
