// Requests laid out: fields travel, parts start where the protocol wants them.
#include "client/encode_requests.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "client/channel_link.h"
#include "proto/kvseek.pb.h"

namespace kvseek::client {
namespace {

constexpr ModelShape kShape{
    .layers = 1, .kv_heads = 2, .query_heads = 4, .key_dim = 8, .value_dim = 16};

template <typename T>
std::vector<T> Counting(size_t count, T first = 0) {
  std::vector<T> values(count);
  std::iota(values.begin(), values.end(), first);
  return values;
}

absl::StatusOr<Message> EncodeOne(uint32_t tokens, absl::Span<const uint16_t> keys,
                                  absl::Span<const uint16_t> values) {
  const LayerTensors layer{keys, values};
  return EncodeAppend({.shape = kShape}, 0, 0, tokens, {&layer, 1});
}

TEST(EncodeRequestsTest, OnePartIsSentFromWhereItIs) {
  const std::vector<float> queries(4 * 8);
  const auto bytes = AsBytes(absl::MakeConstSpan(queries));
  const AttendRequest one{.items = {{.session = {.shape = kShape}, .queries = bytes}}};
  const auto message = EncodeAttend(one);
  ASSERT_TRUE(message.ok()) << message.status();
  EXPECT_EQ(message->payload.data(), bytes.data());
  EXPECT_EQ(message->owned, nullptr);
}

TEST(EncodeRequestsTest, PartsStartAtBoundaries) {
  const std::vector<uint16_t> keys = Counting<uint16_t>(3 * 2 * 8, 1);
  const std::vector<uint16_t> values = Counting<uint16_t>(3 * 2 * 16, 100);
  auto message = EncodeOne(3, keys, values);
  ASSERT_TRUE(message.ok()) << message.status();
  message->BringTogether();
  ASSERT_EQ(message->payload.size(), 128U + 192U);
  EXPECT_EQ(std::memcmp(message->payload.data(), keys.data(), 96), 0);
  for (size_t i = 96; i < 128; ++i) EXPECT_EQ(message->payload[i], 0);
  EXPECT_EQ(std::memcmp(message->payload.data() + 128, values.data(), 192), 0);
}

TEST(EncodeRequestsTest, PartsThatStandAsTheyTravelAreNotCopied) {
  // Two KV heads of 8 elements: 4 tokens are 128 bytes of keys, 3 tokens 96.
  const std::vector<uint16_t> rows = Counting<uint16_t>(4 * 2 * (8 + 16), 1);
  const auto all = absl::MakeConstSpan(rows);
  const auto whole = EncodeOne(4, all.first(64), all.subspan(64, 128));
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_EQ(static_cast<const void*>(whole->payload.data()), rows.data());
  EXPECT_EQ(whole->payload.size(), 128U + 256U);
  // The boundary leaves a gap behind these keys.
  auto gap = EncodeOne(3, all.first(48), all.subspan(48, 96));
  ASSERT_TRUE(gap.ok()) << gap.status();
  gap->BringTogether();
  EXPECT_NE(static_cast<const void*>(gap->payload.data()), rows.data());
  EXPECT_EQ(std::memcmp(gap->payload.data() + 128, rows.data() + 48, 192), 0);
}

TEST(EncodeRequestsTest, LayersFollowEachOther) {
  Session session{.shape = kShape};
  session.shape.layers = 4;
  const std::vector<uint16_t> keys = Counting<uint16_t>(3 * 2 * 8, 1);
  const std::vector<uint16_t> values = Counting<uint16_t>(3 * 2 * 16, 100);
  const std::vector<LayerTensors> layers = {{keys, values}, {keys, values}};
  auto message = EncodeAppend(session, 2, 0, 3, layers);
  ASSERT_TRUE(message.ok()) << message.status();
  proto::AppendRequest request;
  ASSERT_TRUE(request.ParseFromString(message->metadata));
  EXPECT_EQ(request.layer(), 2U);
  EXPECT_EQ(request.layers(), 2U);
  EXPECT_EQ(message->owned, nullptr) << "sent from where they stand";
  message->BringTogether();
  ASSERT_EQ(message->payload.size(), 2 * (128U + 192U));
  for (const size_t at : {0U, 320U}) {
    EXPECT_EQ(std::memcmp(message->payload.data() + at, keys.data(), 96), 0);
    EXPECT_EQ(std::memcmp(message->payload.data() + at + 128, values.data(), 192), 0);
  }
  EXPECT_EQ(ErrorField(EncodeAppend(session, 3, 0, 3, layers).status()), "layers");
  EXPECT_EQ(ErrorField(EncodeAppend(session, 3, 0, 3, {}).status()), "layers");
  const std::vector<LayerTensors> uneven = {{keys, values}, {keys, keys}};
  EXPECT_EQ(ErrorField(EncodeAppend(session, 0, 0, 3, uneven).status()), "layers[1].values");
}

TEST(EncodeRequestsTest, AFrameInPartsIsTheFrameInOne) {
  const std::vector<uint16_t> keys = Counting<uint16_t>(3 * 2 * 8, 1);
  const std::vector<uint16_t> values = Counting<uint16_t>(3 * 2 * 16, 100);
  const auto make = [&](bool checked) {
    auto message = EncodeOne(3, keys, values);
    OutFrame frame = OutFrame::Prepare(*std::move(message), Clock::now() + std::chrono::hours(1));
    frame.Seal(checked);
    return frame;
  };
  const auto text = [](const OutFrame& frame) {
    std::string bytes;
    for (const auto& part : frame.Rest()) {
      bytes.append(static_cast<const char*>(part.data()), part.size());
    }
    return bytes;
  };
  OutFrame apart = make(/*checked=*/false);
  const std::string all = text(apart);
  ASSERT_EQ(all.size(), apart.Bytes());
  for (apart.sent = 0; apart.sent <= all.size(); ++apart.sent) {
    ASSERT_EQ(text(apart), all.substr(apart.sent)) << apart.sent;
  }
  apart.sent = apart.head.size() + 100;  // the caller's memory goes in the middle of it
  apart.Detach();
  EXPECT_EQ(text(apart), all.substr(apart.sent));
  const OutFrame checked = make(/*checked=*/true);
  const std::string summed = text(checked);
  ASSERT_EQ(summed.size(), all.size());
  const size_t payload = checked.head.size();
  EXPECT_EQ(summed.substr(payload, 320), all.substr(payload, 320));
  EXPECT_NE(summed.substr(payload + 320), all.substr(payload + 320));
}

TEST(EncodeRequestsTest, HeadsAskedForTravelAndSizeTheQueries) {
  const std::vector<float> queries(3 * 2 * 8);
  QueryItem item{.session = {.shape = kShape}, .tokens = 3, .queries = AsBytes(queries)};
  item.kv_heads = {1};
  EXPECT_EQ(item.KvHeads(), 1U);
  EXPECT_EQ(item.QueryHeads(), 2U);
  const auto message = EncodeAttend({.items = {item}});
  ASSERT_TRUE(message.ok()) << message.status();
  proto::AttendRequest sent;
  ASSERT_TRUE(sent.ParseFromString(message->metadata));
  EXPECT_THAT(sent.items(0).kv_heads(), testing::ElementsAre(1));

  const auto refused = [&](std::vector<uint32_t> kv_heads) {
    item.kv_heads = std::move(kv_heads);
    return ErrorField(EncodeAttend({.items = {item}}).status());
  };
  EXPECT_EQ(refused({}), "items[0].queries");
  EXPECT_EQ(refused({0, 1}), "items[0].queries");
  EXPECT_EQ(refused({2}), "items[0].kv_heads[0]");
  EXPECT_EQ(refused({1, 0}), "items[0].kv_heads[1]");
  EXPECT_EQ(refused({0, 0}), "items[0].kv_heads[1]");
}

TEST(EncodeRequestsTest, PositionsHeldFollowTheirItemsQueries) {
  const std::vector<float> queries(2 * 4 * 8, 1.5F);
  const std::vector<uint32_t> held = {7, 9, 4};
  QueryItem item{.session = {.shape = kShape}, .tokens = 2, .queries = AsBytes(queries)};
  item.held = held;
  item.held_counts = {2, 0, 1, 0};
  auto message = EncodeTopK({.items = {item, item}});
  ASSERT_TRUE(message.ok()) << message.status();
  message->BringTogether();
  proto::TopKRequest sent;
  ASSERT_TRUE(sent.ParseFromString(message->metadata));
  EXPECT_THAT(sent.items(1).held_counts(), testing::ElementsAre(2, 0, 1, 0));
  ASSERT_EQ(message->payload.size(), 256U + 64 + 256 + 12);
  EXPECT_EQ(std::memcmp(message->payload.data() + 256, held.data(), 12), 0);
  EXPECT_EQ(message->payload.subspan(320, 256), AsBytes(queries));
  EXPECT_EQ(std::memcmp(message->payload.data() + 576, held.data(), 12), 0);

  EXPECT_EQ(ErrorField(EncodeAttend({.items = {item}}).status()), "items[0].held_counts");
  const auto refused = [&](std::vector<uint32_t> counts) {
    item.held_counts = std::move(counts);
    return ErrorField(EncodeTopK({.items = {item}}).status());
  };
  EXPECT_EQ(refused({}), "items[0].held");
  EXPECT_EQ(refused({2, 0, 1}), "items[0].held_counts");
  EXPECT_EQ(refused({2, 0, 1, 1}), "items[0].held");
  EXPECT_EQ(refused({~0U, ~0U, 0, 5}), "items[0].held");
}

TEST(EncodeRequestsTest, ElementsAreReadAsLateAsCanBe) {
  std::vector<float> queries(4 * 8), others(4 * 8);
  const QueryItem item{.session = {.shape = kShape}, .queries = AsBytes(queries)};
  const QueryItem other{.session = {.shape = kShape}, .queries = AsBytes(others)};
  auto one = EncodeAttend({.items = {item}});
  auto two = EncodeAttend({.items = {item, other}});
  ASSERT_TRUE(one.ok() && two.ok());
  std::iota(queries.begin(), queries.end(), 1.0F);
  std::iota(others.begin(), others.end(), 100.0F);
  one->BringTogether();
  two->BringTogether();
  EXPECT_EQ(one->payload, AsBytes(queries));
  EXPECT_EQ(two->payload.first(128), AsBytes(queries));
  EXPECT_EQ(two->payload.subspan(128), AsBytes(others));
}

TEST(EncodeRequestsTest, FieldsTravel) {
  TopKRequest request;
  const std::vector<float> queries(2 * 4 * 8);
  request.items.push_back({.session = {.boot_id = 3, .session_id = 4, .shape = kShape},
                           .tokens = 2,
                           .queries = AsBytes(absl::MakeConstSpan(queries)),
                           .range_begin = 5,
                           .range_end = {6, 7}});
  request.options = {.index = IndexKind::kLadder,
                     .candidates = 0,
                     .audit_samples = 8,
                     .seed = 9,
                     .threshold = 0.0F,
                     .vote = Vote::kMax,
                     .reuse_steps = 4,
                     .reuse_keep = 77};
  request.k = 10;
  const auto message = EncodeTopK(request);
  ASSERT_TRUE(message.ok()) << message.status();
  proto::TopKRequest sent;
  ASSERT_TRUE(sent.ParseFromString(message->metadata));
  EXPECT_EQ(sent.items(0).session().boot_id(), 3U);
  EXPECT_EQ(sent.items(0).session().session_id(), 4U);
  EXPECT_EQ(sent.items(0).tokens(), 2U);
  EXPECT_EQ(sent.items(0).range_begin(), 5U);
  EXPECT_THAT(sent.items(0).range_end(), testing::ElementsAre(6, 7));
  EXPECT_EQ(sent.query_dtype(), proto::DTYPE_FP32);
  EXPECT_EQ(sent.options().index(), proto::INDEX_LADDER);
  EXPECT_TRUE(sent.options().has_candidates());
  EXPECT_EQ(sent.options().candidates(), 0U);
  EXPECT_FALSE(sent.options().has_exact_rows());
  EXPECT_EQ(sent.options().audit_samples(), 8U);
  EXPECT_EQ(sent.options().seed(), 9U);
  EXPECT_TRUE(sent.options().has_threshold());  // none, whatever is planned
  EXPECT_EQ(sent.options().threshold(), 0.0F);
  EXPECT_EQ(sent.options().vote(), proto::VOTE_MAX);
  EXPECT_EQ(sent.options().reuse_steps(), 4U);
  EXPECT_EQ(sent.options().reuse_keep(), 77U);
  EXPECT_EQ(sent.k(), 10U);
  EXPECT_TRUE(sent.with_rows());
  EXPECT_TRUE(sent.with_state());
}

TEST(EncodeRequestsTest, LandmarksTravelBehindSampledQueries) {
  OpenOptions options;
  proto::OpenSessionRequest open;
  ASSERT_TRUE(open.ParseFromString(EncodeOpen(kShape, options)->metadata));
  EXPECT_FALSE(open.has_landmark());
  options.landmark = {.summary = LandmarkSummary::kGiven, .block = 128};
  ASSERT_TRUE(open.ParseFromString(EncodeOpen(kShape, options)->metadata));
  EXPECT_EQ(open.landmark().summary(), proto::LANDMARK_GIVEN);
  EXPECT_EQ(open.landmark().block(), 128U);

  const Session session{.shape = kShape};
  const std::vector<uint16_t> keys(size_t{16} * 2 * 8, 1);
  const std::vector<uint16_t> values(size_t{16} * 2 * 16, 1);
  const std::vector<uint16_t> queries(size_t{1} * 4 * 8, 2);
  std::vector<uint16_t> landmarks(size_t{1} * 2 * 8, 3);
  const std::vector<uint64_t> positions = {16};
  const std::vector<uint64_t> sampled = {20};
  const auto encode = [&] {
    const LayerTensors rows{keys, values};
    return EncodeAppend(session, 0, 16, 16, {&rows, 1}, {sampled, queries}, {positions, landmarks});
  };
  auto message = encode();
  ASSERT_TRUE(message.ok()) << message.status();
  message->BringTogether();
  proto::AppendRequest sent;
  ASSERT_TRUE(sent.ParseFromString(message->metadata));
  EXPECT_THAT(sent.landmark_positions(), testing::ElementsAre(16));
  ASSERT_EQ(message->payload.size(), 512U + 1024 + 64 + 32);
  EXPECT_EQ(message->payload.last(32), AsBytes(landmarks));
  landmarks.pop_back();
  EXPECT_EQ(ErrorField(encode().status()), "landmarks.rows");
}

TEST(EncodeRequestsTest, PlansTravelAndMustFit) {
  OpenOptions options;
  options.error_target = 0.25F;
  options.model = "org/model";
  proto::OpenSessionRequest sent;
  ASSERT_TRUE(sent.ParseFromString(EncodeOpen(kShape, options)->metadata));
  EXPECT_FALSE(sent.has_plan());
  EXPECT_EQ(sent.error_target(), 0.25F);
  EXPECT_EQ(sent.model(), "org/model");
  options.plan = HeadPlan();
  ASSERT_TRUE(sent.ParseFromString(EncodeOpen(kShape, options)->metadata));
  EXPECT_TRUE(sent.has_plan());
  options.plan->heads.push_back({.kv_head = 1, .index = "graph", .candidates = 300});
  ASSERT_TRUE(sent.ParseFromString(EncodeOpen(kShape, options)->metadata));
  ASSERT_EQ(sent.plan().heads_size(), 1);
  EXPECT_EQ(sent.plan().heads(0).mode(), "auto");
  EXPECT_EQ(sent.plan().heads(0).index(), "graph");
  EXPECT_EQ(sent.plan().heads(0).candidates(), 300U);
  const auto refused = [&] { return ErrorField(EncodeOpen(kShape, options).status()); };
  options.plan->heads[0].layer = 1;
  EXPECT_EQ(refused(), "plan.heads[0].layer");
  options.plan->heads[0].index = "magic";
  EXPECT_EQ(refused(), "plan.heads[0].index");
}

}  // namespace
}  // namespace kvseek::client
