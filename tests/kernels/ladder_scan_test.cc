#include "kernels/cpu/ladder_scan.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/ladder_codes.h"
#include "tests/kernels/aligned.h"
#include "tests/kernels/ladder_reference.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/simd_level_fixture.h"

namespace kvseek::kernels {
namespace {

using LadderScanTest = SimdLevelTest;

INSTANTIATE_TEST_SUITE_P(Levels, LadderScanTest, testing::ValuesIn(SupportedSimdLevels()),
                         LevelName);

TEST_P(LadderScanTest, TablesHoldPartialSums) {
  for (const int dim : {64, 128, 512}) {
    const int heads = 3;
    const int symbols = Symbols(dim);
    auto queries = reference::RandomFloats(6, static_cast<size_t>(heads * dim), 4.0F);
    std::fill_n(queries.begin() + dim, dim, 0.0F);
    std::vector<int8_t> tables(static_cast<size_t>(heads * symbols * 64));
    std::vector<float> units(static_cast<size_t>(heads));
    BuildTables(queries.data(), heads, dim, tables.data(), units.data());
    EXPECT_EQ(units[1], 0.0F);
    int largest = 0;
    for (int h = 0; h < heads; ++h) {
      for (int g = 0; g < symbols; ++g) {
        for (int s = 0; s < 64; ++s) {
          double sum = 0.0;
          for (int b = 0; b < 6 && 6 * g + b < dim; ++b) {
            const auto q = static_cast<double>(queries[static_cast<size_t>(h * dim + 6 * g + b)]);
            sum += (s >> b & 1) != 0 ? q : -q;
          }
          const int entry = tables[static_cast<size_t>((h * symbols + g) * 64 + s)];
          const auto unit = static_cast<double>(units[static_cast<size_t>(h)]);
          ASSERT_NEAR(entry, unit == 0.0 ? 0.0 : sum / unit, 0.501);
          largest = std::max(largest, std::abs(entry));
        }
      }
    }
    EXPECT_EQ(largest, kTableMax) << "the tables use all of their range";
  }
}

// Any bytes and any table entries: every level gives the reference's bits.
TEST_P(LadderScanTest, SumsAreExact) {
  std::mt19937 random(11);
  for (const int dim : {64, 128, 256, 512}) {
    for (const int planes : {1, 2}) {
      for (const int heads : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 64}) {
        const int blocks = heads > 8 ? 1 : 3;
        SCOPED_TRACE(std::to_string(dim) + " dimensions, planes " + std::to_string(planes) +
                     ", heads " + std::to_string(heads));
        const int symbols = Symbols(dim);
        const auto codes_size = static_cast<size_t>(blocks * ScanBlockBytes(symbols, planes));
        Aligned<uint8_t> codes(codes_size);
        for (size_t i = 0; i < codes_size; ++i) codes[i] = static_cast<uint8_t>(random());
        std::vector<int8_t> tables(static_cast<size_t>(heads * symbols * 64));
        for (int8_t& entry : tables)
          entry = static_cast<int8_t>(static_cast<int>(random() % 63) - 31);
        // The first head's sums are the largest there are.
        std::fill_n(tables.begin(), symbols * 64, static_cast<int8_t>(kTableMax));
        const int stride = blocks * 64 + 64;
        Aligned<int16_t> sums(static_cast<size_t>(heads * stride), -7);
        ScanCodes(codes.data(), blocks, symbols, planes, tables.data(), heads, sums.data(), stride);
        const auto expected =
            reference::ScanSums(codes.data(), blocks, symbols, planes, tables.data(), heads);
        for (int h = 0; h < heads; ++h) {
          for (int key = 0; key < blocks * 64; ++key) {
            ASSERT_EQ(sums[static_cast<size_t>(h * stride + key)],
                      expected[static_cast<size_t>(h * blocks * 64 + key)])
                << h << ' ' << key;
          }
          for (int key = blocks * 64; key < stride; ++key) {
            ASSERT_EQ(sums[static_cast<size_t>(h * stride + key)], -7) << "past the end";
          }
        }
      }
    }
  }
}

TEST_P(LadderScanTest, NoBlocks) {
  Aligned<uint8_t> codes(64);
  Aligned<int16_t> sums(64, 3);
  const std::vector<int8_t> tables(22 * 64);
  ScanCodes(codes.data(), 0, 22, 1, tables.data(), 1, sums.data(), 64);
  EXPECT_EQ(sums[0], 3);
}

}  // namespace
}  // namespace kvseek::kernels
