#include "kernels/cpu/convert.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/kernels/simd_level_fixture.h"

namespace kvseek::kernels {
namespace {

class ConvertTest : public SimdLevelTest {};

TEST_P(ConvertTest, EveryHalfToFloat) {
  std::vector<uint16_t> halves(65536);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    // Lengths and starts that leave a part of a vector over.
    for (const size_t begin : {size_t{0}, size_t{3}, size_t{65530}}) {
      std::vector<float> out(halves.size() - begin);
      ConvertToFloat(halves.data() + begin, dtype, out.size(), out.data());
      for (size_t i = 0; i < out.size(); ++i) {
        const float expected = LoadElement(halves.data() + begin, dtype, i);
        if (!std::isfinite(expected)) continue;
        ASSERT_EQ(std::bit_cast<uint32_t>(out[i]), std::bit_cast<uint32_t>(expected)) << begin + i;
      }
    }
  }
}

TEST_P(ConvertTest, FloatsToTheNearestHalf) {
  std::mt19937 random(11);
  std::vector<float> values = {
      0.0F,     -0.0F,    1.0F,     65504.0F,   -65504.0F,
      65519.9F, 65520.0F, 1e-8F,    5.9604e-8F, 2.98e-8F,
      2.99e-8F, 6.1e-5F,  -6.1e-5F, 1e30F,      std::numeric_limits<float>::infinity()};
  // Halfway between two halves, and beside it.
  for (int i = 0; i < 3000; ++i) {
    const float half = Fp16ToFloat(static_cast<uint16_t>(random() % 0x7bff));
    const float next = Fp16ToFloat(static_cast<uint16_t>(FloatToFp16(half) + 1));
    const float middle = half / 2 + next / 2;
    for (const float value :
         {half, middle, std::nextafter(middle, half), std::nextafter(middle, next)}) {
      values.push_back(random() % 2 == 0 ? value : -value);
    }
  }
  for (int i = 0; i < 3000; ++i) {
    values.push_back(
        std::ldexp(static_cast<float>(random()) * 0x1p-32F, static_cast<int>(random() % 50) - 30));
  }
  std::vector<uint16_t> out(values.size());
  ConvertToFp16(values.data(), values.size(), out.data());
  for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(out[i], FloatToFp16(values[i])) << values[i];
}

TEST_P(ConvertTest, FloatsAreCopiedAndNothingIsFine) {
  const std::vector<float> values = {1.0F, -2.5F, 3e38F};
  std::vector<float> out(3);
  ConvertToFloat(values.data(), DType::kFp32, 3, out.data());
  EXPECT_EQ(out, values);
  ConvertToFloat(values.data(), DType::kBf16, 0, nullptr);
  ConvertToFp16(values.data(), 0, nullptr);
}

INSTANTIATE_TEST_SUITE_P(Levels, ConvertTest, testing::ValuesIn(SupportedSimdLevels()), LevelName);

}  // namespace
}  // namespace kvseek::kernels
