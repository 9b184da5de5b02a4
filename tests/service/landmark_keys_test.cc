#include "service/landmark_keys.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <random>
#include <vector>

namespace kvseek::service {
namespace {

constexpr size_t kKvHeads = 2;
constexpr size_t kKeyDim = 8;
constexpr size_t kElements = kKvHeads * kKeyDim;
constexpr auto kDType = kernels::DType::kBf16;

using Shared = std::shared_ptr<const LandmarkKeys>;

class LandmarkKeysTest : public testing::Test {
 protected:
  /// Landmarks of blocks; each element of one tells head and mark.
  Shared Add(const Shared& keys, const std::vector<uint64_t>& blocks, int block, int mark) {
    std::vector<uint64_t> positions;
    std::vector<uint16_t> rows;
    for (const uint64_t number : blocks) {
      positions.push_back(number * static_cast<uint64_t>(block));
      for (size_t e = 0; e < kElements; ++e) {
        rows.push_back(kernels::FloatToBf16(Element(e / kKeyDim, mark)));
      }
    }
    auto more = LandmarkKeys::With(keys, {positions, rows.data(), block}, kElements, budget_);
    EXPECT_TRUE(more.ok()) << more.status();
    return more.ok() ? *more : nullptr;
  }
  Shared Below(const Shared& keys, int64_t tokens) {
    auto cut = LandmarkKeys::Below(keys, tokens, budget_);
    EXPECT_TRUE(cut.ok()) << cut.status();
    return cut.ok() ? *cut : nullptr;
  }
  static float Element(size_t head, int mark) {
    return static_cast<float>(mark % 64) + (head == 0 ? 0.0F : 0.5F);
  }
  /// `expected`: the mark of each block that has a landmark.
  static void ExpectHolds(const Shared& keys, const std::map<int64_t, int>& expected, int block) {
    std::vector<int64_t> positions;
    for (const auto& [number, mark] : expected) positions.push_back(number * block);
    ASSERT_EQ(keys == nullptr ? std::vector<int64_t>() : keys->Positions(), positions);
    for (size_t head = 0; head < kKvHeads && keys != nullptr; ++head) {
      const std::vector<float> rows = keys->OfHead(head, kKeyDim, kDType);
      ASSERT_EQ(rows.size(), expected.size() * kKeyDim);
      size_t at = 0;
      for (const auto& [number, mark] : expected) {
        for (size_t d = 0; d < kKeyDim; ++d) ASSERT_EQ(rows[at++], Element(head, mark)) << number;
      }
    }
  }

  MemoryBudget budget_{uint64_t{16} << 20, std::chrono::milliseconds(1)};
};

TEST_F(LandmarkKeysTest, WhatCameFirstStays) {
  const Shared first = Add(nullptr, {0, 3, 20}, 32, 1);
  const Shared second = Add(first, {3, 4, 20, 21}, 32, 2);
  ExpectHolds(first, {{0, 1}, {3, 1}, {20, 1}}, 32);
  ExpectHolds(second, {{0, 1}, {3, 1}, {4, 2}, {20, 1}, {21, 2}}, 32);
  EXPECT_EQ(Add(second, {0, 21}, 32, 3), second);  // nothing new, nothing copied
  EXPECT_EQ(Add(second, {}, 32, 3), second);
  EXPECT_EQ(Add(nullptr, {}, 32, 3), nullptr);
}

TEST_F(LandmarkKeysTest, CountsBlocksThatHaveEnded) {
  const Shared keys = Add(nullptr, {0, 3, 15, 16, 40}, 64, 1);
  EXPECT_EQ(keys->Count(63), 0);
  EXPECT_EQ(keys->Count(64), 1);
  EXPECT_EQ(keys->Count(4 * 64), 2);
  EXPECT_EQ(keys->Count(16 * 64), 3);
  EXPECT_EQ(keys->Count(17 * 64 - 1), 3);
  EXPECT_EQ(keys->Count(41 * 64), 5);
  EXPECT_EQ(keys->Count(int64_t{1} << 24), 5);
}

TEST_F(LandmarkKeysTest, ChangesShareWhatTheyCan) {
  std::vector<uint64_t> blocks(1024);
  std::iota(blocks.begin(), blocks.end(), 0U);
  const Shared keys = Add(nullptr, blocks, 16, 1);
  EXPECT_EQ(keys->Bytes(), LandmarkKeys::Bytes(1024 * 16, 16, kElements));
  const uint64_t before = budget_.used_bytes();
  EXPECT_EQ(before, keys->Bytes());
  EXPECT_EQ(Below(keys, 1024 * 16), keys);
  EXPECT_EQ(Below(keys, 1 << 20), keys);
  EXPECT_EQ(Below(nullptr, 5), nullptr);
  const Shared longer = Add(keys, {1024}, 16, 2);
  const Shared cut = Below(keys, 500 * 16 + 15);
  EXPECT_EQ(cut->Count(1 << 20), 500);
  // A list and a page each, of 65 and 32 pages.
  EXPECT_LT(budget_.used_bytes() - before, keys->Bytes() / 4);
}

TEST_F(LandmarkKeysTest, TakesMemoryFromTheBudgetAndGivesItBack) {
  {
    const Shared keys = Add(nullptr, {5, 100}, 16, 1);
    EXPECT_EQ(budget_.used_bytes(), keys->Bytes());
    EXPECT_GT(keys->Bytes(), 2U * 16 * kElements * sizeof(uint16_t));
    MemoryBudget small(64, std::chrono::milliseconds(1));
    const std::vector<uint64_t> positions = {16};
    const std::vector<uint16_t> rows(kElements);
    const auto refused = LandmarkKeys::With(keys, {positions, rows.data(), 16}, kElements, small);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(LandmarkKeys::Below(keys, 160, small).status().code(),
              absl::StatusCode::kResourceExhausted);
  }
  EXPECT_EQ(budget_.used_bytes(), 0U);
}

// Several versions side by side, each against a map.
TEST_F(LandmarkKeysTest, AgreesWithMaps) {
  struct Version {
    Shared keys;
    std::map<int64_t, int> model;
  };
  for (const int block : {16, 256}) {
    std::mt19937_64 random(static_cast<uint64_t>(block));
    std::vector<Version> versions(1);
    for (int i = 0; i < 2000; ++i) {
      Version version = versions[random() % versions.size()];
      if (random() % 4 == 0) {
        const auto tokens = static_cast<int64_t>(random() % static_cast<uint64_t>(130 * block));
        version.keys = Below(version.keys, tokens);
        std::erase_if(version.model,
                      [&](const auto& entry) { return (entry.first + 1) * block > tokens; });
      } else {
        std::vector<uint64_t> blocks;
        for (uint64_t b = random() % 120; b < 130 && blocks.size() < 20; b += 1 + random() % 4) {
          blocks.push_back(b);
        }
        version.keys = Add(version.keys, blocks, block, i);
        for (const uint64_t b : blocks) version.model.emplace(static_cast<int64_t>(b), i);
      }
      ExpectHolds(version.keys, version.model, block);
      if (HasFatalFailure()) return;
      if (versions.size() < 6) {
        versions.push_back(std::move(version));
      } else {
        versions[random() % versions.size()] = std::move(version);
      }
    }
    for (const Version& version : versions) ExpectHolds(version.keys, version.model, block);
  }
  EXPECT_EQ(budget_.used_bytes(), 0U);
}

}  // namespace
}  // namespace kvseek::service
