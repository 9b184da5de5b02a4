// Answers taken apart: whatever the bytes say, there is a result of the promised shape or
// data_loss.
#include "client/decode_answers.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <random>

#include "proto/kvseek.pb.h"

namespace kvseek::client {
namespace {

constexpr ModelShape kShape{
    .layers = 1, .kv_heads = 2, .query_heads = 4, .key_dim = 8, .value_dim = 16};

Answer MakeAnswer(const std::string& metadata, const std::string& payload) {
  Answer answer;
  answer.metadata = metadata;
  answer.payload_bytes = payload.size();
  answer.payload = AllocatePayload(payload.size());  // exact: a sanitizer sees an over-read
  std::memcpy(answer.payload.get(), payload.data(), payload.size());
  return answer;
}

/// Parts one after another, each at its boundary.
class PayloadMaker {
 public:
  template <typename T>
  PayloadMaker& Add(const std::vector<T>& part) {
    const size_t offset = layout_.Add(part.size() * sizeof(T));
    if (part.empty()) return *this;
    bytes_.resize(layout_.bytes());
    std::memcpy(bytes_.data() + offset, part.data(), part.size() * sizeof(T));
    return *this;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  proto::PayloadLayout layout_;
  std::string bytes_;
};

template <typename T>
std::vector<T> Counting(size_t count, T first = 0) {
  std::vector<T> values(count);
  std::iota(values.begin(), values.end(), first);
  return values;
}

/// TopK of two items, of one and of two tokens: six results.
struct TopK {
  SearchShape shape{.items = {{1, 2, kShape}, {2, 2, kShape}},
                    .k = 3,
                    .with_positions = true,
                    .with_rows = true,
                    .with_state = true};
  std::vector<uint32_t> counts = {3, 2, 0, 1, 3, 3};
  std::vector<int64_t> positions = {1, 2, 3, 7, 9, 5, 0, 1, 2, 3, 4, 5};
  proto::TopKResponse message;
  std::string payload;

  TopK() {
    message.set_compute_us(321);
    for (const uint32_t count : counts) {
      message.add_position_counts(count);
      proto::Report& report = *message.add_reports();
      report.add_missed_mass(0.25F);
      report.add_missed_mass(0.5F);
      report.set_index(proto::INDEX_LADDER);
      report.set_reused(count == 0);
    }
    PayloadMaker maker;
    maker.Add(positions);
    maker.Add(Counting<uint16_t>(5 * 8)).Add(Counting<uint16_t>(7 * 8, 1000));
    maker.Add(Counting<uint16_t>(5 * 16, 2000)).Add(Counting<uint16_t>(7 * 16, 3000));
    maker.Add(Counting<float>(1 * 4 * 16)).Add(Counting<float>(4, 500));
    maker.Add(Counting<float>(2 * 4 * 16, 1000)).Add(Counting<float>(8, 600));
    payload = maker.bytes();
  }
  absl::StatusOr<SearchResponse> Decode() const {
    return DecodeSearch(shape, MakeAnswer(message.SerializeAsString(), payload));
  }
};

TEST(DecodeAnswersTest, TopKIsTakenApart) {
  const auto response = TopK().Decode();
  ASSERT_TRUE(response.ok()) << response.status();
  EXPECT_EQ(response->daemon_us, 321U);
  ASSERT_EQ(response->items.size(), 2U);
  const ItemResult& first = response->items[0];
  const ItemResult& second = response->items[1];
  EXPECT_THAT(first.selections[0].positions, testing::ElementsAre(1, 2, 3));
  EXPECT_THAT(first.selections[1].positions, testing::ElementsAre(7, 9));
  EXPECT_THAT(second.selections[0].positions, testing::IsEmpty());
  EXPECT_THAT(second.selections[1].positions, testing::ElementsAre(5));
  EXPECT_THAT(second.selections[3].positions, testing::ElementsAre(3, 4, 5));
  EXPECT_EQ(first.selections[1].keys, Counting<uint16_t>(16, 24));
  EXPECT_EQ(second.selections[1].keys, Counting<uint16_t>(8, 1000));
  EXPECT_EQ(second.selections[2].values, Counting<uint16_t>(48, 3016));
  EXPECT_EQ(first.out, Counting<float>(64));
  EXPECT_EQ(second.lse, Counting<float>(8, 600));
  EXPECT_EQ(second.reports.size(), 4U);
  EXPECT_EQ(second.reports[3].index, IndexKind::kLadder);
  EXPECT_TRUE(second.reports[0].reused);
  EXPECT_FALSE(second.reports[1].reused);
  EXPECT_THAT(second.reports[3].missed_mass, testing::ElementsAre(0.25F, 0.5F));
}

TEST(DecodeAnswersTest, PayloadsOfAnyOtherLengthAreDataLoss) {
  TopK top;
  const std::string whole = top.payload;
  for (size_t bytes = 0; bytes < whole.size() + 70; ++bytes) {
    if (bytes == whole.size()) continue;
    top.payload = whole;
    top.payload.resize(bytes);
    EXPECT_EQ(top.Decode().status().code(), absl::StatusCode::kDataLoss) << bytes;
  }
}

TEST(DecodeAnswersTest, CountsThatDoNotFitAreDataLoss) {
  const auto code = [](const std::function<void(TopK&)>& change) {
    TopK top;
    change(top);
    return top.Decode().status().code();
  };
  constexpr absl::StatusCode kDataLoss = absl::StatusCode::kDataLoss;
  EXPECT_EQ(code([](TopK& top) { top.message.add_position_counts(0); }), kDataLoss);
  EXPECT_EQ(code([](TopK& top) { top.message.add_reports(); }), kDataLoss);
  EXPECT_EQ(code([](TopK& top) { top.message.clear_reports(); }), kDataLoss);
  EXPECT_EQ(code([](TopK& top) { top.message.set_position_counts(0, 4); }), kDataLoss);
  EXPECT_EQ(code([](TopK& top) { top.message.set_position_counts(0, 0xffffffffU); }), kDataLoss);
  EXPECT_EQ(code([](TopK& top) { top.message.mutable_reports(0)->add_missed_mass(0); }), kDataLoss);
  EXPECT_EQ(code([](TopK& top) { top.shape.with_rows = false; }), kDataLoss);
  EXPECT_EQ(code([](TopK& top) { top.shape.items[0].tokens = 1U << 31; }), kDataLoss);
  EXPECT_EQ(code([](TopK& top) {  // not ascending
              const int64_t position = 100;
              std::memcpy(top.payload.data(), &position, sizeof(position));
            }),
            kDataLoss);
  EXPECT_EQ(code([](TopK& top) { top.payload[7] = '\x80'; }), kDataLoss);  // negative
}

TEST(DecodeAnswersTest, ShapesBeyondAllBoundsAreDataLoss) {
  TopK top;
  top.shape.k = 0xffffffffU;
  for (SearchShape::Item& item : top.shape.items) item.shape.key_dim = 0xffffffffU;
  EXPECT_EQ(top.Decode().status().code(), absl::StatusCode::kDataLoss);
  const Answer nothing = MakeAnswer("", "");
  ModelShape huge = kShape;
  huge.key_dim = huge.value_dim = 0xffffffffU;
  EXPECT_EQ(DecodeFetchRows(huge, ~size_t{0}, nothing).status().code(),
            absl::StatusCode::kDataLoss);
}

TEST(DecodeAnswersTest, AttendWithAndWithoutTheListOfKeysRead) {
  SearchShape shape{.items = {{1, 2, kShape}}};
  proto::AttendResponse message;
  for (int i = 0; i < 2; ++i) message.add_reports();
  PayloadMaker maker;
  maker.Add(Counting<float>(64)).Add(Counting<float>(4));
  auto plain = DecodeSearch(shape, MakeAnswer(message.SerializeAsString(), maker.bytes()));
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_EQ(plain->items[0].out, Counting<float>(64));
  EXPECT_TRUE(plain->items[0].selections.empty());

  shape.with_positions = true;
  message.add_position_counts(2);
  message.add_position_counts(3);
  maker.Add(std::vector<int64_t>{4, 5, 1, 2, 3});
  const auto listed = DecodeSearch(shape, MakeAnswer(message.SerializeAsString(), maker.bytes()));
  ASSERT_TRUE(listed.ok()) << listed.status();
  EXPECT_THAT(listed->items[0].selections[0].positions, testing::ElementsAre(4, 5));
  EXPECT_THAT(listed->items[0].selections[1].positions, testing::ElementsAre(1, 2, 3));
}

TEST(DecodeAnswersTest, AnswersOfSomeHeadsHaveNoOthers) {
  const SearchShape shape{.items = {{3, 1, kShape}}};
  proto::AttendResponse message;
  for (int i = 0; i < 3; ++i) message.add_reports();
  PayloadMaker maker;
  maker.Add(Counting<float>(3 * 2 * 16)).Add(Counting<float>(3 * 2));
  const auto response = DecodeSearch(shape, MakeAnswer(message.SerializeAsString(), maker.bytes()));
  ASSERT_TRUE(response.ok()) << response.status();
  EXPECT_EQ(response->items[0].out, Counting<float>(96));
  EXPECT_EQ(response->items[0].lse, Counting<float>(6));
  EXPECT_EQ(response->items[0].reports.size(), 3U);
  EXPECT_EQ(response->daemon_us, 0U) << "a daemon that does not say";
  message.add_reports();
  EXPECT_EQ(
      DecodeSearch(shape, MakeAnswer(message.SerializeAsString(), maker.bytes())).status().code(),
      absl::StatusCode::kDataLoss);
}

TEST(DecodeAnswersTest, CopiesOfAResponseKeepItsTensors) {
  SearchResponse copy;
  const float* place = nullptr;
  {
    const auto response = TopK().Decode();
    ASSERT_TRUE(response.ok()) << response.status();
    place = response->items[0].out.data();
    copy = *response;
  }
  EXPECT_EQ(copy.items[0].out.data(), place);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(place) % proto::kPayloadAlignment, 0U);
  EXPECT_EQ(copy.items[0].out, Counting<float>(64));
  EXPECT_EQ(copy.items[1].selections[2].values, Counting<uint16_t>(48, 3016));
}

TEST(DecodeAnswersTest, RowsOfPositionsHeldDoNotCome) {
  TopK top;
  const std::vector<uint32_t> held = {0, 2, 3, 8, 9, 10, 6};  // of {1, 2, 3} and {7, 9}
  top.shape.items[0].held = held;
  top.shape.items[0].held_counts = {3, 4};
  top.payload = PayloadMaker()
                    .Add(top.positions)
                    .Add(Counting<uint16_t>(2 * 8))
                    .Add(Counting<uint16_t>(7 * 8, 1000))
                    .Add(Counting<uint16_t>(2 * 16, 2000))
                    .Add(Counting<uint16_t>(7 * 16, 3000))
                    .Add(Counting<float>(1 * 4 * 16))
                    .Add(Counting<float>(4, 500))
                    .Add(Counting<float>(2 * 4 * 16, 1000))
                    .Add(Counting<float>(8, 600))
                    .bytes();
  const auto response = top.Decode();
  ASSERT_TRUE(response.ok()) << response.status();
  const std::vector<Selection>& first = response->items[0].selections;
  EXPECT_THAT(first[0].positions, testing::ElementsAre(1, 2, 3));
  EXPECT_EQ(first[0].keys, Counting<uint16_t>(8));
  EXPECT_THAT(first[1].positions, testing::ElementsAre(7, 9));
  EXPECT_EQ(first[1].keys, Counting<uint16_t>(8, 8));
  EXPECT_EQ(first[1].values, Counting<uint16_t>(16, 2016));
  EXPECT_EQ(response->items[1].selections[1].keys, Counting<uint16_t>(8, 1000));
  EXPECT_EQ(response->items[1].lse, Counting<float>(8, 600));
  top.payload = TopK().payload;  // rows of all positions
  EXPECT_EQ(top.Decode().status().code(), absl::StatusCode::kDataLoss);
}

TEST(DecodeAnswersTest, BytesAtRandomNeverDoHarm) {
  std::mt19937_64 random(11);
  const TopK whole;
  const std::string metadata = whole.message.SerializeAsString();
  for (int round = 0; round < 20000; ++round) {
    std::string changed = metadata;
    for (uint64_t flips = 1 + random() % 4; flips > 0; --flips) {
      changed[random() % changed.size()] = static_cast<char>(random());
    }
    const auto response = DecodeSearch(whole.shape, MakeAnswer(changed, whole.payload));
    if (!response.ok()) {
      EXPECT_EQ(response.status().code(), absl::StatusCode::kDataLoss);
      continue;
    }
    for (const ItemResult& item : response->items) {  // what is accepted has the right shapes
      for (const Selection& selection : item.selections) {
        EXPECT_EQ(selection.keys.size(), selection.positions.size() * kShape.key_dim);
        EXPECT_EQ(selection.values.size(), selection.positions.size() * kShape.value_dim);
      }
    }
    const Answer answer = MakeAnswer(changed, whole.payload);
    DecodeStats(answer).status().IgnoreError();
    DecodeOpen(kShape, answer).status().IgnoreError();
    DecodeAppend(answer).status().IgnoreError();
    DecodeHealth(answer).IgnoreError();
  }
}

}  // namespace
}  // namespace kvseek::client
