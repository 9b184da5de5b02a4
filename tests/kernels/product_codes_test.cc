#include "kernels/cpu/product_codes.h"

#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/simd_level_fixture.h"

namespace kvseek::kernels {
namespace {

using ProductCodesTest = SimdLevelTest;

INSTANTIATE_TEST_SUITE_P(Levels, ProductCodesTest, testing::ValuesIn(SupportedSimdLevels()),
                         LevelName);

TEST_P(ProductCodesTest, NearestCentroidsAreNearest) {
  for (const int dim : {1, 3, 6, 11, 12, 24}) {
    for (const int count : {0, 1, 3, 4, 7, 130}) {
      SCOPED_TRACE(std::to_string(dim) + " dimensions, " + std::to_string(count) + " points");
      const int stride = dim + 5;
      const auto points = reference::RandomFloats(1, static_cast<size_t>((count + 1) * stride), 1);
      const auto centroids = reference::RandomFloats(2, static_cast<size_t>(dim * 64), 1);
      std::vector<uint8_t> symbols(static_cast<size_t>(count * 3 + 1), 99);
      std::vector<float> squares(static_cast<size_t>(count), 2.0F);
      NearestCentroids(points.data(), stride, count, centroids.data(), dim, symbols.data(), 3,
                       squares.data());
      for (int i = 0; i < count; ++i) {
        std::vector<double> distances(64);
        double least = std::numeric_limits<double>::infinity();
        for (int c = 0; c < 64; ++c) {
          for (int d = 0; d < dim; ++d) {
            const double gap = double{points[static_cast<size_t>(i * stride + d)]} -
                               centroids[static_cast<size_t>(d * 64 + c)];
            distances[static_cast<size_t>(c)] += gap * gap;
          }
          least = std::min(least, distances[static_cast<size_t>(c)]);
        }
        const uint8_t symbol = symbols[static_cast<size_t>(3 * i)];
        ASSERT_LT(symbol, 64);
        EXPECT_NEAR(distances[symbol], least, 1e-4);
        EXPECT_NEAR(squares[static_cast<size_t>(i)], 2.0 + distances[symbol], 1e-4);
        EXPECT_EQ(symbols[static_cast<size_t>(3 * i + 1)], 99);
      }
    }
  }
}

TEST_P(ProductCodesTest, FirstOfEqualCentroids) {
  const std::vector<float> centroids(2 * 64, 0.5F);
  const std::vector<float> points(2 * 5, 1.0F);
  std::vector<uint8_t> symbols(5, 99);
  std::vector<float> squares(5, 0.0F);
  NearestCentroids(points.data(), 2, 5, centroids.data(), 2, symbols.data(), 1, squares.data());
  EXPECT_EQ(symbols, std::vector<uint8_t>(5, 0));
  NearestCentroids(points.data(), 2, 5, centroids.data(), 0, symbols.data(), 1, squares.data());
  EXPECT_EQ(symbols, std::vector<uint8_t>(5, 0));
  EXPECT_FLOAT_EQ(squares[4], 0.5F);
}

TEST(ProductLayoutTest, PacksAndUnpacks) {
  std::mt19937 random(3);
  for (const int subspaces : {1, 2, 3, 4, 11, 12, 22, 63}) {
    const ProductLayout layout = {subspaces, false};
    const int each = layout.Symbols();
    constexpr int kBlocks = 2;
    std::vector<uint8_t> symbols(static_cast<size_t>(kBlocks * 64 * each));
    for (uint8_t& symbol : symbols) symbol = static_cast<uint8_t>(random() % 64);
    std::vector<uint8_t> codes(static_cast<size_t>(kBlocks * layout.BlockBytes()), 0xaa);
    PackProductBlocks(symbols.data(), kBlocks, layout, codes.data());
    for (int key = 0; key < kBlocks * 64; ++key) {
      const uint8_t* const block =
          codes.data() + static_cast<ptrdiff_t>(key / 64) * layout.BlockBytes();
      for (int g = 0; g < each; ++g) {
        ASSERT_EQ(ProductSymbol(block, layout, g, key % 64),
                  symbols[static_cast<size_t>(key * each + g)]);
      }
    }
  }
  EXPECT_EQ(ProductLayout({11, true}).BlockBytes(), 9 * 64);
  EXPECT_EQ(ProductLayout({22, false}).BlockBytes(), 18 * 64);
}

TEST(ProductLayoutTest, PacksSketches) {
  std::mt19937 random(4);
  constexpr int kBlocks = 3;
  std::vector<uint8_t> nibbles(kBlocks * 64 * 8);
  for (uint8_t& nibble : nibbles) nibble = static_cast<uint8_t>(random() % 16);
  std::vector<uint8_t> sketches(kBlocks * kSketchBlockBytes, 0xaa);
  PackSketchBlocks(nibbles.data(), kBlocks, sketches.data());
  for (int key = 0; key < kBlocks * 64; ++key) {
    for (int c = 0; c < 8; ++c) {
      const int at = key / 64 * kSketchBlockBytes + c % 4 * 64 + key % 64;
      const uint8_t byte = sketches[static_cast<size_t>(at)];
      ASSERT_EQ(c < 4 ? byte & 15 : byte >> 4, nibbles[static_cast<size_t>(key * 8 + c)]);
    }
  }
}

}  // namespace
}  // namespace kvseek::kernels
