// What the doorbell's tests share: a daemon, and questions that are asked both ways.
#ifndef KVSEEK_TESTS_SERVICE_DOORBELL_FIXTURE_H_
#define KVSEEK_TESTS_SERVICE_DOORBELL_FIXTURE_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/doorbell.h"
#include "client/kv_client.h"
#include "gtest/gtest.h"
#include "kernels/dtype.h"
#include "service/daemon.h"
#include "tests/client/raw_socket.h"

namespace kvseek::service {

inline constexpr ModelShape kShape{
    .layers = 3, .kv_heads = 2, .query_heads = 6, .key_dim = 24, .value_dim = 40};
inline constexpr uint32_t kTokens = 1500;
inline constexpr std::chrono::milliseconds kPatience{20000};

/// A daemon, a client of it, sessions of random keys, and doorbells rung from the CPU.
class DoorbellTest : public testing::Test {
 protected:
  using Clock = std::chrono::steady_clock;
  void SetUp() override {
    options_.listen = {"unix:" + path()};
    options_.workers = 2;
    options_.doorbell_spin = std::chrono::microseconds(200);
    Start();
  }
  void Start() {
    client_.reset();
    daemon_.reset();
    auto daemon = Daemon::Start(options_);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
    auto client = KvClient::Connect(address());
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
  }
  std::string path() const { return dir_.path() + "/s"; }
  ClientOptions address() const { return {.address = "unix:" + path()}; }

  std::vector<uint16_t> Numbers(size_t count) {
    std::vector<uint16_t> numbers(count);
    for (uint16_t& number : numbers) {
      number = kernels::FloatToBf16(std::normal_distribution<float>()(random_));
    }
    return numbers;
  }
  Session Fill(uint32_t tokens, const ModelShape& shape = kShape) {
    const auto session = client_->Open(shape, {});
    EXPECT_TRUE(session.ok()) << session.status();
    for (uint32_t layer = 0; layer < shape.layers && tokens > 0; ++layer) {
      const auto held = client_->Append(*session, layer, 0, tokens,
                                        Numbers(size_t{tokens} * shape.kv_heads * shape.key_dim),
                                        Numbers(size_t{tokens} * shape.kv_heads * shape.value_dim));
      EXPECT_TRUE(held.ok()) << held.status();
    }
    return *session;
  }
  std::unique_ptr<Doorbell> OpenDoorbell(const DoorbellOptions& options) {
    auto doorbell = Doorbell::Open(address(), options);
    EXPECT_TRUE(doorbell.ok()) << doorbell.status();
    return doorbell.ok() ? *std::move(doorbell) : nullptr;
  }
  static DoorbellOptions Options(uint32_t items = 1, uint32_t tokens = 1) {
    DoorbellOptions options;
    options.shape = kShape;
    options.items_max = items;
    options.tokens_max = tokens;
    return options;
  }
  std::vector<uint16_t> Queries(uint32_t items = 1, uint32_t tokens = 1, uint32_t heads = 6) {
    return Numbers(size_t{items} * tokens * heads * kShape.key_dim);
  }
  static absl::StatusOr<Doorbell::States> Ask(Doorbell& doorbell, uint32_t slot, uint32_t tokens,
                                              const std::vector<transport::DoorbellItem>& items,
                                              const std::vector<uint16_t>& queries) {
    const auto number = doorbell.Ring(slot, tokens, items, AsBytes(queries));
    if (!number.ok()) return number.status();
    return doorbell.Await(slot, *number, Clock::now() + kPatience);
  }
  /// One session's Attend over the socket.
  ItemResult Attend(const Session& session, uint32_t layer, uint32_t tokens,
                    absl::Span<const uint16_t> queries, const transport::DoorbellItem& item,
                    const DoorbellOptions& options) {
    AttendRequest request;
    request.items.push_back({.session = session,
                             .layer = layer,
                             .tokens = tokens,
                             .queries = AsBytes(queries),
                             .range_begin = item.begin,
                             .range_end = {item.end},
                             .kv_heads = options.kv_heads});
    request.options = options.search;
    request.query_dtype = options.query_dtype;
    request.state_dtype = DType::kFp16;
    auto answer = client_->Attend(request);
    EXPECT_TRUE(answer.ok()) << answer.status();
    if (!answer.ok()) return {};
    response_ = *std::move(answer);
    return response_.items[0];
  }
  static void ExpectSame(const Doorbell::States& states, size_t item, const ItemResult& attended) {
    ASSERT_GE(states.lse.size(), (item + 1) * attended.lse.size());
    for (size_t i = 0; i < attended.lse.size(); ++i) {
      ASSERT_EQ(states.lse[item * attended.lse.size() + i], attended.lse[i]) << i;
    }
    for (size_t i = 0; i < attended.out.size(); ++i) {
      ASSERT_EQ(kernels::Fp16ToFloat(states.out[item * attended.out.size() + i]), attended.out[i])
          << i;
    }
  }
  uint64_t Counter(const std::string& name) {
    const auto stats = client_->Stats(false);
    EXPECT_TRUE(stats.ok()) << stats.status();
    return stats.ok() && stats->counters.contains(name) ? stats->counters.at(name) : 0;
  }
  void ExpectDoorbells(uint64_t count) {
    const auto give_up = Clock::now() + kPatience;
    while (Counter("doorbells") != count && Clock::now() < give_up) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_EQ(Counter("doorbells"), count);
  }

  std::mt19937_64 random_{7};
  test::TempDir dir_;
  DaemonOptions options_;
  std::unique_ptr<Daemon> daemon_;
  std::unique_ptr<KvClient> client_;
  SearchResponse response_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_TESTS_SERVICE_DOORBELL_FIXTURE_H_
