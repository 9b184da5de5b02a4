// The row cache's books against a model: after each answer, every slot that is named holds the row
// of the position that it is named for.
#include "client/decoder/row_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

namespace kvseek::client {
namespace {

using Positions = std::vector<int64_t>;

/// Plays daemon and GPU: sends rows that are not held, and puts arrivals into slots.
class Player {
 public:
  explicit Player(uint32_t capacity) : cache_(capacity), capacity_(capacity) {}

  /// Returns how many rows arrived.
  size_t Answer(const std::vector<Positions>& tokens) {
    std::vector<uint32_t> held;
    cache_.AppendHeld(0, 1 << 30, held);
    EXPECT_TRUE(std::is_sorted(held.begin(), held.end()));
    const std::set<uint32_t> is_held(held.begin(), held.end());
    EXPECT_EQ(is_held.size(), held.size());
    Positions rows;  // as they come, token by token
    std::vector<absl::Span<const int64_t>> selections;
    size_t asked = 0;
    for (const Positions& positions : tokens) {
      selections.emplace_back(positions);
      asked += positions.size();
      for (const int64_t position : positions) {
        if (is_held.count(static_cast<uint32_t>(position)) == 0) rows.push_back(position);
      }
    }
    std::vector<int32_t> slots(asked, -1);
    const auto arrivals = cache_.Admit(selections, slots.data());
    for (const RowCache::Arrival& arrival : arrivals) {
      EXPECT_LT(arrival.row, rows.size());
      EXPECT_GE(arrival.slot, 0);
      EXPECT_LT(arrival.slot, static_cast<int32_t>(capacity_));
      memory_[arrival.slot] = rows[arrival.row];
    }
    auto slot = slots.begin();
    for (const Positions& positions : tokens) {
      for (const int64_t position : positions) EXPECT_EQ(memory_.at(*slot++), position);
    }
    return arrivals.size();
  }

  RowCache& cache() { return cache_; }

 private:
  RowCache cache_;
  uint32_t capacity_;
  std::map<int32_t, int64_t> memory_;
};

TEST(RowCacheTest, HeldRowsDoNotTravelAgain) {
  Player player(8);
  EXPECT_EQ(player.Answer({{3, 5, 9}}), 3U);
  EXPECT_EQ(player.Answer({{3, 5, 9}}), 0U);
  EXPECT_EQ(player.Answer({{3, 6, 9}}), 1U);
}

TEST(RowCacheTest, LeastRecentlyUsedGoes) {
  Player player(4);
  player.Answer({{1, 2}});
  player.Answer({{3, 4}});
  player.Answer({{1}});
  EXPECT_EQ(player.Answer({{5}}), 1U);  // 2 goes
  EXPECT_EQ(player.Answer({{1, 3, 4, 5}}), 0U);
}

TEST(RowCacheTest, TokensShareRows) {
  Player player(6);
  EXPECT_EQ(player.Answer({{1, 2, 3}, {2, 3, 4}}), 4U);
  // 1 is held and is not sent, though only the second token asks for it and the first fills the
  // cache.
  EXPECT_EQ(player.Answer({{10, 11, 12}, {1, 10}}), 3U);
}

TEST(RowCacheTest, HeldWithinRange) {
  RowCache cache(4);
  const Positions positions{2, 4, 6};
  std::vector<int32_t> slots(3);
  const absl::Span<const int64_t> selection = positions;
  cache.Admit({&selection, 1}, slots.data());
  std::vector<uint32_t> held{99};
  EXPECT_EQ(cache.AppendHeld(3, 6, held), 1U);
  EXPECT_EQ(held, (std::vector<uint32_t>{99, 4}));
  cache.Truncate(4);
  EXPECT_EQ(cache.size(), 1U);
}

TEST(RowCacheTest, RandomAnswers) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 30; ++round) {
    const uint32_t k = 1 + random() % 20;
    const uint32_t tokens = 1 + random() % 3;
    Player player(k * tokens + random() % 30);
    for (int step = 0; step < 60; ++step) {
      std::vector<Positions> asked(tokens);
      for (Positions& positions : asked) {
        std::set<int64_t> chosen;
        const size_t count = random() % (k + 1);
        while (chosen.size() < count) chosen.insert(random() % 64);
        positions.assign(chosen.begin(), chosen.end());
      }
      player.Answer(asked);
      if (random() % 10 == 0) player.cache().Truncate(random() % 64);
    }
  }
}

}  // namespace
}  // namespace kvseek::client
