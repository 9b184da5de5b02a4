// What decode steps leave for the next ones: which of them may use it, and whose memory it is.
#include "service/selection_memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "tests/service/service_fixture.h"

namespace kvseek::service {
namespace {

constexpr uint32_t kTokens = 3000;
constexpr size_t kQueryHeads = 6;

/// A session with `kTokens` tokens in layer 0, and steps of its decoder.
class Decoder {
 public:
  explicit Decoder(Service& service) : service_(service) {
    session_ = OpenSession(service, SmallShape());
    EXPECT_TRUE(Append(0, kTokens, 1).ok());
  }

  Answer<proto::AppendResponse> Append(uint64_t start, size_t tokens, uint32_t seed) {
    return AppendRows(service_, session_, 0, start, tokens, RandomRows(seed, SmallShape(), tokens));
  }
  void Truncate(uint64_t tokens) {
    proto::TruncateRequest request;
    *request.mutable_session() = session_;
    request.set_tokens(tokens);
    EXPECT_TRUE(service_.Call(request).ok());
  }

  /// Asks for both KV heads.
  proto::AttendRequest Request(uint32_t reuse_steps, uint32_t tokens = 1) const {
    proto::AttendRequest request;
    proto::QueryItem& item = *request.add_items();
    *item.mutable_session() = session_;
    item.set_tokens(tokens);
    request.set_query_dtype(proto::DTYPE_FP32);
    request.mutable_options()->set_index(proto::INDEX_LADDER);
    request.mutable_options()->set_candidates(300);
    request.mutable_options()->set_reuse_steps(reuse_steps);
    return request;
  }
  Answer<proto::AttendResponse> Ask(const proto::AttendRequest& request, uint32_t seed = 5,
                                    float scale = 0.5F) {
    const std::vector<float> queries = reference::RandomFloats(
        seed, request.items(0).tokens() * kQueryHeads * SmallShape().key_dim(), scale);
    auto answer = service_.Call(request, Tensors().Add(queries));
    EXPECT_TRUE(answer.ok()) << answer.status;
    return answer;
  }
  /// Whether each result of a step was reused.
  std::vector<bool> Step(uint32_t reuse_steps, uint32_t tokens = 1) {
    return Reused(Ask(Request(reuse_steps, tokens)));
  }
  static std::vector<bool> Reused(const Answer<proto::AttendResponse>& answer) {
    std::vector<bool> reused;
    for (const proto::Report& report : answer.message.reports()) reused.push_back(report.reused());
    return reused;
  }

  const proto::SessionRef& session() const { return session_; }
  void Use(const proto::SessionRef& session) { session_ = session; }

 private:
  Service& service_;
  proto::SessionRef session_;
};

/// A worker that has just answered may still have a state in hand.
bool Eventually(const std::function<bool()>& holds) {
  const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!holds() && std::chrono::steady_clock::now() < late) std::this_thread::yield();
  return holds();
}

uint64_t SessionBytes(Service& service) {
  proto::StatsRequest stats;
  stats.set_with_sessions(true);
  return service.Call(stats).message.sessions(0).bytes();
}

std::vector<bool> Both(bool reused) { return {reused, reused}; }

uint64_t CounterOf(Service& service, const std::string& name) {
  const auto stats = service.Call(proto::StatsRequest());
  for (const proto::Counter& counter : stats.message.counters()) {
    if (counter.name() == name) return counter.value();
  }
  return 0;
}

TEST(SelectionMemoryTest, OneStepInNIsSearched) {
  Service service;
  Decoder decoder(service);
  EXPECT_EQ(decoder.Step(0), Both(false));
  EXPECT_EQ(decoder.Step(3), Both(false)) << "a step that keeps nothing leaves nothing";
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(decoder.Step(3), Both(true));
    EXPECT_EQ(decoder.Step(3), Both(true));
    EXPECT_EQ(decoder.Step(3), Both(false));
  }
  EXPECT_EQ(decoder.Step(1), Both(false)) << "begins anew ...";
  EXPECT_EQ(decoder.Step(2), Both(true)) << "... and leaves its selection";
  EXPECT_EQ(CounterOf(service, "searches_reused"), 10U);
}

TEST(SelectionMemoryTest, TheSameQueryIsAnsweredAlike) {
  Service service;
  Decoder decoder(service);
  auto searched = decoder.Ask(decoder.Request(2));
  auto reused = decoder.Ask(decoder.Request(2));
  ASSERT_EQ(Decoder::Reused(reused), Both(true));
  const size_t elements = kQueryHeads * SmallShape().value_dim();
  const auto expected = searched.tensors.Take<float>(elements);
  const auto got = reused.tensors.Take<float>(elements);
  for (size_t i = 0; i < elements; ++i) EXPECT_NEAR(got[i], expected[i], 0.05);
}

TEST(SelectionMemoryTest, OnlyTheLastTokenOfAnItemTakesPart) {
  Service service;
  Decoder decoder(service);
  EXPECT_EQ(decoder.Step(9, 3), std::vector<bool>(6, false));
  EXPECT_THAT(decoder.Step(9, 3), testing::ElementsAre(false, false, false, false, true, true));
  EXPECT_EQ(decoder.Step(9), Both(true));
}

TEST(SelectionMemoryTest, AnotherIndexOrMoreThanAnEstimateIsSearched) {
  Service service;
  Decoder decoder(service);
  decoder.Step(9);
  proto::AttendRequest request = decoder.Request(9);
  request.mutable_options()->set_exact_top(1);
  EXPECT_EQ(Decoder::Reused(decoder.Ask(request)), Both(false));
  request = decoder.Request(9);
  request.mutable_options()->set_leave_rest_out(true);
  EXPECT_EQ(Decoder::Reused(decoder.Ask(request)), Both(false));
  request = decoder.Request(9);
  request.mutable_items(0)->set_range_begin(7);
  EXPECT_EQ(Decoder::Reused(decoder.Ask(request)), Both(false)) << "another range";
  request = decoder.Request(9);
  EXPECT_EQ(Decoder::Reused(decoder.Ask(request)), Both(false)) << "that is the range remembered";
  EXPECT_EQ(decoder.Step(9), Both(true));
  request.mutable_options()->set_index(proto::INDEX_EXACT);
  EXPECT_EQ(Decoder::Reused(decoder.Ask(request)), Both(false));
  EXPECT_EQ(decoder.Step(9), Both(false)) << "exact attention has no selection to leave";
}

TEST(SelectionMemoryTest, AppendsKeepItAndCutsThroughItDoNot) {
  Service service;
  Decoder decoder(service);
  decoder.Step(9);
  ASSERT_TRUE(decoder.Append(kTokens, 500, 2).ok());
  EXPECT_EQ(decoder.Step(9), Both(true));
  decoder.Truncate(kTokens - 1);
  EXPECT_EQ(decoder.Step(9), Both(true)) << "segments 0 and 1 are the same as ever";

  const uint64_t with = service.budget().used_bytes();
  decoder.Truncate(2047);
  EXPECT_TRUE(Eventually([&] { return service.budget().used_bytes() < with; }));
  EXPECT_EQ(decoder.Step(9), Both(false));
  EXPECT_EQ(decoder.Step(9), Both(true));

  // As many tokens as before, but others.
  decoder.Truncate(1023);
  ASSERT_TRUE(decoder.Append(1023, kTokens - 1023, 77).ok());
  proto::AttendRequest exact = decoder.Request(0);
  exact.mutable_options()->set_index(proto::INDEX_EXACT);
  auto truth = decoder.Ask(exact);
  auto answer = decoder.Ask(decoder.Request(9));
  EXPECT_EQ(Decoder::Reused(answer), Both(false));
  const size_t elements = kQueryHeads * SmallShape().value_dim();
  const auto expected = truth.tensors.Take<float>(elements);
  const auto got = answer.tensors.Take<float>(elements);
  for (size_t i = 0; i < elements; ++i) EXPECT_NEAR(got[i], expected[i], 0.1);
}

TEST(SelectionMemoryTest, ASearchOfAnOldStateLeavesNothingForTheNewOne) {
  MemoryBudget budget(1 << 30, std::chrono::milliseconds(1));
  const auto segment = [] {
    const index::KvShape shape{.key_dim = 16, .value_dim = 16};
    const std::vector<uint16_t> rows(size_t{index::kSegmentTokens} * 16);
    return index::Segment::Build(shape, rows.data(), rows.data());
  };
  const auto first = segment();
  const std::vector<std::shared_ptr<const index::Segment>> old_list = {first, segment()};
  const std::vector<std::shared_ptr<const index::Segment>> new_list = {first, segment()};
  const index::KvView before{{}, old_list, {}};
  const index::KvView after{{}, new_list, {}};
  auto last = std::make_shared<index::LastSearch>();
  last->last_block = 17;
  last->positions.resize(1000);
  SelectionMemory memory(2);
  EXPECT_EQ(memory.Bytes(), 0U);
  memory.Remember(1, index::LadderIndex(), before, last, budget);
  EXPECT_GE(memory.Bytes(), 8000U);
  EXPECT_EQ(memory.Bytes(), budget.used_bytes());
  EXPECT_EQ(memory.NextStep(1, 9, index::LadderIndex(), after), nullptr);
  EXPECT_EQ(memory.NextStep(0, 9, index::LadderIndex(), before), nullptr);
  EXPECT_EQ(memory.NextStep(1, 9, index::ExactIndex(), before), nullptr);
  EXPECT_EQ(memory.NextStep(1, 9, index::LadderIndex(), before), last);
  memory.ForgetGone(1, before);
  EXPECT_EQ(memory.NextStep(1, 9, index::LadderIndex(), before), last);
  memory.ForgetGone(1, after);
  EXPECT_EQ(memory.NextStep(1, 9, index::LadderIndex(), before), nullptr);
  EXPECT_EQ(budget.used_bytes(), 0U);
  // Within the first segment it is of both.
  last->last_block = 16;
  memory.Remember(0, index::LadderIndex(), before, last, budget);
  EXPECT_EQ(memory.NextStep(0, 9, index::LadderIndex(), after), last);
  memory.Remember(0, index::LadderIndex(), before, nullptr, budget);
  EXPECT_EQ(memory.Bytes(), 0U);
}

TEST(SelectionMemoryTest, ForksBeginWithoutAndClosingGivesTheMemoryBack) {
  Service service;
  const uint64_t empty = service.budget().used_bytes();
  Decoder decoder(service);
  const uint64_t filled = SessionBytes(service);
  decoder.Step(9);
  const uint64_t remembered = SessionBytes(service);
  EXPECT_GT(remembered, filled + 2 * 300 * sizeof(int64_t));
  EXPECT_GE(service.budget().used_bytes(), remembered);
  decoder.Step(1);
  EXPECT_EQ(SessionBytes(service), remembered) << "one takes the other's place";

  proto::ForkRequest fork;
  *fork.mutable_session() = decoder.session();
  const auto forked = service.Call(fork);
  ASSERT_TRUE(forked.ok()) << forked.status;
  proto::CloseSessionRequest close;
  *close.mutable_session() = decoder.session();
  decoder.Use(forked.message.session());
  EXPECT_EQ(decoder.Step(9), Both(false));
  EXPECT_EQ(decoder.Step(9), Both(true));
  EXPECT_TRUE(service.Call(close).ok());
  *close.mutable_session() = decoder.session();
  EXPECT_TRUE(service.Call(close).ok());
  EXPECT_TRUE(Eventually([&] { return service.budget().used_bytes() == empty; }));
}

TEST(SelectionMemoryTest, WithoutMemoryStepsAreSearched) {
  Service service;
  Decoder decoder(service);
  const auto searched = decoder.Ask(decoder.Request(0));
  auto rest = service.budget().Reserve(
      service.budget().limit_bytes() - service.budget().used_bytes() - 100, "");
  ASSERT_TRUE(rest.ok());
  for (int i = 0; i < 3; ++i) EXPECT_EQ(decoder.Step(9), Both(false));
  { const MemoryBudget::Reservation given_back = *std::move(rest); }
  EXPECT_EQ(decoder.Step(9), Both(false));
  EXPECT_EQ(decoder.Step(9), Both(true));
}

TEST(SelectionMemoryTest, AnswersThatAreNotTrustedAreSearchedAfterAll) {
  for (const int workers : {1, 3}) {
    Service service(Service::SmallOptions(workers));
    Decoder decoder(service);
    proto::AttendRequest request = decoder.Request(50);
    request.mutable_options()->set_candidates(64);
    request.mutable_options()->set_reuse_keep(64);
    proto::AttendRequest plain = decoder.Request(0);
    *plain.mutable_options() = request.options();
    plain.mutable_options()->clear_reuse_steps();
    decoder.Ask(request, 1000, 3.0F);
    uint64_t reused = 0;
    for (uint32_t step = 1; step < 30; ++step) {
      auto answer = decoder.Ask(request, 1000 + step, 3.0F);
      auto searched = decoder.Ask(plain, 1000 + step, 3.0F);
      const size_t width = kQueryHeads / 2 * SmallShape().value_dim();
      for (int head = 0; head < 2; ++head) {
        const auto got = answer.tensors.Take<float>(head == 0 ? 2 * width : 0);
        const auto expected = searched.tensors.Take<float>(head == 0 ? 2 * width : 0);
        if (answer.message.reports(head).reused()) {
          ++reused;
          continue;
        }
        EXPECT_GT(answer.message.reports(head).bytes_touched(),
                  searched.message.reports(head).bytes_touched());
        if (head == 0) {
          EXPECT_TRUE(std::equal(got.begin(), got.begin() + static_cast<ptrdiff_t>(width),
                                 expected.begin()));
        }
      }
    }
    EXPECT_EQ(CounterOf(service, "searches_reused"), reused);
    EXPECT_EQ(CounterOf(service, "searches_distrusted"), 58 - reused);
    EXPECT_GT(58 - reused, 5U);
  }
}

TEST(SelectionMemoryTest, RequestsOfOneLayerAtOnce) {
  Service service(Service::SmallOptions(3));
  Decoder decoder(service);
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 3; ++t) {
    threads.emplace_back([&decoder, &stop, t] {
      for (uint32_t i = 0; !stop.load(); ++i) decoder.Ask(decoder.Request(4), 100 * t + i);
    });
  }
  for (uint32_t i = 0; i < 30; ++i) {
    decoder.Truncate(kTokens - 1 - 60 * i);
    ASSERT_TRUE(decoder.Append(kTokens - 1 - 60 * i, 1 + 60 * i, i).ok());
  }
  stop.store(true);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace kvseek::service
