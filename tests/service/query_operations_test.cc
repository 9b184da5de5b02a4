// Searches for a part of what a session holds answer the same part of what they answer for all of
// it, bit for bit.
#include "service/query_operations.h"

#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <random>
#include <set>
#include <utility>

#include "client/decode_answers.h"
#include "client/encode_requests.h"
#include "tests/service/service_fixture.h"

namespace kvseek::service {
namespace {

constexpr ModelShape kShape{
    .layers = 1, .kv_heads = 5, .query_heads = 15, .key_dim = 16, .value_dim = 24};
constexpr uint32_t kTokens = 2500;

/// Bits, so that -0 and NaN count too.
std::vector<uint8_t> Bits(absl::Span<const float> values) {
  const absl::Span<const uint8_t> bytes = AsBytes(values);
  return {bytes.begin(), bytes.end()};
}

class QueryOperationsTest : public testing::TestWithParam<uint64_t> {
 protected:
  void SetUp() override {
    proto::ModelShape shape = SmallShape();
    shape.set_layers(kShape.layers);
    shape.set_kv_heads(kShape.kv_heads);
    shape.set_query_heads(kShape.query_heads);
    for (uint32_t s = 0; s < 2; ++s) {
      const proto::SessionRef ref = OpenSession(service_, shape);
      ASSERT_TRUE(AppendRows(service_, ref, 0, 0, kTokens, RandomRows(s, shape, kTokens)).ok());
      sessions_.push_back({ref.boot_id(), ref.session_id(), kShape});
    }
  }

  uint32_t Below(uint32_t count) {
    return std::uniform_int_distribution<uint32_t>(0, count - 1)(random_);
  }

  /// An item for all heads, of one to three tokens with ranges of any length.
  QueryItem AnyItem() {
    QueryItem item{.session = sessions_[Below(2)], .tokens = 1 + Below(3)};
    item.range_begin = Below(2) == 0 ? 0 : Below(kTokens);
    for (uint32_t t = 0; t < item.tokens; ++t) {
      const auto length = static_cast<uint32_t>(kTokens - item.range_begin);
      item.range_end.push_back(item.range_begin + (Below(2) == 0 ? length : Below(length + 1)));
    }
    queries_.push_back(reference::RandomFloats(
        Below(1U << 30), size_t{item.tokens} * kShape.query_heads * kShape.key_dim, 1.0F));
    item.queries = AsBytes(queries_.back());
    return item;
  }

  /// Some of the heads, ascending.
  std::vector<uint32_t> SomeHeads() {
    std::vector<uint32_t> heads;
    for (uint32_t head = 0; head < kShape.kv_heads; ++head) {
      if (Below(2) == 0) heads.push_back(head);
    }
    if (heads.empty()) heads.push_back(Below(kShape.kv_heads));
    return heads;
  }

  /// The same item for `heads` only.
  QueryItem ForHeads(QueryItem item, const std::vector<uint32_t>& heads) {
    const size_t row = size_t{kShape.Group()} * kShape.key_dim;
    const auto* all = reinterpret_cast<const float*>(item.queries.data());
    std::vector<float> queries;
    for (uint32_t t = 0; t < item.tokens; ++t) {
      for (const uint32_t head : heads) {
        const float* from = all + (size_t{t} * kShape.kv_heads + head) * row;
        queries.insert(queries.end(), from, from + row);
      }
    }
    queries_.push_back(std::move(queries));
    item.queries = AsBytes(queries_.back());
    item.kv_heads = heads;
    return item;
  }

  SearchOptions AnyOptions() {
    return {.index = Below(2) == 0 ? IndexKind::kExact : IndexKind::kLadder,
            .candidates = 128,
            .exact_rows = 8,
            .audit_samples = Below(2) * 16,
            .seed = random_()};
  }

  SearchResponse Ask(const AttendRequest& request) {
    return Answered(client::EncodeAttend(request), client::ShapeOf(request));
  }
  SearchResponse Ask(const TopKRequest& request) {
    return Answered(client::EncodeTopK(request), client::ShapeOf(request));
  }

  uint64_t Searches() {
    const auto stats = service_.Call(proto::StatsRequest());
    for (const proto::Counter& counter : stats.message.counters()) {
      if (counter.name() == "searches") return counter.value();
    }
    return 0;
  }

  Service service_;
  std::mt19937_64 random_{GetParam()};
  std::vector<kvseek::Session> sessions_;
  std::deque<std::vector<float>> queries_;  ///< what items point at

 private:
  SearchResponse Answered(absl::StatusOr<client::Message> message,
                          const client::SearchShape& shape) {
    EXPECT_TRUE(message.ok()) << message.status();
    if (!message.ok()) return {};
    message->BringTogether();
    Payload payload = MakePayload(message->payload.size());
    std::memcpy(payload.data.get(), message->payload.data(), payload.bytes);
    const Response response =
        service_.Start(message->op, message->metadata, std::move(payload)).get();
    EXPECT_FALSE(response.error) << response.metadata;
    client::Answer answer;
    answer.metadata = response.metadata;
    answer.payload_bytes = response.payload.bytes;
    answer.payload = client::AllocatePayload(answer.payload_bytes);
    std::memcpy(answer.payload.get(), response.payload.data.get(), answer.payload_bytes);
    auto decoded = client::DecodeSearch(shape, answer);
    EXPECT_TRUE(decoded.ok()) << decoded.status();
    return decoded.ok() ? *std::move(decoded) : SearchResponse();
  }
};

/// A result, and what its state points into.
struct Part {
  ItemResult item;
  std::vector<float> out, lse;
};

/// The part of an answer for all heads that belongs to `heads`.
Part PartOf(const ItemResult& all, uint32_t tokens, const std::vector<uint32_t>& heads) {
  Part part;
  const auto append = [](std::vector<float>& to, absl::Span<const float> from, size_t row,
                         size_t width) {
    if (from.empty()) return;
    const auto begin = from.begin() + static_cast<ptrdiff_t>(row * width);
    to.insert(to.end(), begin, begin + static_cast<ptrdiff_t>(width));
  };
  for (uint32_t t = 0; t < tokens; ++t) {
    for (const uint32_t head : heads) {
      const size_t row = size_t{t} * kShape.kv_heads + head;
      append(part.out, all.out, row, size_t{kShape.Group()} * kShape.value_dim);
      append(part.lse, all.lse, row, kShape.Group());
      part.item.reports.push_back(all.reports[row]);
      if (!all.selections.empty()) part.item.selections.push_back(all.selections[row]);
    }
  }
  part.item.out = part.out;
  part.item.lse = part.lse;
  return part;
}

void ExpectSame(const ItemResult& got, const ItemResult& expected) {
  EXPECT_EQ(Bits(got.out), Bits(expected.out));
  EXPECT_EQ(Bits(got.lse), Bits(expected.lse));
  ASSERT_EQ(got.selections.size(), expected.selections.size());
  for (size_t i = 0; i < got.selections.size(); ++i) {
    EXPECT_EQ(got.selections[i].positions, expected.selections[i].positions);
    EXPECT_EQ(got.selections[i].keys, expected.selections[i].keys);
    EXPECT_EQ(got.selections[i].values, expected.selections[i].values);
  }
  ASSERT_EQ(got.reports.size(), expected.reports.size());
  for (size_t i = 0; i < got.reports.size(); ++i) {
    EXPECT_EQ(got.reports[i].keys_scanned, expected.reports[i].keys_scanned);
    EXPECT_EQ(got.reports[i].bytes_touched, expected.reports[i].bytes_touched);
    EXPECT_EQ(Bits(got.reports[i].missed_mass), Bits(expected.reports[i].missed_mass));
    EXPECT_EQ(Bits(got.reports[i].missed_high), Bits(expected.reports[i].missed_high));
  }
}

TEST_P(QueryOperationsTest, AttendForSomeHeadsIsThatPartOfAttendForAll) {
  for (int round = 0; round < 8; ++round) {
    AttendRequest all{.items = {AnyItem(), AnyItem(), AnyItem()}, .options = AnyOptions()};
    all.options.list_read = Below(2) == 0;
    AttendRequest some = all;
    some.items[0] = ForHeads(some.items[0], SomeHeads());
    some.items[2] = ForHeads(some.items[2], SomeHeads());
    const SearchResponse whole = Ask(all);
    const uint64_t before = Searches();
    const SearchResponse part = Ask(some);
    ASSERT_EQ(part.items.size(), 3U);
    uint64_t asked = 0;
    for (size_t i = 0; i < 3; ++i) {
      std::vector<uint32_t> heads = some.items[i].kv_heads;
      if (heads.empty()) heads = {0, 1, 2, 3, 4};
      ExpectSame(part.items[i], PartOf(whole.items[i], some.items[i].tokens, heads).item);
      asked += some.items[i].tokens * heads.size();
    }
    EXPECT_EQ(Searches() - before, asked) << "heads that are not asked for cost nothing";
  }
}

TEST_P(QueryOperationsTest, TopKForSomeHeadsIsThatPartOfTopKForAll) {
  for (int round = 0; round < 8; ++round) {
    const TopKRequest all{.items = {AnyItem(), AnyItem()},
                          .options = AnyOptions(),
                          .k = Below(300),
                          .with_rows = Below(4) != 0,
                          .with_state = Below(4) != 0};
    TopKRequest some = all;
    for (QueryItem& item : some.items) item = ForHeads(item, SomeHeads());
    const SearchResponse whole = Ask(all);
    const SearchResponse part = Ask(some);
    ASSERT_EQ(part.items.size(), 2U);
    for (size_t i = 0; i < 2; ++i) {
      ExpectSame(part.items[i],
                 PartOf(whole.items[i], some.items[i].tokens, some.items[i].kv_heads).item);
    }
  }
}

/// Lists of held positions for an item: some of those that it is going to get, and some others.
struct Held {
  std::vector<uint32_t> positions;
  std::vector<uint32_t> counts;
};

TEST_P(QueryOperationsTest, RowsHeldDoNotTravelAndTheRestIsAsBefore) {
  for (int round = 0; round < 8; ++round) {
    TopKRequest full{.items = {AnyItem(), AnyItem(), AnyItem()},
                     .options = AnyOptions(),
                     .k = Below(4) == 0 ? kTokens : Below(300)};
    full.items[1] = ForHeads(full.items[1], SomeHeads());
    const SearchResponse whole = Ask(full);
    TopKRequest request = full;
    std::vector<Held> held(3);
    for (size_t i = 0; i < 3; ++i) {
      if (i == 2 && Below(2) == 0) continue;  // an item that holds nothing
      for (const Selection& selection : whole.items[i].selections) {
        std::set<uint32_t> list;
        const uint32_t share = 1 + Below(4);
        for (const int64_t position : selection.positions) {
          if (Below(share) == 0) list.insert(static_cast<uint32_t>(position));
        }
        for (uint32_t others = Below(50); others > 0; --others) list.insert(Below(kTokens));
        if (Below(6) == 0) list.clear();
        held[i].positions.insert(held[i].positions.end(), list.begin(), list.end());
        held[i].counts.push_back(static_cast<uint32_t>(list.size()));
      }
      request.items[i].held = held[i].positions;
      request.items[i].held_counts = held[i].counts;
    }
    const SearchResponse part = Ask(request);
    ASSERT_EQ(part.items.size(), 3U);
    for (size_t i = 0; i < 3; ++i) {
      ItemResult expected = whole.items[i];
      std::deque<std::vector<uint16_t>> rows;
      auto next = held[i].positions.begin();
      for (size_t s = 0; s < held[i].counts.size(); ++s) {
        const std::set<int64_t> list(next, next + held[i].counts[s]);
        next += held[i].counts[s];
        const Selection& all = whole.items[i].selections[s];
        std::vector<uint16_t>& keys = rows.emplace_back();
        std::vector<uint16_t>& values = rows.emplace_back();
        for (size_t p = 0; p < all.positions.size(); ++p) {
          if (list.contains(all.positions[p])) continue;
          const auto row = [p](absl::Span<const uint16_t> from, size_t width,
                               std::vector<uint16_t>& to) {
            const auto begin = from.begin() + static_cast<ptrdiff_t>(p * width);
            to.insert(to.end(), begin, begin + static_cast<ptrdiff_t>(width));
          };
          row(all.keys, kShape.key_dim, keys);
          row(all.values, kShape.value_dim, values);
        }
        expected.selections[s].keys = keys;
        expected.selections[s].values = values;
      }
      ExpectSame(part.items[i], expected);
    }
  }
}

TEST_P(QueryOperationsTest, PositionsHeldChangeNothingWithoutRows) {
  TopKRequest request{.items = {AnyItem()}, .options = AnyOptions(), .k = 20, .with_rows = false};
  const SearchResponse whole = Ask(request);
  const std::vector<uint32_t> counts(request.items[0].tokens * kShape.kv_heads, 1);
  const std::vector<uint32_t> held(counts.size(), kTokens - 1);
  request.items[0].held = held;
  request.items[0].held_counts = counts;
  ExpectSame(Ask(request).items[0], whole.items[0]);
}

INSTANTIATE_TEST_SUITE_P(Seeds, QueryOperationsTest, testing::Values(1, 2, 3));

}  // namespace
}  // namespace kvseek::service
