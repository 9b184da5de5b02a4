// One connection at a time: what a peer may do wrong, and what becomes of it. Answers come from a
// script instead of the request handler.
#include "service/connection.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "proto/status_code.h"
#include "tests/client/raw_socket.h"

namespace kvseek::service {
namespace {

using proto::Op;
using std::chrono::milliseconds;
using test::MakeFrame;
using test::RawFrame;
using test::RawSocket;
using Clock = std::chrono::steady_clock;

/// Holds requests until the test answers them.
class Script {
 public:
  struct Held {
    Request request;
    std::function<void(Response)> done;
  };

  Dispatch dispatch() {
    return [this](Request request, std::function<void(Response)> done) {
      if (request.op == Op::kHealth) {  // echoes, at once
        Response response;
        response.metadata = request.metadata;
        response.payload = std::move(request.payload);
        done(std::move(response));
        return;
      }
      std::lock_guard<std::mutex> lock(mutex_);
      held_.push_back({std::move(request), std::move(done)});
      changed_.notify_all();
    };
  }
  /// Waits until `count` requests are held.
  bool Await(size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(10), [&] { return held_.size() >= count; });
  }
  size_t held() {
    std::lock_guard<std::mutex> lock(mutex_);
    return held_.size();
  }
  bool IsCancelled(size_t index) {
    std::lock_guard<std::mutex> lock(mutex_);
    return held_[index].request.cancelled->load();
  }
  bool AwaitCancelled(size_t index) {
    for (int i = 0; i < 1000 && !IsCancelled(index); ++i) {
      std::this_thread::sleep_for(milliseconds(10));
    }
    return IsCancelled(index);
  }
  Request& request(size_t index) { return held_[index].request; }
  void Answer(size_t index, const std::string& metadata, size_t payload_bytes = 0) {
    Response response;
    response.metadata = metadata;
    if (payload_bytes != 0) {
      response.payload.data = index::MakeAligned<uint8_t>(payload_bytes);
      std::memset(response.payload.data.get(), 'p', payload_bytes);
      response.payload.bytes = payload_bytes;
    }
    std::function<void(Response)> done;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      done = std::move(held_[index].done);
      held_[index].done = nullptr;
    }
    done(std::move(response));
  }
  void AnswerAll() {
    for (size_t i = 0; i < held(); ++i) {
      if (held_[i].done) Answer(i, "end");
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Held> held_;
};

enum class Transport { kUnix, kTcp, kShared, kSharedSpinning };

class ConnectionTest : public testing::TestWithParam<Transport> {
 protected:
  void SetUp() override { options_.shared_ring_bytes = 16 << 10; }  // so that frames are larger
  void Start() {
    options_.listen = {GetParam() == Transport::kTcp ? "tcp://127.0.0.1:0"
                                                     : "unix:" + dir_.path() + "/s"};
    if (GetParam() == Transport::kSharedSpinning) {
      options_.io_spin = std::chrono::microseconds(200);
    }
    auto server = Server::Start(options_, {.boot_id = 5, .server = "test", .simd_level = "none"},
                                script_.dispatch());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  void TearDown() override {
    script_.AnswerAll();
    if (server_ != nullptr) server_->Stop();
  }
  static bool IsShared() {
    return GetParam() == Transport::kShared || GetParam() == Transport::kSharedSpinning;
  }
  RawSocket Dial() {
    const std::string& address = server_->addresses()[0];
    return RawSocket::Connect(IsShared() ? "shm:" + dir_.path() + "/s" : address);
  }
  RawSocket Greeted() {
    RawSocket socket = Dial();
    EXPECT_TRUE(socket.Greet(options_.token));
    return socket;
  }
  static absl::StatusCode CodeOf(const std::optional<RawFrame>& frame) {
    return frame.has_value() ? static_cast<absl::StatusCode>(frame->Error().code())
                             : absl::StatusCode::kUnknown;
  }
  /// The peer is told `code` on `request_id`, and the stream ends.
  static void ExpectLastWords(RawSocket& socket, uint64_t request_id, absl::StatusCode code,
                              const std::string& field) {
    const std::optional<RawFrame> answer = socket.ReadFrame();
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->header.request_id, request_id);
    EXPECT_EQ(CodeOf(answer), code) << answer->Error().message();
    EXPECT_THAT(answer->Error().message(), testing::HasSubstr(field));
    EXPECT_TRUE(socket.Ended());
  }
  /// The connection answers as it should.
  static void ExpectAlive(RawSocket& socket, uint64_t request_id = 999) {
    ASSERT_TRUE(socket.SendFrame(Op::kHealth, request_id, "echo", "tensor"));
    const std::optional<RawFrame> answer = socket.ReadFrame();
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->header.request_id, request_id);
    EXPECT_EQ(answer->header.flags, proto::kFlagResponse);
    EXPECT_EQ(answer->metadata, "echo");
    EXPECT_EQ(answer->payload, "tensor");
  }

  test::TempDir dir_;
  DaemonOptions options_;
  Script script_;
  std::unique_ptr<Server> server_;
};

std::string NameOf(const testing::TestParamInfo<Transport>& at) {
  constexpr std::array kNames = {"Unix", "Tcp", "Shared", "SharedSpinning"};
  return kNames[static_cast<size_t>(at.param)];
}

INSTANTIATE_TEST_SUITE_P(Transports, ConnectionTest,
                         testing::Values(Transport::kUnix, Transport::kTcp, Transport::kShared,
                                         Transport::kSharedSpinning),
                         NameOf);

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

TEST_P(ConnectionTest, AnswersComeInAnyOrder) {
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

TEST_P(ConnectionTest, DeadlineIsCountedFromArrival) {
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

TEST_P(ConnectionTest, CancelReachesTheRequestAndIsAnswered) {
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

TEST_P(ConnectionTest, DisconnectCancelsWhatIsUnderWay) {
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

TEST_P(ConnectionTest, AnIdMayBeUsedAgainAsSoonAsItIsAnswered) {
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

TEST_P(ConnectionTest, PeersAndServerMayGoWhileWorkersSend) {
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

TEST_P(ConnectionTest, ReadingPausesWhenTooManyAreUnderWay) {
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

TEST_P(ConnectionTest, CancelPassesAFullHouse) {
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

TEST_P(ConnectionTest, ReadingPausesWhenTooManyBytesAreHeld) {
  options_.inflight_bytes_max = 250000;
  options_.shared_ring_bytes = 128 << 10;  // takes the frame that nobody reads
  Start();
  RawSocket first = Greeted();
  RawSocket second = Greeted();
  const std::string payload(100000, 'b');
  ASSERT_TRUE(first.SendFrame(Op::kAppend, 1, "", payload));
  ASSERT_TRUE(first.SendFrame(Op::kAppend, 2, "", payload));
  ASSERT_TRUE(script_.Await(2));
  ASSERT_TRUE(second.SendFrame(Op::kAppend, 3, "", payload));
  std::this_thread::sleep_for(milliseconds(100));
  EXPECT_EQ(script_.held(), 2U);
  RawSocket third = Greeted();
  ASSERT_TRUE(third.SendFrame(Op::kHealth, 1, ""));  // holds nothing, so it need not wait
  EXPECT_TRUE(third.ReadFrame().has_value());
  script_.Answer(0, "");
  ASSERT_TRUE(script_.Await(3));
  EXPECT_EQ(script_.request(2).payload.bytes, payload.size());
}

TEST_P(ConnectionTest, ARequestLargerThanTheGateGoesAlone) {
  options_.inflight_bytes_max = 1000;
  Start();
  RawSocket socket = Greeted();
  ASSERT_TRUE(socket.SendFrame(Op::kAppend, 1, "", std::string(5000, 'b')));
  ASSERT_TRUE(script_.Await(1));
}

TEST(ByteGateTest, LetsWaitersThroughInOrder) {
  ByteGate gate(100);
  EXPECT_TRUE(gate.TryTake(60));
  EXPECT_FALSE(gate.TryTake(50));
  std::vector<int> order;
  gate.Take(50, [&] { order.push_back(1); });
  gate.Take(10, [&] { order.push_back(2); });  // would fit, but it is not its turn
  EXPECT_FALSE(gate.TryTake(1));
  EXPECT_TRUE(order.empty());
  gate.Release(60);
  EXPECT_THAT(order, testing::ElementsAre(1, 2));
  EXPECT_TRUE(gate.TryTake(40));
  EXPECT_FALSE(gate.TryTake(1));
}

}  // namespace
}  // namespace kvseek::service
