#include "kernels/cpu/value_sketch.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/dtype.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/simd_level_fixture.h"

namespace kvseek::kernels {
namespace {

using ValueSketchTest = SimdLevelTest;

INSTANTIATE_TEST_SUITE_P(Levels, ValueSketchTest, testing::ValuesIn(SupportedSimdLevels()),
                         LevelName);

TEST_P(ValueSketchTest, SketchesAddUp) {
  std::mt19937 bytes(9);
  for (const int heads : {1, 2, 3, 4, 5, 6, 7, 13}) {
    const ProductLayout layout;
    std::vector<uint8_t> codes(static_cast<size_t>(3 * layout.BlockBytes()));
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(bytes());
    const auto random = reference::RandomFloats(8, static_cast<size_t>(heads) * 192, 1.0F);
    std::vector<uint16_t> weights(random.size());
    for (size_t i = 0; i < random.size(); ++i) {
      weights[i] = i % 7 == 0 ? uint16_t{0} : FloatToBf16(std::exp(random[i]));
    }
    std::vector<float> sums(static_cast<size_t>(heads) * 8, 1.0F);
    AddSketches(codes.data(), 3, layout, weights.data(), 192, heads, sums.data());
    for (int h = 0; h < heads; ++h) {
      for (int c = 0; c < 8; ++c) {
        double sum = 1.0;
        double size = 1.0;
        for (int key = 0; key < 192; ++key) {
          const uint8_t* const block = codes.data() + key / 64 * layout.BlockBytes();
          const int byte = block[layout.SketchOffset() + c % 4 * 64 + key % 64];
          const double part = Bf16ToFloat(weights[static_cast<size_t>(h * 192 + key)]) *
                              ((c < 4 ? byte & 15 : byte >> 4) - 7.5);
          sum += part;
          size += std::abs(part);
        }
        EXPECT_NEAR(sums[static_cast<size_t>(h * 8 + c)], sum, 0.02 * size);
      }
    }
  }
}

TEST_P(ValueSketchTest, NoWeightsAddNothing) {
  const ProductLayout layout;
  const std::vector<uint8_t> codes(static_cast<size_t>(layout.BlockBytes()), 0xff);
  const std::vector<uint16_t> weights(3 * 64, 0);
  std::vector<float> sums(3 * 8, 5.0F);
  AddSketches(codes.data(), 1, layout, weights.data(), 64, 3, sums.data());
  EXPECT_EQ(sums, std::vector<float>(3 * 8, 5.0F));
  AddSketches(codes.data(), 0, layout, weights.data(), 64, 3, sums.data());
  EXPECT_EQ(sums, std::vector<float>(3 * 8, 5.0F));
}

}  // namespace
}  // namespace kvseek::kernels
