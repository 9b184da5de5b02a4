#include "kernels/cpu/ladder_fine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/ladder_codes.h"
#include "tests/kernels/ladder_reference.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/simd_level_fixture.h"

namespace kvseek::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using LadderFineTest = SimdLevelTest;

INSTANTIATE_TEST_SUITE_P(Levels, LadderFineTest, testing::ValuesIn(SupportedSimdLevels()),
                         LevelName);

/// Records of random keys and values, and candidates scattered over them.
struct Records {
  Records(int padded_dim, int values_dim, int candidates)
      : dim(padded_dim),
        value_dim(values_dim),
        count(candidates),
        record_bytes(FineRecordBytes(padded_dim, values_dim)),
        bytes(static_cast<size_t>(kKeys * record_bytes)),
        factors(kKeys) {
    const auto residuals = reference::RandomFloats(1, static_cast<size_t>(kKeys * dim), 0.8F);
    const auto values =
        reference::RandomElements(2, static_cast<size_t>(kKeys * value_dim), 1.0F, DType::kBf16);
    EncodeFine(residuals.data(), values.data(), DType::kBf16, kKeys, dim, value_dim, bytes.data(),
               factors.data());
    std::mt19937 random(3);
    for (int i = 0; i < count; ++i) {
      chosen.push_back(random() % kKeys);
      rows.push_back({Record(i), &Factors(i)});
    }
  }

  const uint8_t* Record(int i) const {
    return bytes.data() + chosen[static_cast<size_t>(i)] * static_cast<size_t>(record_bytes);
  }
  const FineFactors& Factors(int i) const { return factors[chosen[static_cast<size_t>(i)]]; }

  static constexpr int kKeys = 256;
  int dim;
  int value_dim;
  int count;
  int record_bytes;
  std::vector<uint8_t> bytes;
  std::vector<FineFactors> factors;
  std::vector<uint32_t> chosen;
  std::vector<FineRow> rows;
};

TEST_P(LadderFineTest, QuantisedQueries) {
  auto queries = reference::RandomFloats(4, 3 * 128, 2.0F);
  std::fill_n(queries.begin() + 128, 128, 0.0F);
  std::vector<int8_t> quantised(queries.size());
  std::vector<float> units(3);
  QuantiseQueries(queries.data(), 3, 128, quantised.data(), units.data());
  EXPECT_EQ(units[1], 0.0F);
  int largest = 0;
  for (size_t i = 0; i < queries.size(); ++i) {
    const float unit = units[i / 128];
    EXPECT_NEAR(static_cast<float>(quantised[i]) * unit, queries[i], 0.501F * unit);
    largest = std::max(largest, std::abs(static_cast<int>(quantised[i])));
  }
  EXPECT_EQ(largest, 127);
}

TEST_P(LadderFineTest, ScoresMatchTheReference) {
  for (const int dim : {64, 128, 256, 512}) {
    for (const int heads : {1, 2, 3, 4, 5, 6, 7, 8, 16, 64}) {
      SCOPED_TRACE(std::to_string(dim) + " dimensions, heads " + std::to_string(heads));
      const Records records(dim, 24, 45);
      auto queries = reference::RandomFloats(5, static_cast<size_t>(heads * dim), 1.0F);
      std::vector<int8_t> quantised(queries.size());
      std::vector<float> units(static_cast<size_t>(heads));
      QuantiseQueries(queries.data(), heads, dim, quantised.data(), units.data());
      std::fill_n(quantised.begin(), dim, int8_t{127});  // the largest sums there are
      std::vector<float> slopes;
      for (const float unit : units) slopes.push_back(unit * kFourBitStep / 2.0F);
      const int stride = 50;
      std::vector<float> scores(static_cast<size_t>(heads * stride), -3.0F);
      const auto centre = [](int h, int i) { return static_cast<float>(10 * h + i) / 100.0F; };
      for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < records.count; ++i) {
          scores[static_cast<size_t>(h * stride + i)] = centre(h, i);
        }
      }
      ScoreFine(records.rows.data(), records.count, records.record_bytes, quantised.data(), dim,
                slopes.data(), heads, scores.data(), stride);
      for (int h = 0; h < heads; ++h) {
        const auto unit = static_cast<double>(units[static_cast<size_t>(h)]);
        for (int i = 0; i < records.count; ++i) {
          const auto point = reference::StoredFinePoint(records.Record(i), dim);
          double product = 0.0;
          for (size_t e = 0; e < point.size(); ++e) {
            product += point[e] * unit * quantised[static_cast<size_t>(h * dim) + e];
          }
          const double expected = static_cast<double>(centre(h, i)) +
                                  static_cast<double>(records.Factors(i).gain) * product;
          ASSERT_NEAR(static_cast<double>(scores[static_cast<size_t>(h * stride + i)]), expected,
                      2e-6 * std::max(10.0, std::abs(expected)))
              << h << ' ' << i;
        }
        for (int i = records.count; i < stride; ++i) {
          ASSERT_EQ(scores[static_cast<size_t>(h * stride + i)], -3.0F) << "past the end";
        }
      }
    }
  }
}

/// What the state should hold: its own part, then the records.
reference::Attention Expected(const Records& records, const std::vector<float>& scores, int stride,
                              int heads, float first_score, float first_value) {
  reference::Attention expected;
  std::vector<float> value(static_cast<size_t>(records.value_dim));
  for (int h = 0; h < heads; ++h) {
    std::vector<double> out(value.size(), 0.0);
    double sum = 0.0;
    const auto add = [&](float score, const auto& element) {
      const double weight = std::exp(static_cast<double>(score));
      sum += weight;
      for (size_t e = 0; e < out.size(); ++e) out[e] += weight * static_cast<double>(element(e));
    };
    add(first_score, [&](size_t) { return first_value; });
    for (int i = 0; i < records.count; ++i) {
      DecodeFineValue(records.Record(i), FineValueOffset(records.dim), records.Factors(i),
                      records.value_dim, value.data());
      add(scores[static_cast<size_t>(h * stride + i)], [&](size_t e) { return value[e]; });
    }
    for (const double element : out) expected.out.push_back(sum > 0.0 ? element / sum : 0.0);
    expected.lse.push_back(std::log(sum));
  }
  return expected;
}

TEST_P(LadderFineTest, ValuesMatchTheReference) {
  for (const int value_dim : {8, 24, 40, 64, 80, 128, 256, 512}) {
    for (const int heads : {1, 3, 4, 6, 7, 8, 16, 64}) {
      for (const int count : {0, 1, 31, 33, 63, 64, 65, 128, 129, 200}) {
        if (heads == 64 && count != 65) continue;
        SCOPED_TRACE(std::to_string(value_dim) + " elements, heads " + std::to_string(heads) +
                     ", candidates " + std::to_string(count));
        const Records records(64, value_dim, count);
        const int stride = count + 3;
        auto scores = reference::RandomFloats(6, static_cast<size_t>(heads * stride), 3.0F);
        for (size_t i = 0; i < scores.size(); i += 11) scores[i] = -kInfinity;
        for (size_t i = 5; i < scores.size(); i += 97) scores[i] += 40.0F;  // a new maximum, late
        std::fill_n(scores.begin(), stride, -kInfinity);                    // head 0 gets nothing
        std::vector<float> storage(static_cast<size_t>(GroupStateFloats(heads, value_dim)));
        const GroupState state = BindState(storage.data(), heads, value_dim);
        ResetState(state);
        for (const float first_score : {-kInfinity, 1.5F}) {
          if (first_score > -kInfinity) {  // a state that holds something already
            std::fill_n(state.max, heads, first_score + 0.5F);
            std::fill_n(state.sum, heads, std::exp(-0.5F));
            std::fill_n(state.acc, heads * value_dim, std::exp(-0.5F) * 0.25F);
          }
          AccumulateFine(records.rows.data(), count, FineValueOffset(64), scores.data(), stride,
                         state);
          const auto error = reference::Compare(
              Expected(records, scores, stride, heads, first_score, 0.25F), state);
          // This level rounds weights to a 32639th of the largest of each 128.
          EXPECT_LT(error.out, GetParam() == "avx512-vbmi" ? 2e-4 : 2e-5);
          EXPECT_LT(error.lse, 2e-5);
        }
      }
    }
  }
}

TEST_P(LadderFineTest, FarApartScores) {
  const Records records(64, 16, 130);
  std::vector<float> scores(130, -1e4F);
  scores[100] = 1e4F;
  std::vector<float> storage(static_cast<size_t>(GroupStateFloats(1, 16)));
  const GroupState state = BindState(storage.data(), 1, 16);
  ResetState(state);
  AccumulateFine(records.rows.data(), 130, FineValueOffset(64), scores.data(), 130, state);
  std::vector<float> value(16);
  DecodeFineValue(records.Record(100), FineValueOffset(64), records.Factors(100), 16, value.data());
  EXPECT_EQ(state.max[0], 1e4F);
  EXPECT_NEAR(state.sum[0], 1.0F, 1e-5F);
  for (size_t i = 0; i < 16; ++i) EXPECT_NEAR(state.acc[i], value[i], 1e-5F);
}

}  // namespace
}  // namespace kvseek::kernels
