// One connection at a time: what a peer may do wrong, and what becomes of it.
#include "service/connection.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "proto/status_code.h"
#include "tests/service/connection_fixture.h"

namespace kvseek::service {
namespace {

using proto::Op;
using std::chrono::milliseconds;
using test::MakeFrame;
using test::RawFrame;
using test::RawSocket;
using Clock = std::chrono::steady_clock;

class ConnectionTest : public ScriptedServerTest {};

INSTANTIATE_TEST_SUITE_P(Transports, ConnectionTest, AllTransports(), NameOf);

TEST_P(ConnectionTest, HelloTellsWhoAnswersAndItsLimits) {
  options_.payload_bytes_max = 12345;
  Start();
  RawSocket socket = Dial();
  ASSERT_TRUE(socket.SendHello());
  const std::optional<RawFrame> answer = socket.ReadFrame();
  ASSERT_TRUE(answer.has_value());
  proto::HelloResponse welcome;
  ASSERT_TRUE(welcome.ParseFromString(answer->metadata));
  EXPECT_EQ(welcome.version(), proto::kVersion);
  EXPECT_EQ(welcome.boot_id(), 5U);
  EXPECT_EQ(welcome.server(), "test");
  EXPECT_EQ(welcome.limits().payload_bytes_max(), 12345U);
  EXPECT_EQ(welcome.limits().inflight_requests_max(), options_.inflight_requests_max);
  ExpectAlive(socket);
  EXPECT_EQ(server_->connections_open(), 1U);
}

TEST_P(ConnectionTest, PayloadsGoUncheckedOnUnixSocketsThatAskForIt) {
  const bool is_unix = GetParam() != Transport::kTcp;
  Start();
  for (const bool asks : {false, true}) {
    SCOPED_TRACE(asks);
    RawSocket socket = Dial();
    proto::HelloRequest hello;
    hello.set_version_min(1);
    hello.set_version_max(1);
    hello.add_features("rows");  // not known here
    if (asks) hello.add_features(proto::kUncheckedPayloads);
    ASSERT_TRUE(socket.SendFrame(Op::kHello, 1, hello.SerializeAsString()));
    std::optional<RawFrame> answer = socket.ReadFrame();
    ASSERT_TRUE(answer.has_value());
    proto::HelloResponse welcome;
    ASSERT_TRUE(welcome.ParseFromString(answer->metadata));
    const bool unchecked = is_unix && asks;
    ASSERT_EQ(welcome.features_size(), unchecked ? 1 : 0);
    if (unchecked) {
      EXPECT_EQ(welcome.features(0), proto::kUncheckedPayloads);
    }

    std::string frame = MakeFrame(Op::kHealth, 2, "m", "tensor");
    frame.back() = static_cast<char>(frame.back() ^ 1);
    ASSERT_TRUE(socket.Send(frame));
    answer = socket.ReadFrame(!unchecked);
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->header.request_id, 2U);
    if (unchecked) {
      EXPECT_EQ(answer->payload, "tensor");
      EXPECT_THAT(answer->trailer, testing::Each(0));
    } else {
      EXPECT_EQ(CodeOf(answer), absl::StatusCode::kDataLoss);
    }
    ASSERT_TRUE(socket.SendFrame(Op::kAttend, 3, ""));  // as workers answer
    ASSERT_TRUE(script_.Await(asks ? 2 : 1));
    script_.Answer(asks ? 1 : 0, "", 1000);
    answer = socket.ReadFrame(!unchecked);
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->payload, std::string(1000, 'p'));
    if (unchecked) {
      EXPECT_THAT(answer->trailer, testing::Each(0));
    }
  }
}

TEST_P(ConnectionTest, FirstRequestMustBeHello) {
  Start();
  RawSocket socket = Dial();
  ASSERT_TRUE(socket.SendFrame(Op::kHealth, 3, ""));
  ExpectLastWords(socket, 3, absl::StatusCode::kFailedPrecondition, "op");
}

TEST_P(ConnectionTest, VersionsMustOverlap) {
  Start();
  RawSocket socket = Dial();
  proto::HelloRequest hello;
  hello.set_version_min(proto::kVersion + 1);
  hello.set_version_max(proto::kVersion + 5);
  ASSERT_TRUE(socket.SendFrame(Op::kHello, 1, hello.SerializeAsString()));
  ExpectLastWords(socket, 1, absl::StatusCode::kFailedPrecondition, "version");

  RawSocket later = Dial();
  hello.set_version_min(1);
  ASSERT_TRUE(later.SendFrame(Op::kHello, 1, hello.SerializeAsString()));
  const std::optional<RawFrame> answer = later.ReadFrame();
  ASSERT_TRUE(answer.has_value());
  EXPECT_FALSE(answer->IsError());
}

TEST_P(ConnectionTest, TokenIsAskedFor) {
  options_.token = "open sesame";
  Start();
  for (const char* wrong : {"", "open", "open sesamf", "open sesame!", "open sesameopen sesame"}) {
    RawSocket socket = Dial();
    ASSERT_TRUE(socket.SendHello(wrong));
    ExpectLastWords(socket, 1, absl::StatusCode::kUnauthenticated, "token");
  }
  RawSocket right = Dial();
  EXPECT_TRUE(right.Greet("open sesame"));
  ExpectAlive(right);
}

TEST_P(ConnectionTest, GarbageHelloIsRefused) {
  Start();
  RawSocket socket = Dial();
  ASSERT_TRUE(socket.SendFrame(Op::kHello, 1, "\xff\xff\xff"));
  ExpectLastWords(socket, 1, absl::StatusCode::kInvalidArgument, "HelloRequest");
  RawSocket large = Dial();
  ASSERT_TRUE(large.SendFrame(Op::kHello, 1, "", std::string(100, 'x')));
  ExpectLastWords(large, 0, absl::StatusCode::kResourceExhausted, "payload_bytes");
}

TEST_P(ConnectionTest, WrongMagicEndsTheConnection) {
  Start();
  RawSocket socket = Greeted();
  std::string frame = MakeFrame(Op::kHealth, 4, "");
  frame[0] = 'X';
  ASSERT_TRUE(socket.Send(frame));
  ExpectLastWords(socket, 0, absl::StatusCode::kDataLoss, "magic");
}

TEST_P(ConnectionTest, DamagedHeaderEndsTheConnection) {
  Start();
  RawSocket socket = Greeted();
  std::string frame = MakeFrame(Op::kHealth, 4, "");
  frame[9] = static_cast<char>(frame[9] ^ 1);
  ASSERT_TRUE(socket.Send(frame));
  ExpectLastWords(socket, 0, absl::StatusCode::kDataLoss, "checksum");
}

TEST_P(ConnectionTest, OversizedFramesAreRefusedUnread) {
  options_.payload_bytes_max = 1000;
  Start();
  RawSocket socket = Greeted();
  proto::FrameHeader header;
  header.op = Op::kAppend;
  header.request_id = 2;
  header.payload_bytes = 1001;
  std::string head(proto::kHeaderBytes, '\0');
  proto::EncodeHeader(header, reinterpret_cast<uint8_t*>(head.data()));
  ASSERT_TRUE(socket.Send(head));
  ExpectLastWords(socket, 0, absl::StatusCode::kResourceExhausted, "payload_bytes");
}

TEST_P(ConnectionTest, RequestIdZeroIsRefused) {
  Start();
  RawSocket socket = Greeted();
  ASSERT_TRUE(socket.SendFrame(Op::kHealth, 0, ""));
  ExpectLastWords(socket, 0, absl::StatusCode::kInvalidArgument, "request_id");
}

TEST_P(ConnectionTest, MistakesInsideAFrameLeaveTheConnectionAlone) {
  Start();
  RawSocket socket = Greeted();
  const std::string payload(100000, 'y');
  ASSERT_TRUE(socket.SendFrame(static_cast<Op>(77), 2, "m", payload));
  std::optional<RawFrame> answer = socket.ReadFrame();
  EXPECT_EQ(CodeOf(answer), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(answer->Error().field(), "op");
  EXPECT_EQ(answer->header.request_id, 2U);

  ASSERT_TRUE(socket.SendHello());
  answer = socket.ReadFrame();
  EXPECT_EQ(CodeOf(answer), absl::StatusCode::kInvalidArgument);

  ASSERT_TRUE(socket.SendFrame(Op::kHealth, 3, "m", payload, 0, proto::kFlagResponse));
  answer = socket.ReadFrame();
  EXPECT_EQ(CodeOf(answer), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(answer->Error().field(), "flags");

  std::string damaged = MakeFrame(Op::kHealth, 4, "m", payload);
  damaged[1000] = static_cast<char>(damaged[1000] ^ 4);
  ASSERT_TRUE(socket.Send(damaged));
  answer = socket.ReadFrame();
  EXPECT_EQ(CodeOf(answer), IsShared() ? absl::StatusCode::kOk : absl::StatusCode::kDataLoss);
  EXPECT_EQ(answer->header.request_id, 4U);

  ASSERT_TRUE(socket.SendFrame(Op::kCancel, 5, "\xff\xff"));
  answer = socket.ReadFrame();
  EXPECT_EQ(CodeOf(answer), absl::StatusCode::kInvalidArgument);
  ExpectAlive(socket);
}

TEST_P(ConnectionTest, FramesMayComeByteByByte) {
  Start();
  RawSocket socket = Greeted();
  for (const char byte : MakeFrame(Op::kHealth, 6, "slow", "payload")) {
    ASSERT_TRUE(socket.Send(std::string(1, byte)));
  }
  const std::optional<RawFrame> answer = socket.ReadFrame();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->payload, "payload");
}

TEST_P(ConnectionTest, ManySizesComeThroughWhole) {
  Start();
  RawSocket socket = Greeted();
  for (const size_t size : {1, 63, 64, 65, 32767, 32768, 65503, 65536, 65537, 1 << 20, 5000001}) {
    std::string payload(size, '\0');
    for (size_t i = 0; i < size; ++i) payload[i] = static_cast<char>(i * 7 + size);
    std::thread sender([&] {
      EXPECT_TRUE(socket.SendFrame(Op::kHealth, size, std::string(size % 100, 'm'), payload));
    });
    const std::optional<RawFrame> answer = socket.ReadFrame();
    sender.join();
    ASSERT_TRUE(answer.has_value()) << size;
    EXPECT_EQ(answer->metadata.size(), size % 100);
    EXPECT_TRUE(answer->payload == payload) << size;
  }
}

TEST_P(ConnectionTest, TruncatedFrameAndGone) {
  Start();
  const std::string frame = MakeFrame(Op::kHealth, 1, "metadata", std::string(1000, 'x'));
  for (const size_t cut : {1UL, 31UL, 32UL, 36UL, 64UL, 500UL, frame.size() - 1}) {
    RawSocket socket = Greeted();
    ASSERT_TRUE(socket.Send(frame.substr(0, cut)));
  }
  RawSocket socket = Greeted();
  ExpectAlive(socket);
  for (int i = 0; i < 1000 && server_->connections_open() > 1; ++i) {
    std::this_thread::sleep_for(milliseconds(10));
  }
  EXPECT_EQ(server_->connections_open(), 1U);
}

TEST_P(ConnectionTest, SlowFrameIsCutOff) {
  options_.frame_timeout = milliseconds(100);
  Start();
  RawSocket socket = Greeted();
  std::this_thread::sleep_for(milliseconds(300));  // between frames there is no hurry
  ExpectAlive(socket);
  const auto before = Clock::now();
  ASSERT_TRUE(socket.Send(MakeFrame(Op::kHealth, 1, "metadata").substr(0, 35)));
  ExpectLastWords(socket, 0, absl::StatusCode::kDeadlineExceeded, "frame");
  EXPECT_LT(Clock::now() - before, milliseconds(2000));
}

TEST_P(ConnectionTest, SilentConnectionIsCutOff) {
  options_.hello_timeout = milliseconds(100);
  Start();
  RawSocket socket = Dial();
  ExpectLastWords(socket, 0, absl::StatusCode::kDeadlineExceeded, "");
}

TEST_P(ConnectionTest, PeerThatReadsNothingIsCutOff) {
  options_.frame_timeout = milliseconds(200);
  Start();
  RawSocket socket = Greeted();
  ASSERT_TRUE(socket.SendFrame(Op::kAttend, 1, ""));
  ASSERT_TRUE(script_.Await(1));
  script_.Answer(0, "", 64 << 20);
  for (int i = 0; i < 1000 && server_->connections_open() > 0; ++i) {
    std::this_thread::sleep_for(milliseconds(10));
  }
  EXPECT_EQ(server_->connections_open(), 0U);
}

TEST_P(ConnectionTest, AnswersOfManyWorkersReachASlowReaderWhole) {
  options_.inflight_requests_max = 400;
  Start();
  const unsigned seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  constexpr uint64_t kRequests = 300;
  std::vector<size_t> bytes;
  for (uint64_t id = 1; id <= kRequests; ++id) {  // some are more than a socket takes at once
    bytes.push_back(random() % (id % 10 == 0 ? 1U << 20 : 1U << 12));
  }
  RawSocket socket = Greeted();
  for (uint64_t id = 1; id <= kRequests; ++id) ASSERT_TRUE(socket.SendFrame(Op::kAttend, id, ""));
  ASSERT_TRUE(script_.Await(kRequests));
  std::atomic<size_t> next{0};
  std::vector<std::thread> workers;
  for (int i = 0; i < 4; ++i) {
    workers.emplace_back([&] {
      for (size_t at = next++; at < kRequests; at = next++) {
        script_.Answer(at, std::to_string(at + 1), bytes[at]);
      }
    });
  }
  std::set<uint64_t> seen;
  for (uint64_t i = 0; i < kRequests; ++i) {
    if (i % 16 == 0) std::this_thread::sleep_for(milliseconds(2));
    const std::optional<RawFrame> answer = socket.ReadFrame();
    if (!answer.has_value()) break;
    const uint64_t id = answer->header.request_id;
    EXPECT_TRUE(seen.insert(id).second);
    EXPECT_EQ(answer->metadata, std::to_string(id));
    EXPECT_TRUE(answer->payload == std::string(bytes[id - 1], 'p'));
  }
  EXPECT_EQ(seen.size(), kRequests);
  for (std::thread& worker : workers) worker.join();
  ExpectAlive(socket);
}

}  // namespace
}  // namespace kvseek::service
