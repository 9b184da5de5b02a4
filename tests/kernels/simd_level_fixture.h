// Tests that run at every SIMD level that this machine has.
#ifndef KVSEEK_TESTS_KERNELS_SIMD_LEVEL_FIXTURE_H_
#define KVSEEK_TESTS_KERNELS_SIMD_LEVEL_FIXTURE_H_

#include <algorithm>
#include <string>

#include "gtest/gtest.h"
#include "kernels/cpu/simd_level.h"

namespace kvseek::kernels {

/// Forces the level that is its parameter. Instantiate with SupportedSimdLevels and LevelName.
class SimdLevelTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_TRUE(ForceSimdLevel(GetParam())); }
  void TearDown() override { ForceSimdLevel(""); }
};

/// A level's name as one of a test.
inline std::string LevelName(const testing::TestParamInfo<std::string>& level) {
  std::string name = level.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

}  // namespace kvseek::kernels

#endif  // KVSEEK_TESTS_KERNELS_SIMD_LEVEL_FIXTURE_H_
