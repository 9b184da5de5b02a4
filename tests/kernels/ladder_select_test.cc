#include "kernels/cpu/ladder_select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/ladder_codes.h"
#include "kernels/cpu/ladder_sample.h"
#include "kernels/cpu/ladder_scan.h"
#include "tests/kernels/aligned.h"
#include "tests/kernels/ladder_reference.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/simd_level_fixture.h"

namespace kvseek::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using LadderSelectTest = SimdLevelTest;

INSTANTIATE_TEST_SUITE_P(Levels, LadderSelectTest, testing::ValuesIn(SupportedSimdLevels()),
                         LevelName);

/// Codes of random residuals.
Aligned<uint8_t> RandomCodes(int blocks, int dim, int planes) {
  const auto residuals = reference::RandomFloats(5, static_cast<size_t>(blocks * 64 * dim), 0.7F);
  Aligned<uint8_t> codes(static_cast<size_t>(blocks * ScanBlockBytes(Symbols(dim), planes)));
  EncodeScanBlocks(residuals.data(), blocks, dim, planes, codes.data());
  return codes;
}

/// Sums of `heads` random queries over random codes, and plausible heads for them.
struct Scan {
  Scan(int head_count, int dim, int plane_count, int block_count)
      : heads(head_count),
        planes(plane_count),
        blocks(block_count),
        symbols(Symbols(dim)),
        stride(block_count * 64 + 64),
        codes(RandomCodes(block_count, dim, plane_count)),
        sums(static_cast<size_t>(head_count * stride)),
        tables(static_cast<size_t>(head_count * symbols * 64)) {
    const auto queries = reference::RandomFloats(17, static_cast<size_t>(heads * dim), 1.0F);
    std::vector<float> units(static_cast<size_t>(heads));
    BuildTables(queries.data(), heads, dim, tables.data(), units.data());
    ScanCodes(codes.data(), blocks, symbols, planes, tables.data(), heads, sums.data(), stride);
    for (int h = 0; h < heads; ++h) {
      const float unit = units[static_cast<size_t>(h)] * (planes == 2 ? 0.9957F / 2.0F : 1.0F);
      const float scale = 2.0F / std::sqrt(static_cast<float>(dim));
      scan_heads.push_back({0.3F * static_cast<float>(h), scale * unit, 0.6F,
                            0.3F * static_cast<float>(h) + 2.5F, 1.0F});
    }
  }

  double Gain(int key) {
    return reference::StoredGain(codes.data() + key / 64 * ScanBlockBytes(symbols, planes), symbols,
                                 planes, key % 64);
  }
  int Sum(int h, int key) { return sums[static_cast<size_t>(h * stride + key)]; }

  int heads;
  int planes;
  int blocks;
  int symbols;
  int stride;
  Aligned<uint8_t> codes;
  Aligned<int16_t> sums;
  std::vector<int8_t> tables;
  std::vector<ScanHead> scan_heads;
};

TEST_P(LadderSelectTest, NoBlocks) {
  const Aligned<uint8_t> codes(64);
  const Aligned<int16_t> sums(64);
  const ScanHead head = {0.0F, 1.0F, 0.0F, 0.0F, 0.0F};
  uint32_t chosen = 0;
  float weight = 5.0F;
  EXPECT_EQ(
      SelectAndWeigh(sums.data(), 64, codes.data(), 0, {}, 22, 1, &head, 1, 0, &chosen, &weight, 1),
      0);
  EXPECT_EQ(weight, 5.0F);
}

TEST_P(LadderSelectTest, EstimatesAndWeightsMatchTheReference) {
  for (const int heads : {1, 3, 6}) {
    for (const int planes : {1, 2}) {
      Scan scan(heads, 128, planes, 3);
      scan.scan_heads[0].centre = 300.0F;  // the exponent is clamped
      const int stride = 200;
      std::vector<float> estimates(static_cast<size_t>(heads * stride));
      std::vector<float> weights(static_cast<size_t>(heads * stride));
      std::vector<float> alone(static_cast<size_t>(heads * stride));
      EstimateScores(scan.sums.data(), scan.stride, scan.codes.data(), 3, scan.symbols, planes,
                     scan.scan_heads.data(), heads, estimates.data(), stride, weights.data());
      EstimateScores(scan.sums.data(), scan.stride, scan.codes.data(), 3, scan.symbols, planes,
                     scan.scan_heads.data(), heads, alone.data(), stride, nullptr);
      EXPECT_EQ(estimates, alone);
      for (int h = 0; h < heads; ++h) {
        const ScanHead& head = scan.scan_heads[static_cast<size_t>(h)];
        for (int key = 0; key < 192; ++key) {
          const auto at = static_cast<size_t>(h * stride + key);
          const double estimate = reference::Estimate(head, scan.Gain(key), scan.Sum(h, key));
          const double weight = reference::Weight(head, scan.Gain(key), estimate);
          ASSERT_NEAR(static_cast<double>(estimates[at]), estimate,
                      1e-5 * std::max(1.0, std::abs(estimate)));
          ASSERT_NEAR(static_cast<double>(weights[at]), weight, 1e-3 * weight) << h << ' ' << key;
        }
      }
    }
  }
}

// The last block first, so that they do not follow each other, and in two calls.
TEST_P(LadderSelectTest, SamplesAreEstimatedAndWeighed) {
  for (const int heads : {1, 4, 11}) {
    for (const int planes : {1, 2}) {
      SCOPED_TRACE(testing::Message() << heads << ' ' << planes);
      constexpr int kBlocks = 21;
      Scan scan(heads, 96, planes, kBlocks);
      const auto block_bytes = static_cast<ptrdiff_t>(ScanBlockBytes(scan.symbols, planes));
      std::vector<const uint8_t*> codes;
      std::vector<float> centres;
      std::vector<const float*> rows;
      std::vector<float> noises;
      std::vector<float> factors;
      for (int b = 0; b < kBlocks; ++b) {
        codes.push_back(scan.codes.data() + (kBlocks - 1 - b) * block_bytes);
        for (int h = 0; h < heads; ++h)
          centres.push_back(0.3F * static_cast<float>((b * 5 + h) % 7));
        noises.push_back(0.5F + 0.01F * static_cast<float>(b));
        factors.push_back(1.0F + static_cast<float>(b % 3));
      }
      for (int b = 0; b < kBlocks; ++b) rows.push_back(centres.data() + b * heads);
      std::vector<SampleHead> sample_heads;
      for (const ScanHead& head : scan.scan_heads) sample_heads.push_back({head.slope, 1.2F});
      const int stride = kBlocks * 64 + 16;
      std::vector<float> estimates(static_cast<size_t>(heads * stride), -77.0F);
      std::vector<float> largest(static_cast<size_t>(heads), -kInfinity);
      std::vector<float> mass(static_cast<size_t>(heads));
      for (const auto& [begin, end] : std::vector<std::pair<int, int>>{{0, 13}, {13, kBlocks}}) {
        Aligned<int16_t> sums(static_cast<size_t>(heads * (end - begin) * 64));
        SampleCodes(
            {codes.data() + begin, rows.data() + begin, factors.data() + begin, end - begin},
            noises.data() + begin, scan.symbols, planes, scan.tables.data(), sample_heads.data(),
            heads, sums.data(),
            {estimates.data() + begin * 64, stride, largest.data(), mass.data()});
      }
      for (int h = 0; h < heads; ++h) {
        const auto i = static_cast<size_t>(h);
        const auto head_estimates = estimates.begin() + h * stride;
        EXPECT_EQ(largest[i], *std::max_element(head_estimates, head_estimates + kBlocks * 64));
        EXPECT_THAT(std::vector<float>(head_estimates + kBlocks * 64, head_estimates + stride),
                    testing::Each(-77.0F));
        double sum = 0.0;
        for (int key = 0; key < kBlocks * 64; ++key) {
          const int b = key / 64;
          const auto block = static_cast<size_t>(b);
          const int at = (kBlocks - 1 - b) * 64 + key % 64;  // in the scan
          const ScanHead head = {rows[block][h], scan.scan_heads[i].slope, 1.2F * noises[block],
                                 0.0F, largest[i]};
          const double estimate = reference::Estimate(head, scan.Gain(at), scan.Sum(h, at));
          ASSERT_NEAR(head_estimates[key], estimate, 1e-5 * std::max(1.0, std::abs(estimate)));
          sum += factors[block] * reference::Weight(head, scan.Gain(at), estimate);
        }
        EXPECT_NEAR(mass[i], sum, 1e-3 * sum);
      }
    }
  }
}

/// What SelectAndWeigh does, in double precision. A key whose estimate is that near to a threshold
/// may go either way.
constexpr double kDoubt = 0.02;
/// A weight's error: the exponential is coarse, but right on average.
constexpr double kWeightError = 0.045;

class SelectionCheck {
 public:
  explicit SelectionCheck(Scan& scan) : scan_(scan) {}

  void Run() {
    const auto heads = static_cast<size_t>(scan_.heads);
    const auto stride = static_cast<size_t>(scan_.blocks) + 3;
    std::vector<uint32_t> chosen(static_cast<size_t>(scan_.blocks * 64), 999999);
    std::vector<float> weights(heads * stride, -1.0F);
    const int count =
        SelectAndWeigh(scan_.sums.data(), scan_.stride, scan_.codes.data(), scan_.blocks, {},
                       scan_.symbols, scan_.planes, scan_.scan_heads.data(), scan_.heads,
                       3000000000U, chosen.data(), weights.data(), static_cast<int>(stride));
    chosen.resize(static_cast<size_t>(count));
    std::vector<double> expected(heads * stride, -1.0);
    for (size_t h = 0; h < heads; ++h) {
      std::fill_n(expected.begin() + static_cast<ptrdiff_t>(h * stride), scan_.blocks, 0.0);
    }
    size_t at = 0;
    for (int key = 0; key < scan_.blocks * 64; ++key) {
      double over = -1e30;  // of any head's threshold
      for (size_t h = 0; h < heads; ++h) {
        over =
            std::max(over, Estimate(h, key) - static_cast<double>(scan_.scan_heads[h].threshold));
      }
      const uint32_t index = 3000000000U + static_cast<uint32_t>(key);
      const bool is_chosen = at < chosen.size() && chosen[at] == index;
      if (is_chosen) ++at;
      if (std::abs(over) > kDoubt) {
        ASSERT_EQ(is_chosen, over > 0.0) << key;
      }
      for (size_t h = 0; h < heads && !is_chosen; ++h) {
        expected[h * stride + static_cast<size_t>(key / 64)] +=
            reference::Weight(scan_.scan_heads[h], scan_.Gain(key), Estimate(h, key));
      }
    }
    EXPECT_EQ(at, chosen.size()) << "ascending, without others";
    total_ += count;
    for (size_t i = 0; i < expected.size(); ++i) {
      // Weights under 2^-100 are raised to that.
      ASSERT_NEAR(static_cast<double>(weights[i]), expected[i],
                  kWeightError * std::abs(expected[i]) + 64 * std::exp2(-100.0))
          << i;
      if (expected[i] > 1e-20) {
        log_ratios_.push_back(std::log(static_cast<double>(weights[i]) / expected[i]));
      }
    }
  }

  int chosen() const { return total_; }
  double MeanLogRatio() const {
    double sum = 0.0;
    for (const double ratio : log_ratios_) sum += ratio;
    return sum / static_cast<double>(log_ratios_.size());
  }

 private:
  double Estimate(size_t head, int key) {
    return reference::Estimate(scan_.scan_heads[head], scan_.Gain(key),
                               scan_.Sum(static_cast<int>(head), key));
  }

  Scan& scan_;
  int total_ = 0;
  std::vector<double> log_ratios_;
};

TEST_P(LadderSelectTest, SelectionMatchesTheReference) {
  for (const int dim : {64, 128, 256, 512}) {
    for (const int heads : {1, 3, 4, 6, 7, 16, 64}) {
      for (const int planes : {1, 2}) {
        SCOPED_TRACE(testing::Message() << dim << " dimensions, " << heads << " heads, " << planes);
        const int blocks = heads == 3 ? 19 : 5;
        Scan scan(heads, dim, planes, blocks);
        for (ScanHead& head : scan.scan_heads) {
          if (heads > 8) head.threshold += 0.8F;
        }
        SelectionCheck check(scan);
        check.Run();
        if (HasFatalFailure()) return;
        EXPECT_GT(check.chosen(), 0);
        EXPECT_LT(check.chosen(), blocks * 64);
        if (heads >= 3) {
          EXPECT_NEAR(check.MeanLogRatio(), 0.0, 0.006) << "weights are right on average";
        }
      }
    }
  }
}

// Scores that 16 bits do not hold, of one head only, by each of their parts.
TEST_P(LadderSelectTest, LargeScoresAreSelectedToo) {
  for (const int planes : {1, 2}) {
    const auto run = [&](auto change) {
      Scan scan(3, 128, planes, 4);
      change(scan.scan_heads[1]);
      SelectionCheck check(scan);
      check.Run();
    };
    run([](ScanHead& head) { head.centre += 400.0F; });
    run([](ScanHead& head) { head.centre -= 400.0F; });
    run([](ScanHead& head) { head.reference += 1000.0F; });
    run([](ScanHead& head) { head.slope *= 100.0F; });
    run([](ScanHead& head) { head.noise = 30.0F; });
    run([](ScanHead& head) { head.slope = head.noise = 0.0F; });
    run([](ScanHead& head) { head.threshold = 170.0F; });
    run([](ScanHead& head) { head.reference += 80.0F; });
  }
}

TEST_P(LadderSelectTest, SmallWeightsAreNeverSubnormal) {
  for (const float reference : {60.0F, 75.0F, 85.0F, 100.0F, 150.0F, 5000.0F}) {
    Scan scan(2, 128, 1, 2);
    std::vector<uint32_t> chosen(128);
    std::vector<float> weights(4);
    std::vector<float> estimates(256);
    std::vector<float> each(256);
    for (ScanHead& head : scan.scan_heads) {
      head.threshold = kInfinity;
      head.reference = reference;
    }
    SelectAndWeigh(scan.sums.data(), scan.stride, scan.codes.data(), 2, {}, scan.symbols, 1,
                   scan.scan_heads.data(), 2, 0, chosen.data(), weights.data(), 2);
    EstimateScores(scan.sums.data(), scan.stride, scan.codes.data(), 2, scan.symbols, 1,
                   scan.scan_heads.data(), 2, estimates.data(), 128, each.data());
    // With room for a product with a small value.
    EXPECT_THAT(weights, testing::Each(testing::Ge(std::exp2(-101.0F)))) << reference;
    EXPECT_THAT(each, testing::Each(testing::Ge(std::exp2(-101.0F)))) << reference;
  }
}

// The choice does not depend on which blocks are weighed, nor does a block's weight.
TEST_P(LadderSelectTest, SomeBlocksAreWeighed) {
  for (const int heads : {1, 4, 6}) {
    for (const float centre : {0.0F, 400.0F}) {  // the second in single precision
      Scan scan(heads, 128, 1, 37);
      scan.scan_heads[0].centre += centre;
      const auto select = [&](WeighedBlocks weighed, std::vector<uint32_t>& chosen,
                              std::vector<float>& weights) {
        chosen.assign(37 * 64, 0);
        weights.assign(static_cast<size_t>(heads) * 37, -1.0F);
        chosen.resize(static_cast<size_t>(SelectAndWeigh(
            scan.sums.data(), scan.stride, scan.codes.data(), 37, weighed, scan.symbols, 1,
            scan.scan_heads.data(), heads, 5, chosen.data(), weights.data(), 37)));
      };
      std::vector<uint32_t> all_chosen, chosen;
      std::vector<float> all, some;
      select({}, all_chosen, all);
      for (const WeighedBlocks weighed : {WeighedBlocks{0, 2}, {3, 4}, {16, 20}, {36, 37}}) {
        SCOPED_TRACE(testing::Message() << heads << ' ' << weighed.first << ' ' << weighed.step);
        select(weighed, chosen, some);
        EXPECT_EQ(chosen, all_chosen);
        for (size_t h = 0; h < static_cast<size_t>(heads); ++h) {
          for (int w = 0; w < 37; ++w) {
            const auto block = static_cast<size_t>(weighed.first + w * weighed.step);
            EXPECT_EQ(some[h * 37 + static_cast<size_t>(w)],
                      block < 37 ? all[h * 37 + block] : -1.0F);
          }
        }
      }
    }
  }
}

TEST_P(LadderSelectTest, AllNoneAndAbsentKeys) {
  Scan scan(2, 128, 1, 2);
  std::vector<uint32_t> chosen(128);
  std::vector<float> weights(4, -1.0F);
  const auto select = [&] {
    return SelectAndWeigh(scan.sums.data(), scan.stride, scan.codes.data(), 2, {}, scan.symbols, 1,
                          scan.scan_heads.data(), 2, 10, chosen.data(), weights.data(), 2);
  };
  scan.scan_heads[0].threshold = scan.scan_heads[1].threshold = kInfinity;
  EXPECT_EQ(select(), 0);
  EXPECT_THAT(weights, testing::Each(testing::Gt(0.0F)));
  scan.scan_heads[1].threshold = -kInfinity;
  EXPECT_EQ(select(), 128);
  for (uint32_t i = 0; i < 128; ++i) EXPECT_EQ(chosen[i], 10 + i);
  EXPECT_THAT(weights, testing::Each(0.0F));
  // A key with gain 0 estimates as its centre, without correction.
  const int offset = ScanGainOffset(scan.symbols, 1);
  std::fill_n(scan.codes.data() + offset, 128, uint8_t{0});
  scan.scan_heads[1].threshold = kInfinity;
  EXPECT_EQ(select(), 0);
  for (size_t h = 0; h < 2; ++h) {
    const double centre = static_cast<double>(scan.scan_heads[h].centre);
    const double expected = 64.0 * std::exp(centre - 1.0);
    EXPECT_NEAR(static_cast<double>(weights[2 * h]), expected, kWeightError * expected);
  }
}

}  // namespace
}  // namespace kvseek::kernels
