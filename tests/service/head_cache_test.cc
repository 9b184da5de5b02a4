#include "service/head_cache.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

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

class HeadCacheTest : public testing::Test {
 protected:
  HeadCache Append(const HeadCache& cache, const Source& source, int64_t end) {
    auto grant = MemoryGrant::Make(budget_, cache.AppendBytes(end - cache.tokens()), "payload");
    auto next = cache.Append(source.Rows(cache.tokens(), end), *grant, scratch_);
    EXPECT_TRUE(next.ok()) << next.status();
    scratch_.Reset();
    return *std::move(next);
  }
  HeadCache Truncate(const HeadCache& cache, int64_t tokens) {
    auto grant = MemoryGrant::Make(budget_, cache.TruncateBytes(tokens), "tokens");
    auto next = cache.Truncate(tokens, *grant);
    EXPECT_TRUE(next.ok()) << next.status();
    return *std::move(next);
  }
  /// Positions [begin, end) hold the source's rows, looked up and in the view.
  static void ExpectHolds(const HeadCache& cache, const Source& source, int64_t begin,
                          int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      ASSERT_EQ(std::memcmp(cache.KeyRow(p), source.keys.data() + p * 16, 32), 0) << p;
      ASSERT_EQ(std::memcmp(cache.ValueRow(p), source.values.data() + p * 24, 48), 0) << p;
    }
    const index::KvView view = cache.View();
    ASSERT_EQ(view.Tokens(), cache.tokens());
    for (size_t i = 0; i + 1 < view.tail.size(); ++i) {
      ASSERT_EQ(view.tail[i].tokens, index::kTailChunkTokens);
    }
    ASSERT_LT(view.Tokens() - view.SealedTokens(), index::kSegmentTokens);
  }

  MemoryBudget budget_{uint64_t{1} << 30, std::chrono::milliseconds(50)};
  index::Scratch scratch_;
  const Source a_{1};
  const Source b_{1000};
};

TEST_F(HeadCacheTest, HoldsWhatIsAppendedInAnyCut) {
  for (const int64_t step : {1, 63, 64, 65, 1000, 1023, 1024, 1025, 3000}) {
    HeadCache cache(kShape);
    for (int64_t end = 0; end < 5000; end = std::min<int64_t>(end + step, 5000)) {
      cache = Append(cache, a_, std::min<int64_t>(end + step, 5000));
    }
    EXPECT_EQ(cache.tokens(), 5000);
    EXPECT_EQ(cache.View().segments.size(), 4U);
    ExpectHolds(cache, a_, 0, 5000);
    EXPECT_EQ(budget_.used_bytes(), HeadCache::Bytes(kShape, 5000));
  }
  EXPECT_EQ(budget_.used_bytes(), 0U);
}

TEST_F(HeadCacheTest, GathersOneHeadOutOfMany) {
  const Source three(7, 3 * 1100);
  HeadCache cache(kShape);
  auto grant = MemoryGrant::Make(budget_, 0, "payload");
  const StridedRows middle{1100, three.keys.data() + 16, three.values.data() + 24, 48, 72};
  auto grown = cache.Append(middle, *grant, scratch_);
  ASSERT_TRUE(grown.ok());
  for (int64_t p = 0; p < 1100; ++p) {
    ASSERT_EQ(std::memcmp(grown->KeyRow(p), three.keys.data() + (3 * p + 1) * 16, 32), 0);
    ASSERT_EQ(std::memcmp(grown->ValueRow(p), three.values.data() + (3 * p + 1) * 24, 48), 0);
  }
}

TEST_F(HeadCacheTest, AppendsInPlaceWhileItMay) {
  const HeadCache ten = Append(HeadCache(kShape), a_, 10);
  const HeadCache twenty = Append(ten, a_, 20);
  EXPECT_EQ(ten.KeyRow(0), twenty.KeyRow(0));
  EXPECT_EQ(ten.tokens(), 10);
  EXPECT_EQ(budget_.used_bytes(), TailChunk::Bytes(kShape));
  EXPECT_EQ(ten.AppendBytes(1), TailChunk::Bytes(kShape)) << "the place is taken";
  EXPECT_EQ(twenty.AppendBytes(1), 0U);
}

TEST_F(HeadCacheTest, ForkCopiesNothingAndGrowsApart) {
  const HeadCache parent = Append(HeadCache(kShape), a_, 2100);
  const uint64_t used = budget_.used_bytes();
  const HeadCache fork = parent;  // NOLINT(performance-unnecessary-copy-initialization)
  EXPECT_EQ(budget_.used_bytes(), used);
  EXPECT_EQ(fork.View().segments.data(), parent.View().segments.data());
  EXPECT_EQ(fork.KeyRow(2099), parent.KeyRow(2099));

  const HeadCache left = Append(parent, a_, 2105);
  const HeadCache right = Append(fork, b_, 2110);
  EXPECT_EQ(left.KeyRow(2099), parent.KeyRow(2099)) << "the first to append stays in place";
  EXPECT_NE(right.KeyRow(2099), parent.KeyRow(2099));
  EXPECT_EQ(budget_.used_bytes(), used + TailChunk::Bytes(kShape));
  ExpectHolds(parent, a_, 0, 2100);
  ExpectHolds(left, a_, 0, 2105);
  ExpectHolds(right, a_, 0, 2100);
  ExpectHolds(right, b_, 2100, 2110);
  EXPECT_EQ(left.View().segments[0], right.View().segments[0]);
}

TEST_F(HeadCacheTest, TruncatesInTailAndSegments) {
  const HeadCache cache = Append(HeadCache(kShape), a_, 3200);
  for (const int64_t kept :
       {0, 1, 64, 500, 1023, 1024, 1025, 2048, 3071, 3072, 3073, 3136, 3199, 3200, 4000}) {
    const int64_t expected = std::min<int64_t>(kept, 3200);
    const HeadCache cut = Truncate(cache, kept);
    EXPECT_EQ(cut.tokens(), expected);
    ExpectHolds(cut, a_, 0, expected);
    const HeadCache grown = Append(cut, b_, 4200);
    ExpectHolds(grown, a_, 0, expected);
    ExpectHolds(grown, b_, expected, 4200);
    ExpectHolds(cache, a_, 0, 3200);
  }
  EXPECT_EQ(Truncate(cache, 3100).KeyRow(3099), cache.KeyRow(3099)) << "chunks are shared";
}

TEST_F(HeadCacheTest, RefusalLeavesNothingBehind) {
  const HeadCache cache = Append(HeadCache(kShape), a_, 1000);
  const uint64_t used = budget_.used_bytes();
  MemoryBudget tight(TailChunk::Bytes(kShape) * 2, std::chrono::milliseconds(50));
  auto grant = MemoryGrant::Make(tight, 0, "payload");
  const auto refused = cache.Append(a_.Rows(1000, 4000), *grant, scratch_);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(tight.used_bytes(), 0U);
  EXPECT_EQ(budget_.used_bytes(), used);
  ExpectHolds(Append(cache, b_, 1020), b_, 1000, 1020);
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
  std::unique_ptr<ComputePool> pool_;
};

TEST_F(LayerCacheTest, SkipsWhatIsHeldAndRefusesGaps) {
  const Source source(3, 6000);
  LayerCache layer(LayerState::Empty(kShape, 2));
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
  LayerCache layer(LayerState::Empty(kShape, 2));
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
            const HeadCache& head = state->heads[static_cast<size_t>(h)];
            ASSERT_EQ(head.tokens(), seen);
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
  LayerCache parent(LayerState::Empty(kShape, 2));
  ASSERT_TRUE(Append(parent, base, 0, 1100).ok());
  std::vector<std::unique_ptr<LayerCache>> forks;
  std::vector<std::unique_ptr<Source>> sources;
  for (uint32_t f = 0; f < 4; ++f) {
    forks.push_back(std::make_unique<LayerCache>(parent.State()));
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
      ASSERT_EQ(std::memcmp(state->heads[1].KeyRow(p), expected.keys.data() + (2 * p + 1) * 16, 32),
                0);
    }
  }
}

}  // namespace
}  // namespace kvseek::service
