#include "kernels/cpu/value_sketch.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/simd_level_fixture.h"

namespace kvseek::kernels {
namespace {

using ValueSketchTest = SimdLevelTest;

INSTANTIATE_TEST_SUITE_P(Levels, ValueSketchTest, testing::ValuesIn(SupportedSimdLevels()),
                         LevelName);

TEST_P(ValueSketchTest, SketchesAddUp) {
  std::mt19937 bytes(9);
  for (const int heads : {1, 2, 3, 4, 5, 6, 7, 13}) {
    std::vector<uint8_t> sketches(3 * kSketchBlockBytes);
    for (uint8_t& byte : sketches) byte = static_cast<uint8_t>(bytes());
    std::vector<uint8_t> weights(static_cast<size_t>(heads) * 192);
    for (size_t i = 0; i < weights.size(); ++i) {
      weights[i] = i % 7 == 0 ? uint8_t{0} : static_cast<uint8_t>(bytes());
    }
    std::vector<float> units;
    for (int h = 0; h < heads; ++h) units.push_back(0.003F * static_cast<float>(h + 1));
    std::vector<float> sums(static_cast<size_t>(heads) * 8, 1.0F);
    AddSketches(sketches.data(), 3, {}, weights.data(), 192, units.data(), heads, sums.data());
    for (int h = 0; h < heads; ++h) {
      for (int c = 0; c < 8; ++c) {
        double sum = 1.0;
        for (int key = 0; key < 192; ++key) {
          const int at = key / 64 * kSketchBlockBytes + c % 4 * 64 + key % 64;
          const int byte = sketches[static_cast<size_t>(at)];
          const double weight = weights[static_cast<size_t>(h * 192 + key)];
          sum += units[static_cast<size_t>(h)] * weight * ((c < 4 ? byte & 15 : byte >> 4) - 7.5);
        }
        EXPECT_NEAR(sums[static_cast<size_t>(h * 8 + c)], sum, 1e-5 * (1.0 + std::abs(sum)));
      }
    }
  }
}

// As if the blocks between were not there.
TEST_P(ValueSketchTest, SomeBlocksAreWeighed) {
  std::mt19937 bytes(10);
  std::vector<uint8_t> sketches(11 * kSketchBlockBytes);
  for (uint8_t& byte : sketches) byte = static_cast<uint8_t>(bytes());
  std::vector<uint8_t> weights(3 * 4 * 64);
  for (uint8_t& weight : weights) weight = static_cast<uint8_t>(bytes());
  const std::vector<float> units = {0.1F, 0.2F, 0.3F};
  const WeighedBlocks weighed = {1, 3};  // 1, 4, 7, 10
  std::vector<uint8_t> some;
  for (int b = 1; b < 11; b += 3) {
    const auto block = sketches.begin() + static_cast<ptrdiff_t>(b * kSketchBlockBytes);
    some.insert(some.end(), block, block + kSketchBlockBytes);
  }
  std::vector<float> sums(3 * 8), expected(3 * 8);
  AddSketches(sketches.data(), 11, weighed, weights.data(), 256, units.data(), 3, sums.data());
  AddSketches(some.data(), 4, {}, weights.data(), 256, units.data(), 3, expected.data());
  EXPECT_EQ(sums, expected);
}

TEST_P(ValueSketchTest, NoWeightsAddNothing) {
  const std::vector<uint8_t> sketches(kSketchBlockBytes, 0xff);
  const std::vector<uint8_t> weights(3 * 64, 0);
  const std::vector<float> units(3, 1.0F);
  std::vector<float> sums(3 * 8, 5.0F);
  AddSketches(sketches.data(), 1, {}, weights.data(), 64, units.data(), 3, sums.data());
  EXPECT_EQ(sums, std::vector<float>(3 * 8, 5.0F));
  AddSketches(sketches.data(), 0, {}, weights.data(), 64, units.data(), 3, sums.data());
  EXPECT_EQ(sums, std::vector<float>(3 * 8, 5.0F));
}

}  // namespace
}  // namespace kvseek::kernels
