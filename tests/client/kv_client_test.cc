// The client against daemons that greet and answer wrongly: each call ends with the right code.
#include "client/kv_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "proto/status_code.h"
#include "tests/client/client_fixture.h"

namespace kvseek {
namespace {

using proto::Op;
using std::chrono::milliseconds;
using test::FakeServer;
using test::HealthAnswer;
using test::kShape;
using test::MakeFrame;
using test::RawFrame;
using test::RawSocket;
using Clock = std::chrono::steady_clock;

class KvClientTest : public test::ClientTest {};

TEST_F(KvClientTest, UnreachableIsUnavailableAtOnce) {
  const auto before = Clock::now();
  EXPECT_EQ(KvClient::Connect(options()).status().code(), absl::StatusCode::kUnavailable);
  ClientOptions tcp = options();
  tcp.address = "tcp://127.0.0.1:1";
  EXPECT_EQ(KvClient::Connect(tcp).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_LT(Clock::now() - before, milliseconds(250));
}

TEST_F(KvClientTest, AddressesThatAreNone) {
  for (const char* address : {"", "unix:", "shm:", "tcp://", "tcp://host", "tcp://:1",
                              "tcp://host:", "http://host:1", "/tmp/socket"}) {
    ClientOptions bad = options();
    bad.address = address;
    const absl::Status status = KvClient::Connect(bad).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << address << status;
    EXPECT_EQ(ErrorField(status), "address");
  }
}

TEST_F(KvClientTest, DaemonThatNeverSaysHello) {
  FakeServer server(path(), [](RawSocket& socket) {
    while (!socket.Ended()) {
    }
  });
  const auto before = Clock::now();
  EXPECT_EQ(KvClient::Connect(options()).status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_LT(Clock::now() - before, milliseconds(1500));
}

TEST_F(KvClientTest, DaemonThatAnswersHelloWithGarbage) {
  FakeServer server(path(), [](RawSocket& socket) { socket.Send(std::string(1000, 'g')); });
  EXPECT_EQ(KvClient::Connect(options()).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(KvClientTest, SharedMemoryIsGrantedOrNothing) {
  ClientOptions shared = options();
  shared.address = "shm:" + path();
  EXPECT_EQ(KvClient::Connect(shared).status().code(), absl::StatusCode::kUnavailable);
  {
    FakeServer server(path(), [](RawSocket& socket) {
      FakeServer::Welcome(socket, 1U << 20, proto::kUncheckedPayloads);
      socket.Ended();
    });
    const absl::Status status = KvClient::Connect(shared).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr("shared memory"));
  }
  unlink(path().c_str());
  {
    FakeServer server(path(), [](RawSocket& socket) {  // bytes, but no memory
      FakeServer::Welcome(socket, 1U << 20, proto::kSharedMemory);
      socket.Send("x");
      socket.Ended();
    });
    EXPECT_EQ(KvClient::Connect(shared).status().code(), absl::StatusCode::kDataLoss);
  }
  unlink(path().c_str());
  {
    FakeServer server(path(), [](RawSocket& socket) {  // nothing at all
      FakeServer::Welcome(socket, 1U << 20, proto::kSharedMemory);
      socket.Ended();
    });
    EXPECT_EQ(KvClient::Connect(shared).status().code(), absl::StatusCode::kDeadlineExceeded);
  }
  unlink(path().c_str());
  {
    FakeServer server(path(), [](RawSocket& socket) {  // not the sizes that it said
      FakeServer::Welcome(socket, 1U << 20, proto::kSharedMemory);
      auto rings = transport::SharedRings::Create({.request_bytes = 8192, .answer_bytes = 4096});
      EXPECT_TRUE(rings.ok() && socket.Share(*std::move(rings)));
      socket.Ended();
    });
    EXPECT_EQ(KvClient::Connect(shared).status().code(), absl::StatusCode::kDataLoss);
  }
}

TEST_F(KvClientTest, DaemonThatMisbehavesInSharedMemory) {
  ClientOptions shared = options();
  shared.address = "shm:" + path();
  int connections = 0;
  FakeServer server(path(), [&](RawSocket& socket) {
    FakeServer::Welcome(socket, 1U << 20, proto::kSharedMemory);
    auto rings = transport::SharedRings::Create({.request_bytes = 4096, .answer_bytes = 4096});
    ASSERT_TRUE(rings.ok() && socket.Share(*std::move(rings)));
    const auto request = socket.ReadFrame();
    if (!request.has_value()) return;
    const std::string answer = HealthAnswer(request->header.request_id);
    if (connections == 0) socket.Send(answer);
    if (connections == 1) socket.Send(std::string(1000, 'g'));
    if (connections == 2) socket.Send(answer.substr(0, answer.size() - 1));  // and gone
    if (connections == 3) socket.Ended(milliseconds(1000));
    ++connections;
  });
  const auto client = Connect(shared);
  ASSERT_NE(client, nullptr);
  EXPECT_TRUE(client->Health().ok());
  for (const absl::StatusCode code : {absl::StatusCode::kDataLoss, absl::StatusCode::kUnavailable,
                                      absl::StatusCode::kDeadlineExceeded}) {
    absl::Status status = client->Health();
    // The first connection's end may be noticed by the call, or before it.
    if (status.code() != code) status = client->Health();
    EXPECT_EQ(status.code(), code) << status;
  }
}

TEST_F(KvClientTest, DaemonThatHangsUpAtHello) {
  FakeServer server(path(), [](RawSocket& socket) { socket.Close(); });
  EXPECT_EQ(KvClient::Connect(options()).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(KvClientTest, RefusedHelloSaysWhy) {
  FakeServer server(path(), [](RawSocket& socket) {
    const auto hello = socket.ReadFrame();
    proto::Error error =
        proto::ToError(proto::FieldError(absl::StatusCode::kUnauthenticated, "token", "wrong"));
    socket.SendFrame(Op::kHello, hello->header.request_id, error.SerializeAsString(), "", 0,
                     proto::kFlagResponse | proto::kFlagError);
  });
  const absl::Status status = KvClient::Connect(options()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(ErrorField(status), "token");
}

TEST_F(KvClientTest, HelloCarriesTokenAndInfoComesBack) {
  std::string token;
  FakeServer server(path(), [&](RawSocket& socket) {
    const auto frame = socket.ReadFrame();
    proto::HelloRequest hello;
    ASSERT_TRUE(hello.ParseFromString(frame->metadata));
    token = hello.token();
    proto::HelloResponse welcome;
    welcome.set_version(proto::kVersion);
    welcome.set_boot_id(77);
    welcome.set_server("fake 1");
    welcome.set_simd_level("none");
    socket.SendFrame(Op::kHello, frame->header.request_id, welcome.SerializeAsString(), "", 0,
                     proto::kFlagResponse);
    socket.Ended();
  });
  ClientOptions with_token = options();
  with_token.token = "secret";
  const auto client = Connect(with_token);
  ASSERT_NE(client, nullptr);
  EXPECT_EQ(token, "secret");
  EXPECT_EQ(client->info().boot_id, 77U);
  EXPECT_EQ(client->info().server, "fake 1");
  EXPECT_EQ(client->info().simd_level, "none");
}

TEST_F(KvClientTest, AnswersAreJudged) {
  EXPECT_TRUE(HealthAnsweredBy(HealthAnswer).ok());
  const auto code = [&](const std::function<std::string(uint64_t)>& frame) {
    return HealthAnsweredBy(frame).code();
  };
  EXPECT_EQ(code([](uint64_t) { return std::string(5000, 'x'); }), absl::StatusCode::kDataLoss);
  EXPECT_EQ(
      code([](uint64_t id) { return MakeFrame(Op::kStats, id, "", "", 0, proto::kFlagResponse); }),
      absl::StatusCode::kDataLoss);
  EXPECT_EQ(code([](uint64_t id) { return MakeFrame(Op::kHealth, id, ""); }),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(code([](uint64_t id) {
              return MakeFrame(Op::kHealth, id, "\xff\xff", "", 0, proto::kFlagResponse);
            }),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(code([](uint64_t id) {
              return MakeFrame(Op::kHealth, id, "\xff\xff", "", 0,
                               proto::kFlagResponse | proto::kFlagError);
            }),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(code([](uint64_t id) {  // an Error without a code is still an error
              return MakeFrame(Op::kHealth, id, "", "", 0,
                               proto::kFlagResponse | proto::kFlagError);
            }),
            absl::StatusCode::kUnknown);
  EXPECT_EQ(code([](uint64_t id) {  // not serving
              return MakeFrame(Op::kHealth, id, "", "", 0, proto::kFlagResponse);
            }),
            absl::StatusCode::kUnavailable);
}

TEST_F(KvClientTest, ErrorsKeepFieldAndRetryAfter) {
  const absl::Status status = HealthAnsweredBy([](uint64_t id) {
    const proto::Error error = proto::ToError(proto::Exhausted("queue", "full", 40));
    return MakeFrame(Op::kHealth, id, error.SerializeAsString(), "", 0,
                     proto::kFlagResponse | proto::kFlagError);
  });
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(RetryAfter(status), milliseconds(40));
  EXPECT_EQ(ErrorField(status), "queue");
}

TEST_F(KvClientTest, DamagedPayloadIsDataLossAndTheConnectionGoesOn) {
  std::atomic<int> requests{0};
  FakeServer server(path(), [&](RawSocket& socket) {
    if (!FakeServer::Welcome(socket)) return;
    while (const auto request = socket.ReadFrame()) {
      const uint64_t id = request->header.request_id;
      std::string frame = HealthAnswer(id);
      if (requests++ == 0) {
        frame = MakeFrame(Op::kHealth, id, "", std::string(100, 'p'), 0, proto::kFlagResponse);
        frame[80] = 'q';
      }
      socket.Send(frame);
    }
  });
  const auto client = Connect();
  EXPECT_EQ(client->Health().code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(client->Health().ok());
}

TEST_F(KvClientTest, PayloadsGoUncheckedWhereTheDaemonGrantsIt) {
  constexpr Session kSession{.boot_id = 7, .session_id = 1, .shape = kShape};
  const std::vector<int64_t> positions = {3, 5};
  for (const bool granted : {false, true}) {
    SCOPED_TRACE(granted);
    unlink(path().c_str());
    std::vector<RawFrame> requests;
    {
      FakeServer server(path(), [&](RawSocket& socket) {
        if (!FakeServer::Welcome(socket, 1U << 20, granted ? proto::kUncheckedPayloads : "rows")) {
          return;
        }
        while (const auto request = socket.ReadFrame(!granted)) {
          requests.push_back(*request);
          std::string frame = MakeFrame(Op::kFetchRows, request->header.request_id, "",
                                        std::string(64 + 32, 'r'), 0, proto::kFlagResponse);
          if (requests.size() > 1) frame.back() = static_cast<char>(frame.back() ^ 1);
          socket.Send(frame);
        }
      });
      const auto client = Connect();
      ASSERT_NE(client, nullptr);
      EXPECT_TRUE(client->FetchRows(kSession, 0, 0, positions).ok());
      EXPECT_EQ(client->FetchRows(kSession, 0, 0, positions).status().code(),
                granted ? absl::StatusCode::kOk : absl::StatusCode::kDataLoss);
    }
    ASSERT_EQ(requests.size(), 2U);  // whole frames, with right checksums unless it was granted
    for (const RawFrame& request : requests) {
      EXPECT_EQ(request.payload.size(), 16U);
      if (granted) {
        EXPECT_THAT(request.trailer, testing::Each(0));
      }
    }
  }
}

TEST_F(KvClientTest, UncheckedPayloadsAreAskedForOnUnixSocketsOnly) {
  std::vector<bool> asked;
  const FakeServer::Script script = [&](RawSocket& socket) {
    const auto frame = socket.ReadFrame();
    proto::HelloRequest hello;
    if (!frame.has_value() || !hello.ParseFromString(frame->metadata)) return;
    asked.push_back(std::ranges::count(hello.features(), proto::kUncheckedPayloads) == 1);
  };
  {
    FakeServer server(path(), script);
    EXPECT_FALSE(KvClient::Connect(options()).ok());  // the script hangs up
  }

  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(at);
  ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&at), size), 0);
  ASSERT_EQ(listen(listener, 1), 0);
  ASSERT_EQ(getsockname(listener, reinterpret_cast<sockaddr*>(&at), &size), 0);
  std::thread daemon([&] {
    RawSocket accepted(accept(listener, nullptr, nullptr));
    script(accepted);
  });
  ClientOptions tcp = options();
  tcp.address = "tcp://127.0.0.1:" + std::to_string(ntohs(at.sin_port));
  EXPECT_FALSE(KvClient::Connect(tcp).ok());
  daemon.join();
  close(listener);
  EXPECT_THAT(asked, testing::ElementsAre(true, false));
}

TEST_F(KvClientTest, TooLargeAnswerIsSkipped) {
  std::atomic<int> requests{0};
  FakeServer server(path(), [&](RawSocket& socket) {
    if (!FakeServer::Welcome(socket)) return;
    while (const auto request = socket.ReadFrame()) {
      const uint64_t id = request->header.request_id;
      socket.Send(requests++ == 0 ? MakeFrame(Op::kHealth, id, "", std::string(200000, 'p'), 0,
                                              proto::kFlagResponse)
                                  : HealthAnswer(id));
    }
  });
  ClientOptions small = options();
  small.payload_bytes_max = 100000;
  const auto client = Connect(small);
  EXPECT_EQ(client->Health().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(client->Health().ok());
}

TEST_F(KvClientTest, ARequestOverTheDaemonsLimitsIsNotSent) {
  std::atomic<int> requests{0};
  FakeServer server(path(), [&](RawSocket& socket) {
    if (!FakeServer::Welcome(socket, 1000)) return;
    while (const auto request = socket.ReadFrame()) {
      ++requests;
      socket.Send(HealthAnswer(request->header.request_id));
    }
  });
  const auto client = Connect();
  const Session session{.boot_id = 7, .session_id = 1, .shape = kShape};
  const std::vector<uint16_t> rows(100 * 16);
  const absl::Status status = client->Append(session, 0, 0, 100, rows, rows).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorField(status), "payload_bytes");
  EXPECT_TRUE(client->Health().ok());
  EXPECT_EQ(requests.load(), 1);
}

TEST_F(KvClientTest, BadRequestsAreNotSentEither) {
  FakeServer server(path(), [&](RawSocket& socket) {
    if (FakeServer::Welcome(socket)) socket.Ended();
  });
  const auto client = Connect();
  const auto field = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return ErrorField(status);
  };
  ModelShape uneven = kShape;
  uneven.query_heads = 5;
  EXPECT_EQ(field(client->Open(uneven, {}).status()), "shape.query_heads");
  const Session session{.boot_id = 7, .session_id = 1, .shape = kShape};
  const std::vector<uint16_t> rows(16);
  EXPECT_EQ(field(client->Append(session, 2, 0, 1, rows, rows).status()), "layer");
  EXPECT_EQ(field(client->Append(session, 0, 0, 2, rows, rows).status()), "keys");
  EXPECT_EQ(field(client->Attend({}).status()), "items");
  const std::vector<float> queries(4 * 8);
  QueryItem item{.session = session, .queries = AsBytes(absl::MakeConstSpan(queries))};
  QueryItem two = item;
  two.tokens = 2;
  EXPECT_EQ(field(client->Attend({.items = {item, two}}).status()), "items[1].queries");
  two = item;
  two.range_end = {1, 2};
  EXPECT_EQ(field(client->TopK({.items = {item, two}}).status()), "items[1].range_end");
  EXPECT_EQ(field(client->FetchRows(session, 0, 2, {0}).status()), "kv_head");
}

}  // namespace
}  // namespace kvseek
