#include "service/head_cache.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <thread>

#include "index/selection.h"
#include "kernels/cpu/rotation.h"
#include "service/layer_cache.h"
#include "tests/kernels/reference.h"

namespace kvseek::service {
namespace {

constexpr index::KvShape kShape{16, 24, kernels::DType::kBf16, 0.25F, 2};

/// Rows of a head, made of their position: row p of lineage `tag` is the same wherever it is
/// appended.
struct Source {
  std::vector<uint16_t> keys;
  std::vector<uint16_t> values;

  explicit Source(uint32_t tag, size_t tokens = 6000)
      : keys(reference::RandomElements(tag, tokens * 16, 1.0F, kShape.dtype)),
        values(reference::RandomElements(tag + 1, tokens * 24, 1.0F, kShape.dtype)) {}
  StridedRows Rows(int64_t begin, int64_t end) const {
    return {end - begin, keys.data() + begin * 16, values.data() + begin * 24, 16, 24};
  }
};

/// A cache and how much of it its owner has.
struct Held {
  HeadCache cache{kShape};
  int64_t tokens = 0;

  index::KvView View() const { return cache.View(tokens); }
};

class HeadCacheTest : public testing::Test {
 protected:
  ~HeadCacheTest() override { EXPECT_EQ(budget_.used_bytes(), 0U); }

  Held Append(const Held& held, const Source& source, int64_t end) {
    const StridedRows rows = source.Rows(held.tokens, end);
    if (held.cache.AppendInPlace(held.tokens, rows)) return {held.cache, end};
    const uint64_t bytes = held.cache.AppendBytes(held.tokens, end - held.tokens);
    auto grant = MemoryGrant::Make(budget_, bytes, "payload");
    auto next = held.cache.Append(held.tokens, rows, *grant, scratch_);
    EXPECT_TRUE(next.ok()) << next.status();
    scratch_.Reset();
    return {*std::move(next), end};
  }
  Held Truncate(const Held& held, int64_t tokens) {
    auto grant = MemoryGrant::Make(budget_, held.cache.TruncateBytes(tokens), "tokens");
    auto next = held.cache.Truncate(tokens, *grant);
    EXPECT_TRUE(next.ok()) << next.status();
    return {*std::move(next), tokens};
  }
  /// Positions [begin, end) hold the source's rows, looked up and in the view.
  static void ExpectHolds(const Held& held, const Source& source, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      ASSERT_EQ(std::memcmp(held.cache.KeyRow(p), source.keys.data() + p * 16, 32), 0) << p;
      ASSERT_EQ(std::memcmp(held.cache.ValueRow(p), source.values.data() + p * 24, 48), 0) << p;
    }
    const index::KvView view = held.View();
    ASSERT_EQ(view.Tokens(), held.tokens);
    ASSERT_EQ(view.SealedTokens(), index::SealedTokens(held.tokens));
    ASSERT_EQ(view.tail.size(), (view.tail_tokens + 63) / 64);
    int64_t next = begin;
    index::VisitRows(view, begin, end,
                     [&](const uint16_t* keys, const uint16_t* values, int64_t first, int count) {
                       ASSERT_EQ(first, next);
                       next += count;
                       const auto rows = static_cast<size_t>(count);
                       ASSERT_EQ(std::memcmp(keys, source.keys.data() + first * 16, rows * 32), 0);
                       ASSERT_EQ(std::memcmp(values, source.values.data() + first * 24, rows * 48),
                                 0);
                     });
    ASSERT_EQ(next, end);
  }

  MemoryBudget budget_{uint64_t{1} << 30, std::chrono::milliseconds(50)};
  index::Scratch scratch_;
  const Source a_{1};
  const Source b_{1000};
};

TEST_F(HeadCacheTest, HoldsWhatIsAppendedInAnyCut) {
  for (const int64_t step : {1, 63, 64, 65, 1000, 1023, 1024, 1025, 1088, 3000}) {
    Held held;
    for (int64_t end = 0; end < 5000;) {
      end = std::min<int64_t>(end + step, 5000);
      held = Append(held, a_, end);
      ASSERT_EQ(held.View().SealedTokens(), index::SealedTokens(end)) << step;
    }
    EXPECT_EQ(held.View().segments.size(), 4U);
    ExpectHolds(held, a_, 0, 5000);
    EXPECT_EQ(budget_.used_bytes(), HeadCache::Bytes(kShape, 5000)) << step;
  }
}

TEST_F(HeadCacheTest, ASegmentIsTheSameHoweverItCame) {
  const Held at_once = Append(Held(), a_, 1088);
  Held by_token;
  for (int64_t end = 1; end <= 1088; ++end) {
    by_token = Append(by_token, a_, end);
    ASSERT_EQ(by_token.cache.pending() != nullptr, end >= 1024 && end < 1088) << end;
    ASSERT_EQ(by_token.View().segments.size(), end < 1088 ? 0U : 1U) << end;
    // A worker is earlier than whoever needs it.
    if (end == 1050) by_token.cache.pending()->Make(scratch_);
  }
  const index::Segment& one = *at_once.View().segments[0];
  const index::Segment& other = *by_token.View().segments[0];
  EXPECT_EQ(std::memcmp(one.fine_records(), other.fine_records(),
                        1024 * kernels::FineRecordBytes(kernels::PaddedDim(16), 24)),
            0);
  EXPECT_EQ(std::memcmp(one.centre(), other.centre(), 16 * sizeof(float)), 0);
}

TEST_F(HeadCacheTest, WhoWaitsForASegmentSaysHowLongItTakes) {
  const Held before = Append(Held(), a_, 1020);
  EXPECT_FALSE(before.cache.AppendMakesSegment(1020, 4)) << "a worker makes it later";
  EXPECT_TRUE(before.cache.AppendMakesSegment(1020, 68)) << "it is due";
  const Held begun = Append(Held(), a_, 900);
  EXPECT_TRUE(begun.cache.AppendMakesSegment(900, 124)) << "too many rows to be copied twice";
  const Held ended = Append(before, a_, 1024);
  EXPECT_FALSE(ended.cache.AppendMakesSegment(1024, 63));
  EXPECT_TRUE(ended.cache.AppendMakesSegment(1024, 64));
  ended.cache.pending()->Make(scratch_);
  EXPECT_FALSE(ended.cache.AppendMakesSegment(1024, 64)) << "it is made";
}

TEST_F(HeadCacheTest, GathersOneHeadOutOfMany) {
  const Source three(7, 3 * 1100);
  auto grant = MemoryGrant::Make(budget_, 0, "payload");
  const StridedRows middle{1100, three.keys.data() + 16, three.values.data() + 24, 48, 72};
  auto grown = HeadCache(kShape).Append(0, middle, *grant, scratch_);
  ASSERT_TRUE(grown.ok());
  for (int64_t p = 0; p < 1100; ++p) {
    ASSERT_EQ(std::memcmp(grown->KeyRow(p), three.keys.data() + (3 * p + 1) * 16, 32), 0);
    ASSERT_EQ(std::memcmp(grown->ValueRow(p), three.values.data() + (3 * p + 1) * 24, 48), 0);
  }
}

TEST_F(HeadCacheTest, AppendsInPlaceWhileItMay) {
  const Held ten = Append(Held(), a_, 10);
  EXPECT_EQ(ten.cache.AppendBytes(10, 1), 0U);
  ASSERT_TRUE(ten.cache.AppendInPlace(10, a_.Rows(10, 20)));
  EXPECT_EQ(budget_.used_bytes(), TailChunk::Bytes(kShape));
  EXPECT_EQ(ten.cache.AppendBytes(10, 1), TailChunk::Bytes(kShape)) << "the place is taken";
  EXPECT_FALSE(ten.cache.AppendInPlace(10, b_.Rows(10, 11)));
  ExpectHolds({ten.cache, 20}, a_, 0, 20);
  EXPECT_FALSE(ten.cache.AppendInPlace(20, a_.Rows(20, 65))) << "more than the chunk takes";
  ASSERT_TRUE(ten.cache.AppendInPlace(20, a_.Rows(20, 64)));
  EXPECT_FALSE(ten.cache.AppendInPlace(64, a_.Rows(64, 65))) << "the chunk is full";
  ExpectHolds({ten.cache, 64}, a_, 0, 64);

  const Held long_one = Append(Held(), a_, 1020);
  EXPECT_FALSE(long_one.cache.AppendInPlace(1020, a_.Rows(1020, 1024))) << "ends a segment";
  const Held longer = Append(long_one, a_, 1080);
  EXPECT_FALSE(longer.cache.AppendInPlace(1080, a_.Rows(1080, 1088))) << "a segment is due";
}

TEST_F(HeadCacheTest, ForkCopiesNothingAndGrowsApart) {
  const Held parent = Append(Held(), a_, 2120);
  const uint64_t used = budget_.used_bytes();
  const Held fork = parent;  // NOLINT(performance-unnecessary-copy-initialization)
  EXPECT_EQ(budget_.used_bytes(), used);
  EXPECT_EQ(fork.View().segments.data(), parent.View().segments.data());
  EXPECT_EQ(fork.cache.KeyRow(2119), parent.cache.KeyRow(2119));

  const Held left = Append(parent, a_, 2125);
  const Held right = Append(fork, b_, 2130);
  EXPECT_EQ(left.cache.KeyRow(2119), parent.cache.KeyRow(2119)) << "the first stays in place";
  EXPECT_NE(right.cache.KeyRow(2119), parent.cache.KeyRow(2119));
  EXPECT_EQ(budget_.used_bytes(), used + TailChunk::Bytes(kShape));
  ExpectHolds(parent, a_, 0, 2120);
  ExpectHolds(left, a_, 0, 2125);
  ExpectHolds(right, a_, 0, 2120);
  ExpectHolds(right, b_, 2120, 2130);
  EXPECT_EQ(left.View().segments[0], right.View().segments[0]);
}

TEST_F(HeadCacheTest, ForksShareAPendingSegment) {
  const Held before = Append(Held(), a_, 1020);
  const Held parent = Append(before, a_, 1030);
  const Held left = Append(parent, a_, 1100);
  const Held right = Append(parent, b_, 1100);
  ASSERT_EQ(left.View().segments.size(), 1U);
  EXPECT_EQ(left.View().segments[0], right.View().segments[0]);
  ExpectHolds(left, a_, 0, 1100);
  ExpectHolds(right, a_, 0, 1030);
  ExpectHolds(right, b_, 1030, 1100);
}

TEST_F(HeadCacheTest, TruncatesInTailAndSegments) {
  for (const int64_t tokens : {3200, 3100, 3072, 3071}) {
    for (const int64_t before : {0, 3060}) {  // the last segment came at once, or bit by bit
      const Held held = Append(before == 0 ? Held() : Append(Held(), a_, before), a_, tokens);
      for (const int64_t kept :
           {0,    1,    64,   500,  1023, 1024, 1025, 1087, 1088, 1089, 2048,
            2060, 2111, 2112, 2113, 3071, 3072, 3073, 3135, 3136, 3199, 3200}) {
        if (kept > tokens) continue;
        const Held cut = Truncate(held, kept);
        ExpectHolds(cut, a_, 0, kept);
        const Held grown = Append(cut, b_, 4200);
        ExpectHolds(grown, a_, 0, kept);
        ExpectHolds(grown, b_, kept, 4200);
        Held slowly = cut;
        for (int64_t end = kept; end < kept + 130;) slowly = Append(slowly, b_, ++end);
        ExpectHolds(slowly, a_, 0, kept);
        ExpectHolds(slowly, b_, kept, kept + 130);
        ExpectHolds(held, a_, 0, tokens);
      }
    }
  }
  const Held held = Append(Held(), a_, 3200);
  EXPECT_EQ(Truncate(held, 3140).cache.KeyRow(3139), held.cache.KeyRow(3139))
      << "chunks are shared";
  EXPECT_EQ(Truncate(held, 3080).cache.KeyRow(3071), held.cache.KeyRow(3071))
      << "a segment that becomes tail again is";
}

TEST_F(HeadCacheTest, RefusalLeavesNothingBehind) {
  const Held held = Append(Held(), a_, 1000);
  const uint64_t used = budget_.used_bytes();
  MemoryBudget tight(TailChunk::Bytes(kShape) * 2, std::chrono::milliseconds(50));
  auto grant = MemoryGrant::Make(tight, 0, "payload");
  const auto refused = held.cache.Append(1000, a_.Rows(1000, 4000), *grant, scratch_);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(tight.used_bytes(), 0U);
  EXPECT_EQ(budget_.used_bytes(), used);
  ExpectHolds(Append(held, b_, 1020), b_, 1000, 1020);
}

class LayerCacheTest : public testing::Test {
 protected:
  LayerCacheTest() {
    options_.workers = 2;
    pool_ = std::make_unique<ComputePool>(options_);
  }

  /// Appends on this thread, with the pool's idle workers.
  absl::StatusOr<int64_t> Append(LayerCache& layer, const Source& source, int64_t start,
                                 int64_t tokens) {
    index::Scratch scratch;
    // Two heads: the source's rows two by two.
    return layer.Append(
        {start, tokens, source.keys.data() + start * 32, source.values.data() + start * 48},
        budget_, {*pool_, scratch});
  }

  DaemonOptions options_;
  MemoryBudget budget_{uint64_t{1} << 30, std::chrono::milliseconds(50)};
  std::array<Strand, 2> sealing_;
  std::unique_ptr<ComputePool> pool_;
};

TEST_F(LayerCacheTest, SkipsWhatIsHeldAndRefusesGaps) {
  const Source source(3, 6000);
  LayerCache layer(LayerState::Empty(kShape, 2), absl::MakeSpan(sealing_));
  EXPECT_EQ(*Append(layer, source, 0, 100), 100);
  EXPECT_EQ(*Append(layer, source, 0, 100), 100);
  EXPECT_EQ(*Append(layer, source, 50, 100), 150);
  EXPECT_EQ(*Append(layer, source, 0, 20), 150);
  const auto gap = Append(layer, source, 151, 10);
  EXPECT_EQ(gap.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(layer.State()->tokens, 150);
}

TEST_F(LayerCacheTest, ReadersSeeWholeTokensWhileItGrows) {
  constexpr int64_t kTokens = 2900;
  const Source source(5, 2 * kTokens);
  LayerCache layer(LayerState::Empty(kShape, 2), absl::MakeSpan(sealing_));
  std::atomic<bool> stop{false};
  std::vector<std::thread> readers;
  for (int r = 0; r < 2; ++r) {
    readers.emplace_back([&] {
      int64_t seen = 0;
      while (!stop.load()) {
        const std::shared_ptr<const LayerState> state = layer.State();
        ASSERT_GE(state->tokens, seen);
        seen = state->tokens;
        for (int64_t p = std::max<int64_t>(0, seen - 130); p < seen; ++p) {
          for (int64_t h = 0; h < 2; ++h) {
            const HeadCache& head = state->Head(static_cast<size_t>(h));
            ASSERT_EQ(state->View(static_cast<size_t>(h)).Tokens(), seen);
            ASSERT_EQ(std::memcmp(head.KeyRow(p), source.keys.data() + (2 * p + h) * 16, 32), 0);
            ASSERT_EQ(std::memcmp(head.ValueRow(p), source.values.data() + (2 * p + h) * 24, 48),
                      0);
          }
        }
      }
    });
  }
  for (int64_t held = 0; held < kTokens;) {
    const int64_t count = std::min<int64_t>(1 + held % 40, kTokens - held);
    ASSERT_EQ(*Append(layer, source, held, count), held + count);
    held += count;
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
}

TEST_F(LayerCacheTest, ConcurrentForksOfOneTailStayApart) {
  const Source base(9, 2 * 1200);
  LayerCache parent(LayerState::Empty(kShape, 2), absl::MakeSpan(sealing_));
  ASSERT_TRUE(Append(parent, base, 0, 1100).ok());
  std::vector<std::unique_ptr<LayerCache>> forks;
  std::vector<std::unique_ptr<Source>> sources;
  for (uint32_t f = 0; f < 4; ++f) {
    forks.push_back(std::make_unique<LayerCache>(parent.State(), absl::MakeSpan(sealing_)));
    sources.push_back(std::make_unique<Source>(100 + f, 2 * 1300));
  }
  std::vector<std::thread> threads;
  for (size_t f = 0; f < forks.size(); ++f) {
    threads.emplace_back([&, f] {
      for (int64_t t = 1100; t < 1300; ++t) ASSERT_TRUE(Append(*forks[f], *sources[f], t, 1).ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t f = 0; f < forks.size(); ++f) {
    const auto state = forks[f]->State();
    for (int64_t p = 0; p < 1300; ++p) {
      const Source& expected = p < 1100 ? base : *sources[f];
      ASSERT_EQ(std::memcmp(state->Head(1).KeyRow(p), expected.keys.data() + (2 * p + 1) * 16, 32),
                0);
    }
  }
}

TEST_F(LayerCacheTest, SegmentsAreMadeBesideTheStepsAfterThem) {
  const Source source(11, 2 * 1200);
  LayerCache layer(LayerState::Empty(kShape, 2), absl::MakeSpan(sealing_));
  ASSERT_TRUE(Append(layer, source, 0, 1023).ok());
  ASSERT_TRUE(Append(layer, source, 1023, 1).ok());
  const auto state = layer.State();
  const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  for (size_t h = 0; h < 2; ++h) {
    ASSERT_NE(state->Head(h).pending(), nullptr);
    while (!state->Head(h).pending()->made()) {
      ASSERT_LT(std::chrono::steady_clock::now(), late);
      std::this_thread::yield();
    }
    EXPECT_EQ(state->View(h).SealedTokens(), 0) << "what is made is not shown before its time";
  }
  ASSERT_TRUE(Append(layer, source, 1024, 63).ok());
  EXPECT_EQ(layer.State()->View(1).SealedTokens(), 0);
  ASSERT_TRUE(Append(layer, source, 1087, 1).ok());
  index::Scratch scratch;
  for (size_t h = 0; h < 2; ++h) {
    ASSERT_EQ(layer.State()->View(h).segments.size(), 1U);
    EXPECT_EQ(layer.State()->View(h).segments[0], state->Head(h).pending()->Make(scratch));
  }
}

}  // namespace
}  // namespace kvseek::service
