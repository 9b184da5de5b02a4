#include "kernels/cpu/simd_level.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvseek::kernels {
namespace {

class SimdLevelTest : public ::testing::Test {
 protected:
  void TearDown() override {
    unsetenv("KVSEEK_SIMD");
    ForceSimdLevel("");
  }
};

TEST_F(SimdLevelTest, ListsKnownLevelsBestFirst) {
  const std::vector<std::string> order = {"avx512-vbmi", "avx512", "avx2", "neon", "scalar"};
  const std::vector<std::string> levels = SupportedSimdLevels();
  size_t next = 0;
  for (const std::string& level : levels) {
    while (next < order.size() && order[next] != level) ++next;
    ASSERT_LT(next, order.size()) << level << " is unknown, out of order or twice";
    ++next;
  }
  EXPECT_EQ(levels.back(), "scalar");
}

TEST_F(SimdLevelTest, MatchesThisMachine) {
#if defined(__x86_64__)
  const std::vector<std::string> levels = SupportedSimdLevels();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  EXPECT_EQ(levels.size() >= 2, avx2);
  EXPECT_EQ(levels.size() >= 3, avx512);
  if (__builtin_cpu_supports("avx512vbmi") == 0) {
    EXPECT_THAT(levels, ::testing::Not(::testing::Contains("avx512-vbmi")));
  }
#elif defined(__aarch64__)
  EXPECT_THAT(SupportedSimdLevels(), ::testing::ElementsAre("neon", "scalar"));
#else
  GTEST_SKIP() << "no expectation for this architecture";
#endif
}

TEST_F(SimdLevelTest, UsesTheBestByDefault) {
  EXPECT_EQ(SimdLevel(), SupportedSimdLevels().front());
}

TEST_F(SimdLevelTest, ForcesEachLevelAndGoesBack) {
  for (const std::string& level : SupportedSimdLevels()) {
    EXPECT_TRUE(ForceSimdLevel(level));
    EXPECT_EQ(SimdLevel(), level);
  }
  EXPECT_TRUE(ForceSimdLevel(""));
  EXPECT_EQ(SimdLevel(), SupportedSimdLevels().front());
}

TEST_F(SimdLevelTest, RefusesUnknownLevelsAndKeepsTheOldOne) {
  ASSERT_TRUE(ForceSimdLevel("scalar"));
  EXPECT_FALSE(ForceSimdLevel("avx1024"));
  EXPECT_FALSE(ForceSimdLevel("AVX2"));
  EXPECT_EQ(SimdLevel(), "scalar");
}

TEST_F(SimdLevelTest, ReadsTheEnvironment) {
  unsetenv("KVSEEK_SIMD");
  EXPECT_TRUE(ApplySimdLevelFromEnvironment());
  EXPECT_EQ(SimdLevel(), SupportedSimdLevels().front());
  setenv("KVSEEK_SIMD", "scalar", 1);
  EXPECT_TRUE(ApplySimdLevelFromEnvironment());
  EXPECT_EQ(SimdLevel(), "scalar");
  setenv("KVSEEK_SIMD", "fastest", 1);
  EXPECT_FALSE(ApplySimdLevelFromEnvironment());
  EXPECT_EQ(SimdLevel(), "scalar");
}

}  // namespace
}  // namespace kvseek::kernels
