#include "kernels/cpu/rotation.h"

#include <cmath>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/simd_level.h"
#include "tests/kernels/reference.h"

namespace kvseek::kernels {
namespace {

using ::testing::DoubleNear;
using ::testing::Pointwise;

class RotationTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_TRUE(ForceSimdLevel(GetParam())); }
  void TearDown() override { ForceSimdLevel(""); }
};

std::vector<float> Rotated(const std::vector<float>& in, int count, int dim) {
  std::vector<float> out(static_cast<size_t>(count * PaddedDim(dim)), NAN);
  Rotate(in.data(), count, dim, out.data());
  return out;
}

double Dot(const float* a, const float* b, int dim) {
  double sum = 0;
  for (int i = 0; i < dim; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

TEST_P(RotationTest, FollowsItsDefinition) {
  for (const int dim : {1, 8, 63, 64, 80, 96, 128, 200, 256, 512}) {
    const int count = 3;
    const auto in = reference::RandomFloats(1, static_cast<size_t>(count * dim), 1.0F);
    const std::vector<float> out = Rotated(in, count, dim);
    for (int t = 0; t < count; ++t) {
      const float* row = out.data() + t * PaddedDim(dim);
      EXPECT_THAT(std::vector<float>(row, row + PaddedDim(dim)),
                  Pointwise(DoubleNear(1e-5), reference::Rotate(in.data() + t * dim, dim)))
          << "dim " << dim << " row " << t;
    }
  }
}

TEST_P(RotationTest, KeepsInnerProducts) {
  for (const int dim : {64, 80, 128, 256, 512}) {
    const int count = 16;
    const int padded = PaddedDim(dim);
    const auto in = reference::RandomFloats(2, static_cast<size_t>(count * dim), 1.0F);
    const std::vector<float> out = Rotated(in, count, dim);
    for (int a = 0; a < count; ++a) {
      for (int b = 0; b <= a; ++b) {
        EXPECT_NEAR(Dot(out.data() + a * padded, out.data() + b * padded, padded),
                    Dot(in.data() + a * dim, in.data() + b * dim, dim), 1e-3);
      }
    }
  }
}

TEST_P(RotationTest, IsOrthonormal) {
  // The images of the unit vectors are the columns of R.
  std::vector<float> identity(128 * 128, 0.0F);
  for (size_t i = 0; i < 128; ++i) identity[i * 128 + i] = 1.0F;
  const std::vector<float> columns = Rotated(identity, 128, 128);
  for (int a = 0; a < 128; ++a) {
    for (int b = 0; b < 128; ++b) {
      ASSERT_NEAR(Dot(columns.data() + a * 128, columns.data() + b * 128, 128), a == b ? 1 : 0,
                  1e-6);
    }
  }
}

TEST_P(RotationTest, SpreadsOneDimensionOverAll) {
  std::vector<float> spike(128, 0.0F);
  spike[17] = 1.0F;
  for (const float x : Rotated(spike, 1, 128)) EXPECT_LT(std::fabs(x), 0.5F);
}

/// Codes outlive the process that made them: these values must never change, at any level.
TEST_P(RotationTest, GivesTheGoldenValues) {
  const auto ramp = [](int dim) {
    std::vector<float> in;
    for (int i = 0; i < dim; ++i) in.push_back(static_cast<float>(i % 7) - 2.5F);
    return in;
  };
  const auto first_six = [](const std::vector<float>& out) {
    return std::vector<float>(out.begin(), out.begin() + 6);
  };
  EXPECT_THAT(first_six(Rotated(ramp(64), 1, 64)),
              ::testing::ElementsAre(1.53125F, 1.09375F, 2.40625F, -1.65625F, -0.15625F, 3.40625F));
  EXPECT_THAT(first_six(Rotated(ramp(96), 1, 96)),
              ::testing::ElementsAre(0.125F, 0.0625F, -1.1875F, 0.5F, -1.0F, 3.5625F));
  EXPECT_THAT(
      first_six(Rotated(ramp(256), 1, 256)),
      ::testing::ElementsAre(-0.34375F, -0.78125F, 0.34375F, 1.21875F, 0.65625F, -2.71875F));
  EXPECT_THAT(first_six(Rotated(ramp(512), 1, 512)),
              ::testing::ElementsAre(-1.1640625F, -1.5859375F, 0.0234375F, 7.1796875F, -1.0390625F,
                                     0.0703125F));
}

INSTANTIATE_TEST_SUITE_P(Levels, RotationTest, ::testing::ValuesIn(SupportedSimdLevels()),
                         [](const auto& test) {
                           std::string name = test.param;
                           for (char& c : name) c = c == '-' ? '_' : c;
                           return name;
                         });

TEST(Rotation, PadsToPowersOfTwo) {
  EXPECT_EQ(PaddedDim(1), 64);
  EXPECT_EQ(PaddedDim(64), 64);
  EXPECT_EQ(PaddedDim(65), 128);
  EXPECT_EQ(PaddedDim(96), 128);
  EXPECT_EQ(PaddedDim(128), 128);
  EXPECT_EQ(PaddedDim(257), 512);
  EXPECT_EQ(PaddedDim(512), 512);
}

}  // namespace
}  // namespace kvseek::kernels
