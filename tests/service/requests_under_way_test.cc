// Requests of one connection that are under way together.
#include "service/requests_under_way.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "proto/status_code.h"
#include "tests/service/connection_fixture.h"

namespace kvseek::service {
namespace {

using proto::Op;
using std::chrono::milliseconds;
using test::RawFrame;
using test::RawSocket;
using Clock = std::chrono::steady_clock;

class RequestsUnderWayTest : public ScriptedServerTest {};

INSTANTIATE_TEST_SUITE_P(Transports, RequestsUnderWayTest, AllTransports(), NameOf);

TEST_P(RequestsUnderWayTest, AnswersComeInAnyOrder) {
  Start();
  RawSocket socket = Greeted();
  for (uint64_t id = 1; id <= 3; ++id) ASSERT_TRUE(socket.SendFrame(Op::kAttend, id, ""));
  ASSERT_TRUE(script_.Await(3));
  for (const size_t index : {2, 0, 1}) {
    script_.Answer(index, "answer " + std::to_string(index), 200000);
    const std::optional<RawFrame> answer = socket.ReadFrame();
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->header.request_id, index + 1);
    EXPECT_EQ(answer->header.op, Op::kAttend);
    EXPECT_EQ(answer->metadata, "answer " + std::to_string(index));
    EXPECT_EQ(answer->payload, std::string(200000, 'p'));
  }
}

TEST_P(RequestsUnderWayTest, DeadlineIsCountedFromArrival) {
  options_.deadline_default = milliseconds(7000);
  Start();
  RawSocket socket = Greeted();
  const auto before = Clock::now();
  ASSERT_TRUE(socket.SendFrame(Op::kAttend, 1, "", "", 2000000));
  ASSERT_TRUE(socket.SendFrame(Op::kAttend, 2, "", "", 0));
  ASSERT_TRUE(script_.Await(2));
  const auto after = Clock::now();
  EXPECT_GE(script_.request(0).deadline, before + milliseconds(2000));
  EXPECT_LE(script_.request(0).deadline, after + milliseconds(2000));
  EXPECT_GE(script_.request(1).deadline, before + milliseconds(7000));
  EXPECT_LE(script_.request(1).deadline, after + milliseconds(7000));
}

TEST_P(RequestsUnderWayTest, CancelReachesTheRequestAndIsAnswered) {
  Start();
  RawSocket socket = Greeted();
  ASSERT_TRUE(socket.SendFrame(Op::kAttend, 10, ""));
  ASSERT_TRUE(socket.SendFrame(Op::kAttend, 11, ""));
  ASSERT_TRUE(script_.Await(2));
  proto::CancelRequest cancel;
  cancel.set_request_id(11);
  ASSERT_TRUE(socket.SendFrame(Op::kCancel, 12, cancel.SerializeAsString()));
  const std::optional<RawFrame> answer = socket.ReadFrame();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->header.request_id, 12U);
  EXPECT_FALSE(answer->IsError());
  EXPECT_TRUE(script_.IsCancelled(1));
  EXPECT_FALSE(script_.IsCancelled(0));
}

TEST_P(RequestsUnderWayTest, DisconnectCancelsWhatIsUnderWay) {
  Start();
  {
    RawSocket socket = Greeted();
    ASSERT_TRUE(socket.SendFrame(Op::kAttend, 1, ""));
    ASSERT_TRUE(socket.SendFrame(Op::kAppend, 2, "", std::string(1000, 'a')));
    ASSERT_TRUE(script_.Await(2));
  }
  EXPECT_TRUE(script_.AwaitCancelled(0));
  EXPECT_TRUE(script_.AwaitCancelled(1));
  script_.Answer(0, "too late");  // goes nowhere, and does no harm
  RawSocket next = Greeted();
  ExpectAlive(next);
}

TEST_P(RequestsUnderWayTest, AnIdMayBeUsedAgainAsSoonAsItIsAnswered) {
  options_.io_threads = 2;
  Start();
  RawSocket socket = Greeted();
  constexpr size_t kTimes = 2000;
  std::thread worker([&] {
    for (size_t at = 0; at < kTimes && script_.Await(at + 1); ++at) script_.Answer(at, "", 64);
  });
  size_t answered = 0;
  for (; answered < kTimes; ++answered) {
    EXPECT_TRUE(socket.SendFrame(Op::kAttend, 8, ""));
    const std::optional<RawFrame> answer = socket.ReadFrame();
    if (!answer.has_value() || answer->IsError()) break;
  }
  EXPECT_EQ(answered, kTimes);
  worker.join();
}

TEST_P(RequestsUnderWayTest, PeersAndServerMayGoWhileWorkersSend) {
  options_.shutdown_grace = milliseconds(1);
  options_.inflight_requests_max = 400;
  Start();
  constexpr uint64_t kRequests = 100;
  std::vector<RawSocket> sockets;
  for (int i = 0; i < 4; ++i) {
    sockets.push_back(Greeted());
    for (uint64_t id = 1; id <= kRequests; ++id) {
      ASSERT_TRUE(sockets.back().SendFrame(Op::kAttend, id, ""));
    }
  }
  ASSERT_TRUE(script_.Await(4 * kRequests));
  std::atomic<size_t> next{0};
  std::vector<std::thread> workers;
  for (int i = 0; i < 3; ++i) {
    workers.emplace_back([&] {
      for (size_t at = next++; at < 4 * kRequests; at = next++) {
        script_.Answer((at * 101) % (4 * kRequests), "", 20000);
      }
    });
  }
  while (next < 50) std::this_thread::yield();
  sockets[0].Close();
  sockets[1].Close();
  while (next < 200) std::this_thread::yield();
  server_->Stop();  // waits for all answers
  EXPECT_EQ(server_->connections_open(), 0U);
  for (std::thread& worker : workers) worker.join();
}

TEST_P(RequestsUnderWayTest, ReadingPausesWhenTooManyAreUnderWay) {
  options_.inflight_requests_max = 4;
  Start();
  RawSocket socket = Greeted();
  for (uint64_t id = 1; id <= 10; ++id) ASSERT_TRUE(socket.SendFrame(Op::kAttend, id, ""));
  ASSERT_TRUE(script_.Await(4));
  std::this_thread::sleep_for(milliseconds(100));
  EXPECT_EQ(script_.held(), 4U);
  for (size_t i = 0; i < 10; ++i) {
    ASSERT_TRUE(script_.Await(i + 1));
    script_.Answer(i, "");
    const std::optional<RawFrame> answer = socket.ReadFrame();
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->header.request_id, i + 1);
  }
}

TEST_P(RequestsUnderWayTest, CancelPassesAFullHouse) {
  options_.inflight_requests_max = 1;
  Start();
  RawSocket socket = Greeted();
  ASSERT_TRUE(socket.SendFrame(Op::kAttend, 1, ""));
  proto::CancelRequest cancel;
  cancel.set_request_id(1);
  ASSERT_TRUE(socket.SendFrame(Op::kCancel, 2, cancel.SerializeAsString()));
  ASSERT_TRUE(script_.Await(1));
  EXPECT_TRUE(script_.AwaitCancelled(0));
}

}  // namespace
}  // namespace kvseek::service
