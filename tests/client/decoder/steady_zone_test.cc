// The books of the steady zone against a model that knows for each position whether it is there.
#include "client/decoder/steady_zone.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

namespace kvseek::client {
namespace {

constexpr ZoneShape kShape{
    .page_tokens = 4, .sink_tokens = 8, .recent_tokens = 16, .slack_tokens = 12};

/// Slots of the zone's positions are distinct, and stand in the pages in the order of positions.
void ExpectConsistent(const SteadyZone& zone) {
  std::set<int32_t> slots;
  int32_t row = 0;
  for (uint64_t position = 0; position < zone.tokens() + 3; ++position) {
    const int32_t slot = zone.Slot(position);
    const bool far = position >= zone.far_begin() && position < zone.far_end();
    if (far || position >= zone.tokens()) {
      ASSERT_EQ(slot, -1) << position;
      continue;
    }
    ASSERT_GE(slot, 0) << position;
    ASSERT_TRUE(slots.insert(slot).second) << "slot " << slot << " is taken twice";
    const auto page = static_cast<size_t>(row / 4);
    ASSERT_EQ(slot, zone.pages()[page] * 4 + row % 4) << position;
    ++row;
  }
  EXPECT_EQ(row, zone.rows());
  EXPECT_EQ(zone.pages().size(), static_cast<size_t>((row + 3) / 4));
}

TEST(SteadyZoneTest, KeepsAllUntilDaemonsHoldIt) {
  PageAllocator pages(100);
  SteadyZone zone(kShape, pages);
  for (int i = 0; i < 30; ++i) ASSERT_TRUE(zone.Append(1));
  zone.Slide(/*held=*/0);
  EXPECT_EQ(zone.far_end(), zone.far_begin());
  ExpectConsistent(zone);
  zone.Slide(/*held=*/11);  // whole pages only
  EXPECT_EQ(zone.far_end(), 8U);
  zone.Slide(/*held=*/13);
  EXPECT_EQ(zone.far_end(), 12U);
  ExpectConsistent(zone);
  zone.Slide(/*held=*/30);  // 16 recent tokens stay
  EXPECT_EQ(zone.far_end(), 12U);
  EXPECT_EQ(zone.rows(), 8 + 18);
}

TEST(SteadyZoneTest, IsBounded) {
  PageAllocator pages(100);
  SteadyZone zone(kShape, pages);
  uint64_t appended = 0;
  while (zone.Append(1)) ++appended;
  EXPECT_EQ(appended, kShape.PagesMax() * 4);
  EXPECT_EQ(zone.tokens(), appended);
  ExpectConsistent(zone);
  zone.Slide(appended);
  EXPECT_TRUE(zone.Append(1));
}

TEST(SteadyZoneTest, RefusesWhenPagesRunOut) {
  PageAllocator pages(3);
  SteadyZone zone(kShape, pages);
  EXPECT_TRUE(zone.Append(12));
  EXPECT_FALSE(zone.Append(1));
  EXPECT_FALSE(zone.Skip(1));
  EXPECT_EQ(zone.tokens(), 12U);
  EXPECT_TRUE(zone.Truncate(8));
  EXPECT_EQ(pages.available(), 1U);
}

TEST(SteadyZoneTest, GivesPagesBack) {
  PageAllocator pages(50);
  {
    SteadyZone zone(kShape, pages);
    ASSERT_TRUE(zone.Skip(1000));
    EXPECT_LT(pages.available(), 50U);
  }
  EXPECT_EQ(pages.available(), 50U);
}

TEST(SteadyZoneTest, TruncateStopsAtWhatHasLeft) {
  PageAllocator pages(50);
  SteadyZone zone(kShape, pages);
  ASSERT_TRUE(zone.Skip(100));
  EXPECT_EQ(zone.far_end(), 84U);
  EXPECT_FALSE(zone.Truncate(83));
  EXPECT_FALSE(zone.Truncate(101));
  EXPECT_TRUE(zone.Truncate(84));
  ExpectConsistent(zone);
  EXPECT_EQ(zone.rows(), 8);
}

TEST(SteadyZoneTest, RandomSequences) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const auto below = [&](uint64_t bound) { return random() % bound; };
  PageAllocator pages(200);
  for (int round = 0; round < 50; ++round) {
    SteadyZone zone(kShape, pages);
    for (int i = 0; i < 60; ++i) {
      const uint64_t tokens = zone.tokens();
      const uint64_t far_end = zone.far_end();
      switch (below(4)) {
        case 0:
          if (zone.Append(static_cast<uint32_t>(1 + below(5)))) {
            EXPECT_GT(zone.tokens(), tokens);
          }
          EXPECT_EQ(zone.far_end(), far_end);
          break;
        case 1:
          zone.Slide(below(tokens + 1));
          EXPECT_GE(zone.far_end(), far_end);
          EXPECT_EQ(zone.tokens(), tokens);
          break;
        case 2:
          ASSERT_TRUE(zone.Skip(1 + below(40)));
          EXPECT_GT(zone.tokens(), tokens);
          break;
        default:
          zone.Truncate(tokens - below(tokens + 1) / 4);
          break;
      }
      // The recent window never leaves.
      EXPECT_LE(zone.far_end() - zone.far_begin(), zone.tokens());
      ExpectConsistent(zone);
    }
  }
  EXPECT_EQ(pages.available(), 200U);
}

}  // namespace
}  // namespace kvseek::client
