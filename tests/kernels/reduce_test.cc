#include "kernels/cpu/reduce.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cpu/simd_level.h"

namespace kvseek::kernels {
namespace {

TEST(ReduceTest, EveryLevelEqualsPlainLoops) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const std::string& level : SupportedSimdLevels()) {
    ASSERT_TRUE(ForceSimdLevel(level));
    for (const int count : {0, 1, 7, 15, 16, 17, 64, 200}) {
      for (const int heads : {1, 3, 6}) {
        const int stride = count + 5;
        std::vector<float> rows(static_cast<size_t>(heads * stride));
        for (float& value : rows) value = normal(random) - 3.0F;
        std::vector<float> shifts(static_cast<size_t>(heads));
        for (float& shift : shifts) shift = normal(random);
        std::vector<float> bounds(static_cast<size_t>(heads));
        for (float& bound : bounds) bound = normal(random) - 2.0F;
        if (count % 2 == 0) bounds[0] = std::numeric_limits<float>::infinity();
        const float expected_max = count == 0
                                       ? -std::numeric_limits<float>::infinity()
                                       : *std::max_element(rows.begin(), rows.begin() + count);
        EXPECT_EQ(MaxElement(rows.data(), count), expected_max) << level;
        std::vector<float> out(static_cast<size_t>(count) + 1, 42.0F);
        MaxOfShifted(rows.data(), stride, heads, shifts.data(), bounds.data(), count, out.data());
        for (int i = 0; i < count; ++i) {
          float best = -std::numeric_limits<float>::infinity();
          for (int h = 0; h < heads; ++h) {
            const float value = rows[static_cast<size_t>(h * stride + i)];
            const auto head = static_cast<size_t>(h);
            const bool over = value > bounds[head];
            best = std::max(best,
                            over ? std::numeric_limits<float>::infinity() : value - shifts[head]);
          }
          EXPECT_EQ(out[static_cast<size_t>(i)], best) << level << " " << i;
        }
        EXPECT_EQ(out[static_cast<size_t>(count)], 42.0F) << "written past the end";
      }
    }
  }
  ASSERT_TRUE(ForceSimdLevel(""));
}

}  // namespace
}  // namespace kvseek::kernels
