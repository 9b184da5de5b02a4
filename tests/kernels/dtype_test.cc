#include "kernels/dtype.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "gtest/gtest.h"

namespace kvseek::kernels {
namespace {

/// The value of a binary format with the given widths, from its definition.
double Decode(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const uint32_t mantissa = bits & ((1U << mantissa_bits) - 1);
  const uint32_t exponent = (bits >> mantissa_bits) & ((1U << exponent_bits) - 1);
  const bool negative = ((bits >> (mantissa_bits + exponent_bits)) & 1U) != 0;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  double value = 0;
  if (exponent == (1U << exponent_bits) - 1) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    value = std::ldexp(mantissa + (1U << mantissa_bits),
                       static_cast<int>(exponent) - bias - mantissa_bits);
  }
  return negative ? -value : value;
}

bool Same(double expected, float actual) {
  if (std::isnan(expected)) return std::isnan(actual);
  return expected == static_cast<double>(actual) && std::signbit(expected) == std::signbit(actual);
}

TEST(Dtype, DecodesEveryBitPattern) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    ASSERT_TRUE(Same(Decode(bits, 8, 7), Bf16ToFloat(half))) << std::hex << bits;
    ASSERT_TRUE(Same(Decode(bits, 5, 10), Fp16ToFloat(half))) << std::hex << bits;
  }
}

TEST(Dtype, EncodesEveryBitPatternBack) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const uint16_t bf16 = FloatToBf16(Bf16ToFloat(half));
    const uint16_t fp16 = FloatToFp16(Fp16ToFloat(half));
    if (std::isnan(Decode(bits, 8, 7))) {
      ASSERT_TRUE(std::isnan(Bf16ToFloat(bf16))) << std::hex << bits;
    } else {
      ASSERT_EQ(bf16, half);
    }
    if (std::isnan(Decode(bits, 5, 10))) {
      ASSERT_TRUE(std::isnan(Fp16ToFloat(fp16))) << std::hex << bits;
    } else {
      ASSERT_EQ(fp16, half);
    }
  }
}

/// Between each two neighbours: below the middle rounds down, above it up, the middle to even.
template <class Encode>
void CheckRounding(uint32_t largest, int exponent_bits, int mantissa_bits, Encode encode) {
  for (uint32_t low = 0; low < largest; ++low) {
    const double down = Decode(low, exponent_bits, mantissa_bits);
    const double up = Decode(low + 1, exponent_bits, mantissa_bits);
    const double middle = (down + up) / 2;
    const auto exact = static_cast<float>(middle);
    if (static_cast<double>(exact) != middle) continue;  // fp32 subnormals cannot say it
    const float below = std::nextafter(exact, 0.0F);
    const float above = std::nextafter(exact, std::numeric_limits<float>::infinity());
    const uint32_t even = (low & 1U) == 0 ? low : low + 1;
    ASSERT_EQ(encode(below), low) << std::hex << low;
    ASSERT_EQ(encode(exact), even) << std::hex << low;
    ASSERT_EQ(encode(above), low + 1) << std::hex << low;
    const uint32_t sign = 0x8000;
    ASSERT_EQ(encode(-exact), even | sign) << std::hex << low;
  }
}

TEST(Dtype, RoundsToNearestEven) {
  CheckRounding(0x7f7f, 8, 7, FloatToBf16);
  CheckRounding(0x7bff, 5, 10, FloatToFp16);
}

TEST(Dtype, OverflowsToInfinity) {
  EXPECT_EQ(FloatToFp16(65504.0F), 0x7bff);
  EXPECT_EQ(FloatToFp16(65519.996F), 0x7bff);
  EXPECT_EQ(FloatToFp16(65520.0F), 0x7c00);
  EXPECT_EQ(FloatToFp16(-1e10F), 0xfc00);
  EXPECT_EQ(FloatToBf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(FloatToBf16(-std::numeric_limits<float>::infinity()), 0xff80);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("f16c"))) uint16_t HardwareFp16(float value) {
  typedef float Floats __attribute__((vector_size(16)));
  typedef int16_t Halves __attribute__((vector_size(16)));
  const Floats vector = {value, 0, 0, 0};
  const Halves halves = reinterpret_cast<Halves>(__builtin_ia32_vcvtps2ph(vector, 0));
  return static_cast<uint16_t>(halves[0]);
}

TEST(Dtype, AgreesWithTheHardware) {
  // clang 14 has no name for F16C; every processor with AVX2 has it.
  if (!__builtin_cpu_supports("avx2")) GTEST_SKIP() << "needs F16C";
  std::mt19937 generator(1);
  for (int i = 0; i < 2'000'000; ++i) {
    // Random bits, and random magnitudes in the range of fp16.
    const uint32_t bits = i % 2 == 0 ? generator() : (generator() & 0x8fffffffU) + 0x33000000U;
    const auto value = std::bit_cast<float>(bits);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(Fp16ToFloat(FloatToFp16(value))));
    } else {
      ASSERT_EQ(FloatToFp16(value), HardwareFp16(value)) << value;
    }
  }
}
#endif

TEST(Dtype, LoadsElementsOfAnyType) {
  const uint16_t bf16[] = {FloatToBf16(1.5F), FloatToBf16(-2.0F)};
  const uint16_t fp16[] = {FloatToFp16(0.25F), FloatToFp16(-3.0F)};
  const float fp32[] = {0.1F, -0.2F};
  EXPECT_EQ(LoadElement(bf16, DType::kBf16, 1), -2.0F);
  EXPECT_EQ(LoadElement(fp16, DType::kFp16, 1), -3.0F);
  EXPECT_EQ(LoadElement(fp32, DType::kFp32, 1), -0.2F);
  EXPECT_EQ(DTypeBytes(DType::kBf16), 2U);
  EXPECT_EQ(DTypeBytes(DType::kFp16), 2U);
  EXPECT_EQ(DTypeBytes(DType::kFp32), 4U);
  EXPECT_EQ(DTypeBytes(static_cast<DType>(9)), 0U);
  EXPECT_STREQ(DTypeName(DType::kFp16), "fp16");
  EXPECT_STREQ(DTypeName(static_cast<DType>(9)), "?");
}

}  // namespace
}  // namespace kvseek::kernels
