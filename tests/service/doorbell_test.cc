// Doorbells, rung from the CPU: their answers are those of Attend, bit for bit, and whatever a
// client writes, gives up or dies of, the daemon goes on.
#include "client/doorbell.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "client/kv_client.h"
#include "proto/status_code.h"
#include "service/daemon.h"
#include "tests/client/raw_socket.h"
#include "tests/service/doorbell_fixture.h"

namespace kvseek::service {
namespace {

using proto::Op;
using std::chrono::milliseconds;
using test::RawSocket;
using transport::DoorbellItem;
using transport::DoorbellQuestion;
using Code = absl::StatusCode;

TEST_F(DoorbellTest, AnswersAreThoseOfAttend) {
  const Session sessions[] = {Fill(kTokens), Fill(300)};
  for (const std::vector<uint32_t>& kv_heads : {std::vector<uint32_t>{}, {1}}) {
    for (const IndexKind index : {IndexKind::kAuto, IndexKind::kLadder}) {
      DoorbellOptions options = Options(3, 2);
      options.kv_heads = kv_heads;
      options.search.index = index;
      options.search.candidates = 100;
      const auto doorbell = OpenDoorbell(options);
      ASSERT_NE(doorbell, nullptr);
      const uint32_t heads = kv_heads.empty() ? 6 : 3;
      for (uint32_t round = 0; round < 12; ++round) {
        const uint32_t slot = round % kShape.layers;
        const uint32_t tokens = 1 + round % 2;
        // Somebody without a session between two that have one.
        const std::vector<DoorbellItem> items{
            {.session_id = sessions[0].session_id, .begin = 16, .end = kTokens - round},
            {},
            {.session_id = sessions[1].session_id,
             .begin = round,
             .end = round % 4 == 0 ? round : 300}};
        const std::vector<uint16_t> queries = Queries(3, tokens, heads);
        const auto states = Ask(*doorbell, slot, tokens, items, queries);
        ASSERT_TRUE(states.ok()) << states.status();
        EXPECT_GT(states->daemon_ns, 0U);
        const size_t each = queries.size() / 3;
        for (const size_t i : {0, 2}) {
          const auto own = absl::MakeConstSpan(queries).subspan(i * each, each);
          ExpectSame(*states, i, Attend(sessions[i / 2], slot, tokens, own, items[i], options));
        }
        const size_t lses = states->lse.size() / 3;
        EXPECT_THAT(absl::MakeConstSpan(states->lse).subspan(lses, lses), testing::Each(-INFINITY));
      }
    }
  }
}

TEST_F(DoorbellTest, TakesQueriesOfEveryType) {
  const Session session = Fill(kTokens);
  const DoorbellItem item{.session_id = session.session_id, .begin = 0, .end = kTokens};
  const std::vector<float> numbers = [&] {
    std::vector<float> some(6 * kShape.key_dim);
    for (float& number : some) number = std::round(8 * std::normal_distribution<float>()(random_));
    return some;
  }();
  std::vector<std::vector<float>> lses;
  for (const DType dtype : {DType::kFp32, DType::kBf16, DType::kFp16}) {
    DoorbellOptions options = Options();
    options.query_dtype = dtype;
    const auto doorbell = OpenDoorbell(options);
    ASSERT_NE(doorbell, nullptr);
    std::vector<uint8_t> bytes;
    for (const float number : numbers) {
      const uint16_t half =
          dtype == DType::kBf16 ? kernels::FloatToBf16(number) : kernels::FloatToFp16(number);
      const auto* const from = dtype == DType::kFp32 ? reinterpret_cast<const uint8_t*>(&number)
                                                     : reinterpret_cast<const uint8_t*>(&half);
      bytes.insert(bytes.end(), from, from + kernels::DTypeBytes(dtype));
    }
    const auto rung = doorbell->Ring(0, 1, {&item, 1}, bytes);
    ASSERT_TRUE(rung.ok()) << rung.status();
    const auto states = doorbell->Await(0, *rung, Clock::now() + kPatience);
    ASSERT_TRUE(states.ok()) << states.status();
    lses.push_back(states->lse);
  }
  EXPECT_EQ(lses[0], lses[1]);
  EXPECT_EQ(lses[0], lses[2]);
}

TEST_F(DoorbellTest, AllSlotsAtOnce) {
  const Session session = Fill(kTokens);
  const DoorbellItem item{.session_id = session.session_id, .begin = 0, .end = kTokens};
  const DoorbellOptions options = Options();
  const auto doorbell = OpenDoorbell(options);
  ASSERT_NE(doorbell, nullptr);
  for (int round = 0; round < 50; ++round) {
    std::vector<std::vector<uint16_t>> queries;
    std::vector<uint64_t> numbers;
    for (uint32_t slot = 0; slot < kShape.layers; ++slot) {
      queries.push_back(Queries());
      numbers.push_back(*doorbell->Ring(slot, 1, {&item, 1}, AsBytes(queries[slot])));
    }
    for (uint32_t slot = 0; slot < kShape.layers; ++slot) {
      const auto states = doorbell->Await(slot, numbers[slot], Clock::now() + kPatience);
      ASSERT_TRUE(states.ok()) << states.status();
      ExpectSame(*states, 0, Attend(session, slot, 1, queries[slot], item, options));
    }
  }
}

// What a client gave up is answered late or never; what it asked then is answered right.
TEST_F(DoorbellTest, AClientThatGivesUpAndAsksAgain) {
  const Session session = Fill(kTokens);
  const DoorbellItem item{.session_id = session.session_id, .begin = 0, .end = kTokens};
  const DoorbellOptions options = Options();
  const auto doorbell = OpenDoorbell(options);
  ASSERT_NE(doorbell, nullptr);
  std::vector<std::vector<uint16_t>> queries;
  std::vector<std::vector<float>> lses;
  for (int i = 0; i < 4; ++i) {
    queries.push_back(Queries());
    const ItemResult attended = Attend(session, 1, 1, queries[i], item, options);
    lses.emplace_back(attended.lse.begin(), attended.lse.end());
  }
  for (int round = 0; round < 400; ++round) {
    uint64_t number = 0;
    size_t last = 0;
    // Some are given up before they are seen, some while they are copied or under way.
    for (uint64_t again = random_() % 4 + 1; again > 0; --again) {
      last = random_() % queries.size();
      number = *doorbell->Ring(1, 1, {&item, 1}, AsBytes(queries[last]));
      const auto until = Clock::now() + std::chrono::microseconds(random_() % 300);
      while (Clock::now() < until) {
      }
    }
    const auto states = doorbell->Await(1, number, Clock::now() + kPatience);
    ASSERT_TRUE(states.ok()) << states.status();
    ASSERT_EQ(states->lse, lses[last]) << round;
  }
  EXPECT_GT(Counter("doorbell_overtaken"), 0U);
  EXPECT_LT(Counter("doorbell_questions"), 2000U);
}

TEST_F(DoorbellTest, BadQuestionsGetAStatus) {
  const Session session = Fill(300);
  ModelShape other = kShape;
  other.key_dim = 48;
  other.kv_heads = 1;
  other.query_heads = 3;
  const Session misfit = Fill(300, other);
  const Session closed = Fill(300);
  const auto doorbell = OpenDoorbell(Options(2, 2));
  ASSERT_NE(doorbell, nullptr);
  const DoorbellItem good{.session_id = session.session_id, .begin = 0, .end = 300};
  const auto code = [&](const std::vector<DoorbellItem>& items,
                        const std::vector<uint16_t>& queries) {
    return Ask(*doorbell, 0, 1, items, queries).status().code();
  };
  EXPECT_EQ(code({good}, Queries()), Code::kOk);
  DoorbellItem bad = good;
  bad.end = 301;
  EXPECT_EQ(code({bad}, Queries()), Code::kInvalidArgument);
  bad = good;
  bad.begin = ~uint64_t{0};
  EXPECT_EQ(code({good, bad}, Queries(2)), Code::kInvalidArgument);
  bad = good;
  bad.session_id = 12345;
  EXPECT_EQ(code({bad}, Queries()), Code::kNotFound);
  bad.session_id = misfit.session_id;
  EXPECT_EQ(code({bad}, Queries()), Code::kInvalidArgument);
  bad.session_id = closed.session_id;
  EXPECT_EQ(code({bad}, Queries()), Code::kOk);
  ASSERT_TRUE(client_->Close(closed).ok());
  EXPECT_EQ(code({bad}, Queries()), Code::kNotFound);
  std::vector<uint16_t> queries = Queries();
  queries[17] = 0x7fc0;  // NaN
  EXPECT_EQ(code({good}, queries), Code::kInvalidArgument);
  // Of sizes that Ring would not let through.
  auto* const asked = reinterpret_cast<uint64_t*>(doorbell->memory() + doorbell->layout().asked(1));
  uint64_t number = 0;
  for (const auto& [items, tokens] : std::vector<std::pair<uint32_t, uint32_t>>{
           {0, 1}, {3, 1}, {~0U, 1}, {1, 0}, {1, 3}, {~0U, ~0U}}) {
    const DoorbellQuestion question{.items = items, .tokens = tokens};
    std::memcpy(doorbell->memory() + doorbell->layout().question(1), &question, sizeof(question));
    std::atomic_ref<uint64_t>(*asked).store(++number, std::memory_order_release);
    EXPECT_EQ(doorbell->Await(1, number, Clock::now() + kPatience).status().code(),
              Code::kInvalidArgument)
        << items << " " << tokens;
  }
  EXPECT_EQ(code({good}, Queries()), Code::kOk);
  EXPECT_GE(Counter("doorbell_errors"), 12U);
}

TEST_F(DoorbellTest, DeadlinesHold) {
  const Session session = Fill(kTokens);
  DoorbellOptions options = Options();
  options.deadline = std::chrono::microseconds(1);
  const auto doorbell = OpenDoorbell(options);
  ASSERT_NE(doorbell, nullptr);
  const DoorbellItem item{.session_id = session.session_id, .begin = 0, .end = kTokens};
  EXPECT_EQ(Ask(*doorbell, 0, 1, {item}, Queries()).status().code(), Code::kDeadlineExceeded);
  EXPECT_EQ(doorbell->Await(0, 99, Clock::now()).status().code(), Code::kDeadlineExceeded);
}

TEST_F(DoorbellTest, IsHeardAfterALongPause) {
  const Session session = Fill(300);
  const auto doorbell = OpenDoorbell(Options());
  ASSERT_NE(doorbell, nullptr);
  const DoorbellItem item{.session_id = session.session_id, .begin = 0, .end = 300};
  auto fastest = Clock::duration::max();
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(milliseconds(60));
    const auto before = Clock::now();
    ASSERT_TRUE(Ask(*doorbell, 0, 1, {item}, Queries()).ok());
    fastest = std::min(fastest, Clock::now() - before);
  }
  EXPECT_LT(fastest, milliseconds(20));
}

TEST_F(DoorbellTest, WhoeverScribblesOverTheMemoryHarmsNobodyElse) {
  const Session session = Fill(kTokens);
  const DoorbellItem item{.session_id = session.session_id, .begin = 0, .end = kTokens};
  const DoorbellOptions options = Options();
  const auto honest = OpenDoorbell(options);
  const auto hostile = OpenDoorbell(Options(2, 2));
  ASSERT_TRUE(honest != nullptr && hostile != nullptr);
  std::atomic<bool> stop{false};
  std::thread scribbler([&] {
    std::mt19937_64 random(3);
    const size_t words = hostile->layout().bytes() / sizeof(uint64_t);
    auto* const memory = reinterpret_cast<uint64_t*>(hostile->memory());
    while (!stop.load()) {
      // Often where questions stand, and often what could be one.
      const size_t at = random() % 3 == 0 ? random() % 16 : random() % words;
      const uint64_t value = random() % 2 == 0 ? random() : random() % 3 + ((random() % 3) << 32);
      std::atomic_ref<uint64_t>(memory[at]).store(value, std::memory_order_relaxed);
    }
  });
  for (int round = 0; round < 100; ++round) {
    const std::vector<uint16_t> queries = Queries();
    const auto states = Ask(*honest, 2, 1, {item}, queries);
    ASSERT_TRUE(states.ok()) << states.status();
    ExpectSame(*states, 0, Attend(session, 2, 1, queries, item, options));
  }
  stop.store(true);
  scribbler.join();
}

TEST_F(DoorbellTest, EndsWithItsConnection) {
  const Session session = Fill(kTokens);
  auto doorbell = OpenDoorbell(Options());
  ASSERT_NE(doorbell, nullptr);
  EXPECT_TRUE(doorbell->Connected());
  ExpectDoorbells(1);
  doorbell.reset();
  ExpectDoorbells(0);
  // A client that dies while its question is under way.
  const pid_t child = fork();
  if (child == 0) {
    const auto own = Doorbell::Open(address(), Options());
    const DoorbellItem item{.session_id = session.session_id, .begin = 0, .end = kTokens};
    if (!own.ok() || !(*own)->Ring(0, 1, {&item, 1}, AsBytes(Queries())).ok()) _exit(1);
    kill(getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status));
  ExpectDoorbells(0);
}

TEST_F(DoorbellTest, OfADaemonThatStopsIsNotAnswered) {
  const Session session = Fill(300);
  const auto doorbell = OpenDoorbell(Options());
  ASSERT_NE(doorbell, nullptr);
  const DoorbellItem item{.session_id = session.session_id, .begin = 0, .end = 300};
  std::atomic<bool> stop{false};
  std::thread ringing([&] {
    while (!stop.load()) {
      const auto number = doorbell->Ring(0, 1, {&item, 1}, AsBytes(std::vector<uint16_t>(144)));
      doorbell->Await(0, *number, Clock::now() + milliseconds(5)).IgnoreError();
    }
  });
  std::this_thread::sleep_for(milliseconds(20));
  const auto before = Clock::now();
  client_.reset();
  daemon_.reset();
  EXPECT_LT(Clock::now() - before, options_.shutdown_grace);
  stop.store(true);
  ringing.join();
  EXPECT_FALSE(doorbell->Connected());
  const auto number = doorbell->Ring(0, 1, {&item, 1}, AsBytes(std::vector<uint16_t>(144)));
  EXPECT_EQ(doorbell->Await(0, *number, Clock::now() + milliseconds(50)).status().code(),
            Code::kDeadlineExceeded);
}

TEST_F(DoorbellTest, AreBounded) {
  options_.doorbells_max = 2;
  options_.shared_memory_bytes_max = 3 * transport::DoorbellLayout({.slots = 3,
                                                                    .items_max = 1,
                                                                    .tokens_max = 1,
                                                                    .query_heads = 6,
                                                                    .key_dim = 24,
                                                                    .value_dim = 40,
                                                                    .query_element_bytes = 2})
                                             .bytes();
  Start();
  const auto refused = [&](const DoorbellOptions& options) {
    const absl::Status status = Doorbell::Open(address(), options).status();
    return absl::StatusCodeToString(status.code()) + " " + proto::ErrorField(status);
  };
  EXPECT_EQ(refused(Options(200, 64)), "RESOURCE_EXHAUSTED items_max");
  {
    const auto one = OpenDoorbell(Options());
    const auto two = OpenDoorbell(Options());
    EXPECT_EQ(refused(Options()), "RESOURCE_EXHAUSTED ");
    EXPECT_EQ(Doorbell::Open(address(), Options()).status().code(), Code::kResourceExhausted);
  }
  ExpectDoorbells(0);
  {  // two of three times the memory
    const auto large = OpenDoorbell(Options(2));
    EXPECT_EQ(refused(Options(3)), "RESOURCE_EXHAUSTED ");
  }
  ExpectDoorbells(0);
  EXPECT_NE(OpenDoorbell(Options(2)), nullptr);
}

TEST_F(DoorbellTest, RefusalsNameTheField) {
  const auto refused = [&](const DoorbellOptions& options) {
    const absl::Status status = Doorbell::Open(address(), options).status();
    return absl::StatusCodeToString(status.code()) + " " + proto::ErrorField(status);
  };
  DoorbellOptions options = Options(0);
  EXPECT_EQ(refused(options), "INVALID_ARGUMENT items_max");
  options = Options(options_.batch_items_max + 1);
  EXPECT_EQ(refused(options), "INVALID_ARGUMENT items_max");
  options = Options(1, options_.query_tokens_max + 1);
  EXPECT_EQ(refused(options), "INVALID_ARGUMENT tokens_max");
  options = Options();
  options.kv_heads = {1, 1};
  EXPECT_EQ(refused(options), "INVALID_ARGUMENT kv_heads[1]");
  options.kv_heads = {2};
  EXPECT_EQ(refused(options), "INVALID_ARGUMENT kv_heads[0]");
  options = Options();
  options.search.list_read = true;
  EXPECT_EQ(refused(options), "INVALID_ARGUMENT options.list_read");
  options = Options();
  options.search.mass = 2.0F;
  EXPECT_EQ(refused(options), "INVALID_ARGUMENT options.mass");
  options = Options();
  options.shape.layers = options_.layers_max + 1;
  EXPECT_EQ(refused(options), "INVALID_ARGUMENT shape.layers");
  options = Options();
  options.shape.key_dim = 20;
  EXPECT_EQ(refused(options), "INVALID_ARGUMENT shape.key_dim");
  EXPECT_EQ(Doorbell::Open({.address = "tcp://127.0.0.1:1"}, Options()).status().code(),
            Code::kInvalidArgument);
  EXPECT_EQ(Doorbell::Open({.address = "unix:/nowhere/s"}, Options()).status().code(),
            Code::kUnavailable);
}

TEST_F(DoorbellTest, NeedsAConnectionOfItsOwn) {
  proto::OpenDoorbellRequest request;
  proto::ModelShape& shape = *request.mutable_shape();
  shape.set_layers(1);
  shape.set_kv_heads(1);
  shape.set_query_heads(1);
  shape.set_key_dim(8);
  shape.set_value_dim(8);
  request.set_items_max(1);
  request.set_tokens_max(1);
  request.set_query_dtype(proto::DTYPE_BF16);
  const std::string metadata = request.SerializeAsString();
  // Over shared memory, there is nothing that a descriptor could come with.
  RawSocket shared = RawSocket::Connect("shm:" + path());
  ASSERT_TRUE(shared.Greet());
  ASSERT_TRUE(shared.SendFrame(Op::kOpenDoorbell, 2, metadata));
  auto answer = shared.ReadFrame(/*checked=*/false);
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->Error().field(), "op");
  // A second one.
  RawSocket socket = RawSocket::Connect("unix:" + path());
  ASSERT_TRUE(socket.Greet());
  ASSERT_TRUE(socket.SendFrame(Op::kOpenDoorbell, 2, metadata));
  answer = socket.ReadFrame();
  ASSERT_TRUE(answer.has_value() && !answer->IsError());
  char byte = 1;
  ASSERT_EQ(read(socket.descriptor(), &byte, 1), 1);  // what the descriptor came with
  ASSERT_TRUE(socket.SendFrame(Op::kOpenDoorbell, 3, metadata));
  answer = socket.ReadFrame();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->Error().field(), "op");
  // Other requests go on as ever.
  ASSERT_TRUE(socket.SendFrame(Op::kHealth, 4, ""));
  answer = socket.ReadFrame();
  EXPECT_TRUE(answer.has_value() && !answer->IsError());
}

}  // namespace
}  // namespace kvseek::service
