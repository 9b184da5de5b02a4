#include "index/selection.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace kvseek::index {
namespace {

TEST(BestIndicesTest, TiesGoToTheLowerIndex) {
  std::mt19937 random(1);
  Scratch scratch;
  for (const int different : {1, 3, 40, 100000}) {
    std::uniform_int_distribution<int> number(0, different - 1);
    for (const size_t size : {1, 5, 100, 3000}) {
      std::vector<float> values(size);
      for (float& value : values) value = static_cast<float>(number(random));
      for (const size_t count : {size_t{0}, size_t{1}, size_t{17}, size / 2, size, 2 * size}) {
        std::vector<uint32_t> expected(size);
        std::iota(expected.begin(), expected.end(), 0U);
        std::stable_sort(expected.begin(), expected.end(),
                         [&](uint32_t a, uint32_t b) { return values[a] > values[b]; });
        expected.resize(std::min(count, size));
        std::sort(expected.begin(), expected.end());
        scratch.Reset();
        EXPECT_EQ(BestIndices(values, static_cast<int64_t>(count), scratch), expected)
            << different << ' ' << size << ' ' << count;
      }
    }
  }
}

}  // namespace
}  // namespace kvseek::index
