// The client against daemons that misbehave: each call ends by its deadline with the right code.
#include "client/kv_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <future>
#include <mutex>
#include <thread>

#include "proto/status_code.h"
#include "tests/client/raw_socket.h"

namespace kvseek {
namespace {

using proto::Op;
using std::chrono::milliseconds;
using test::FakeServer;
using test::MakeFrame;
using test::RawFrame;
using test::RawSocket;
using Clock = std::chrono::steady_clock;

constexpr ModelShape kShape{
    .layers = 2, .kv_heads = 2, .query_heads = 4, .key_dim = 8, .value_dim = 8};

std::string HealthAnswer(uint64_t id) {
  proto::HealthResponse serving;
  serving.set_serving(true);
  return MakeFrame(Op::kHealth, id, serving.SerializeAsString(), "", 0, proto::kFlagResponse);
}

class KvClientTest : public testing::Test {
 protected:
  std::string path() const { return dir_.path() + "/s"; }
  ClientOptions options() const {
    ClientOptions options;
    options.address = "unix:" + path();
    options.connect_timeout = milliseconds(300);
    options.default_deadline = milliseconds(300);
    return options;
  }
  std::unique_ptr<KvClient> Connect() { return Connect(options()); }
  static std::unique_ptr<KvClient> Connect(const ClientOptions& options) {
    auto client = KvClient::Connect(options);
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? *std::move(client) : nullptr;
  }
  /// Code of one Health call against a daemon that answers it with `frame`, made from the request's
  /// id.
  absl::Status HealthAnsweredBy(const std::function<std::string(uint64_t)>& frame) {
    FakeServer server(path(), [&](RawSocket& socket) {
      if (!FakeServer::Welcome(socket)) return;
      while (const auto request = socket.ReadFrame()) {
        if (!socket.Send(frame(request->header.request_id))) return;
      }
    });
    const auto client = Connect();
    if (client == nullptr) return absl::UnknownError("no client");
    const auto before = Clock::now();
    absl::Status status = client->Health();
    EXPECT_LT(Clock::now() - before, milliseconds(2000));
    unlink(path().c_str());
    return status;
  }

  test::TempDir dir_;
};

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

TEST_F(KvClientTest, SpinningClientsKeepDeadlinesAndMissNothing) {
  for (const auto spin : {milliseconds(1), milliseconds(2000)}) {  // asleep by the deadline, or not
    unlink(path().c_str());
    FakeServer server(path(), [](RawSocket& socket) {
      if (!FakeServer::Welcome(socket)) return;
      for (int i = 0; const auto request = socket.ReadFrame(); ++i) {
        if (i == 3) continue;  // no answer
        std::this_thread::sleep_for(milliseconds(i));
        if (!socket.Send(HealthAnswer(request->header.request_id))) return;
      }
    });
    ClientOptions spinning = options();
    spinning.spin = spin;
    const auto client = Connect(spinning);
    ASSERT_NE(client, nullptr);
    for (int i = 0; i < 3; ++i) {
      EXPECT_TRUE(client->Health().ok());
      std::this_thread::sleep_for(milliseconds(3 * i));
    }
    const auto before = Clock::now();
    EXPECT_EQ(client->Health({.deadline = milliseconds(100)}).code(),
              absl::StatusCode::kDeadlineExceeded);
    EXPECT_GE(Clock::now() - before, milliseconds(100));
    EXPECT_LT(Clock::now() - before, milliseconds(1000));
    EXPECT_TRUE(client->Health().ok());
  }
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

TEST_F(KvClientTest, BreakInTheMiddleOfAnAnswer) {
  FakeServer server(path(), [](RawSocket& socket) {
    if (!FakeServer::Welcome(socket)) return;
    const auto request = socket.ReadFrame();
    if (!request.has_value()) return;
    const std::string frame = MakeFrame(Op::kHealth, request->header.request_id, "metadata",
                                        std::string(1000, 'p'), 0, proto::kFlagResponse);
    socket.Send(frame.substr(0, 500));
  });
  const auto client = Connect();
  EXPECT_EQ(client->Health().code(), absl::StatusCode::kUnavailable);
}

TEST_F(KvClientTest, LastWordsOfTheDaemonAreKept) {
  FakeServer server(path(), [](RawSocket& socket) {
    if (!FakeServer::Welcome(socket)) return;
    if (!socket.ReadFrame().has_value()) return;
    const proto::Error error = proto::ToError(absl::DataLossError("no such magic"));
    socket.SendFrame(Op::kHello, 0, error.SerializeAsString(), "", 0,
                     proto::kFlagResponse | proto::kFlagError);
  });
  const auto client = Connect();
  const absl::Status status = client->Health();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("no such magic"));
}

TEST_F(KvClientTest, DeadlineEndsACallAndALateAnswerIsDropped) {
  std::mutex mutex;
  std::vector<uint64_t> cancelled;
  std::vector<uint64_t> asked;
  FakeServer server(path(), [&](RawSocket& socket) {
    if (!FakeServer::Welcome(socket)) return;
    while (const auto request = socket.ReadFrame()) {
      std::lock_guard<std::mutex> lock(mutex);
      if (request->header.op == Op::kCancel) {
        proto::CancelRequest cancel;
        ASSERT_TRUE(cancel.ParseFromString(request->metadata));
        cancelled.push_back(cancel.request_id());
        socket.SendFrame(Op::kCancel, request->header.request_id, "", "", 0, proto::kFlagResponse);
        socket.Send(HealthAnswer(cancel.request_id()));  // late
        continue;
      }
      asked.push_back(request->header.request_id);
      if (asked.size() > 1) socket.Send(HealthAnswer(request->header.request_id));
    }
  });
  const auto client = Connect();
  const auto before = Clock::now();
  const absl::Status status = client->Health({.deadline = milliseconds(50)});
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_GE(Clock::now() - before, milliseconds(50));
  EXPECT_LT(Clock::now() - before, milliseconds(250));
  EXPECT_TRUE(client->Health().ok());
  EXPECT_TRUE(client->Health().ok());
  std::lock_guard<std::mutex> lock(mutex);
  ASSERT_EQ(cancelled.size(), 1U);
  EXPECT_EQ(cancelled[0], asked[0]);
}

TEST_F(KvClientTest, ADeadlineThatHasPassedSendsNothing) {
  std::atomic<int> requests{0};
  FakeServer server(path(), [&](RawSocket& socket) {
    if (!FakeServer::Welcome(socket)) return;
    while (socket.ReadFrame().has_value()) ++requests;
  });
  {
    const auto client = Connect();
    EXPECT_EQ(client->Health({.deadline = milliseconds(0)}).code(),
              absl::StatusCode::kDeadlineExceeded);
    EXPECT_EQ(client->Health({.deadline = milliseconds(-5)}).code(),
              absl::StatusCode::kDeadlineExceeded);
  }
  EXPECT_EQ(requests.load(), 0);
}

TEST_F(KvClientTest, DeadlineWhileADaemonTakesNothingIn) {
  std::promise<void> over;
  FakeServer server(path(), [&](RawSocket& socket) {
    if (!FakeServer::Welcome(socket, 1U << 30)) return;
    over.get_future().wait();
  });
  {
    const auto client = Connect();
    const Session session{.boot_id = 7, .session_id = 1, .shape = kShape};
    constexpr uint32_t kTokens = 400000;
    const std::vector<uint16_t> rows(size_t{kTokens} * 2 * 8);
    const auto before = Clock::now();
    // The first is half written when its time is up, the second has not begun.
    std::thread second([&] {
      std::this_thread::sleep_for(milliseconds(20));
      EXPECT_EQ(client->Append(session, 0, 0, kTokens, rows, rows).status().code(),
                absl::StatusCode::kDeadlineExceeded);
    });
    EXPECT_EQ(client->Append(session, 0, 0, kTokens, rows, rows).status().code(),
              absl::StatusCode::kDeadlineExceeded);
    second.join();
    EXPECT_LT(Clock::now() - before, milliseconds(2000));
  }
  over.set_value();
}

TEST_F(KvClientTest, TheNextCallConnectsAgain) {
  std::atomic<int> connections{0};
  FakeServer server(path(), [&](RawSocket& socket) {
    ++connections;
    if (!FakeServer::Welcome(socket)) return;
    const auto request = socket.ReadFrame();  // answers one, then hangs up
    if (request.has_value()) socket.Send(HealthAnswer(request->header.request_id));
  });
  const auto client = Connect();
  int served = 0;
  for (int i = 0; i < 20; ++i) {
    absl::Status status = client->Health();
    if (status.ok()) ++served;
    // A call that is sent just as the daemon hangs up is lost, and says so.
    EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kUnavailable) << status;
  }
  EXPECT_GE(served, 10);
  EXPECT_GE(connections.load(), served);
}

TEST_F(KvClientTest, ABreakFailsAllThatIsUnderWay) {
  constexpr int kCalls = 20;
  FakeServer server(path(), [](RawSocket& socket) {
    if (!FakeServer::Welcome(socket)) return;
    for (int i = 0; i < kCalls; ++i) socket.ReadFrame();
  });
  const auto client = Connect();
  const Session session{.boot_id = 7, .session_id = 1, .shape = kShape};
  const std::vector<uint16_t> rows(16);
  std::atomic<int> unavailable{0};
  std::promise<void> all;
  std::atomic<int> left{kCalls};
  for (int i = 0; i < kCalls; ++i) {
    client->AppendAsync(session, 0, 0, 1, rows, rows, {.deadline = std::chrono::seconds(20)},
                        [&](const absl::StatusOr<uint64_t>& held) {
                          if (held.status().code() == absl::StatusCode::kUnavailable) ++unavailable;
                          if (--left == 0) all.set_value();
                        });
  }
  EXPECT_TRUE(all.get_future().wait_for(std::chrono::seconds(10)) == std::future_status::ready);
  EXPECT_EQ(unavailable.load(), kCalls);
}

TEST_F(KvClientTest, TheEndOfTheClientCancels) {
  std::promise<void> asked;
  FakeServer server(path(), [&](RawSocket& socket) {
    if (!FakeServer::Welcome(socket)) return;
    if (socket.ReadFrame().has_value()) asked.set_value();
    socket.Ended();
  });
  const Session session{.boot_id = 7, .session_id = 1, .shape = kShape};
  const std::vector<uint16_t> rows(16);
  absl::Status ended;
  {
    const auto client = Connect();
    client->AppendAsync(session, 0, 0, 1, rows, rows, {.deadline = std::chrono::seconds(20)},
                        [&](const absl::StatusOr<uint64_t>& held) { ended = held.status(); });
    ASSERT_TRUE(asked.get_future().wait_for(std::chrono::seconds(10)) == std::future_status::ready);
  }
  EXPECT_EQ(ended.code(), absl::StatusCode::kCancelled);
}

TEST_F(KvClientTest, CallsAtOnceAreBounded) {
  std::promise<void> over;
  FakeServer server(path(), [&](RawSocket& socket) {
    if (!FakeServer::Welcome(socket)) return;
    over.get_future().wait();
  });
  ClientOptions few = options();
  few.inflight_requests_max = 3;
  const Session session{.boot_id = 7, .session_id = 1, .shape = kShape};
  const std::vector<uint16_t> rows(16);
  std::atomic<int> exhausted{0};
  {
    const auto client = Connect(few);
    for (int i = 0; i < 5; ++i) {
      client->AppendAsync(session, 0, 0, 1, rows, rows, {.deadline = std::chrono::seconds(20)},
                          [&](const absl::StatusOr<uint64_t>& held) {
                            if (held.status().code() == absl::StatusCode::kResourceExhausted) {
                              ++exhausted;
                            }
                          });
    }
    EXPECT_EQ(client->Health().code(), absl::StatusCode::kResourceExhausted);
    over.set_value();
  }
  EXPECT_EQ(exhausted.load(), 2);
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

TEST_F(KvClientTest, ManyThreadsShareOneConnection) {
  constexpr size_t kThreads = 8;
  FakeServer server(path(), [](RawSocket& socket) {
    if (!FakeServer::Welcome(socket)) return;
    std::vector<uint64_t> ids;  // answers in rounds, the last first
    while (const auto request = socket.ReadFrame()) {
      ids.push_back(request->header.request_id);
      if (ids.size() < kThreads) continue;
      for (; !ids.empty(); ids.pop_back()) socket.Send(HealthAnswer(ids.back()));
    }
  });
  ClientOptions patient = options();
  patient.default_deadline = std::chrono::seconds(10);
  const auto client = Connect(patient);
  std::barrier round(kThreads);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (int call = 0; call < 100; ++call) {
        round.arrive_and_wait();
        EXPECT_TRUE(client->Health().ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// ---- Poll

/// A spinning client, one that sleeps soon, and one that never spins.
constexpr std::chrono::microseconds kSpins[] = {std::chrono::seconds(2), milliseconds(1),
                                                milliseconds(0)};

/// Answers every request until the connection ends.
void AnswerAll(RawSocket& socket) {
  if (!FakeServer::Welcome(socket)) return;
  while (const auto request = socket.ReadFrame()) {
    const uint64_t id = request->header.request_id;
    if (request->header.op == Op::kHealth) {
      socket.Send(HealthAnswer(id));
    } else {
      socket.SendFrame(request->header.op, id, "", "", 0, proto::kFlagResponse);
    }
  }
}

/// Appends one token, which AnswerAll answers, and calls `done`.
void AppendOne(KvClient& client, Callback<uint64_t> done,
               std::chrono::microseconds deadline = std::chrono::seconds(20)) {
  static const std::vector<uint16_t> rows(16);
  client.AppendAsync({.boot_id = 7, .session_id = 1, .shape = kShape}, 0, 0, 1, rows, rows,
                     {.deadline = deadline}, std::move(done));
}

/// Polls until `over`, for ten seconds at most.
void PollUntil(KvClient& client, const std::function<bool()>& over) {
  const auto give_up = Clock::now() + std::chrono::seconds(10);
  while (!over()) {
    client.Poll();
    ASSERT_LT(Clock::now(), give_up);
  }
}

TEST_F(KvClientTest, PollRunsCallbacksOnTheCallingThread) {
  FakeServer server(path(), AnswerAll);
  ClientOptions spinning = options();
  spinning.spin = std::chrono::seconds(2);
  const auto client = Connect(spinning);
  int here = 0;
  for (int i = 0; i < 200; ++i) {
    std::atomic<bool> answered{false};
    std::thread::id on;
    AppendOne(*client, [&](const absl::StatusOr<uint64_t>& held) {
      EXPECT_TRUE(held.ok()) << held.status();
      on = std::this_thread::get_id();
      answered = true;
    });
    EXPECT_NO_FATAL_FAILURE(PollUntil(*client, [&] { return answered.load(); }));
    here += on == std::this_thread::get_id() ? 1 : 0;
  }
  EXPECT_GT(here, 100);
}

TEST_F(KvClientTest, CallbacksNeverRunWithinTheirCall) {
  for (const auto spin : kSpins) {
    unlink(path().c_str());
    FakeServer server(path(), AnswerAll);
    ClientOptions some = options();
    some.spin = spin;
    some.inflight_requests_max = 1;
    const auto client = Connect(some);
    for (int i = 0; i < 200; ++i) {
      std::mutex mutex;  // which a caller may hold
      int left = 3;      // one is answered, and one or two are refused
      const auto done = [&](const absl::StatusOr<uint64_t>&) {
        const std::lock_guard<std::mutex> lock(mutex);
        --left;
      };
      {
        const std::lock_guard<std::mutex> lock(mutex);
        AppendOne(*client, done);
        AppendOne(*client, done);
        AppendOne(*client, done, milliseconds(-1));
        EXPECT_EQ(left, 3);
      }
      EXPECT_NO_FATAL_FAILURE(PollUntil(*client, [&] {
        const std::lock_guard<std::mutex> lock(mutex);
        return left == 0;
      }));
    }
  }
}

TEST_F(KvClientTest, ManyThreadsPollAndCallAtOnce) {
  constexpr int kThreads = 6;
  constexpr int kRounds = 200;
  for (const auto spin : kSpins) {
    unlink(path().c_str());
    FakeServer server(path(), AnswerAll);
    ClientOptions some = options();
    some.spin = spin;
    some.default_deadline = std::chrono::seconds(20);
    const auto client = Connect(some);
    std::atomic<int> answers{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        for (int round = 0; round < kRounds; ++round) {
          if (i % 3 == 0) {  // waits for the client's thread, or for who polls
            EXPECT_TRUE(client->Health().ok());
            ++answers;
            continue;
          }
          std::atomic<int> left{i};
          for (int call = 0; call < i; ++call) {
            AppendOne(*client, [&](const absl::StatusOr<uint64_t>& held) {
              EXPECT_TRUE(held.ok()) << held.status();
              --left;
            });
          }
          EXPECT_NO_FATAL_FAILURE(PollUntil(*client, [&] { return left.load() == 0; }));
          ++answers;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(answers.load(), kThreads * kRounds);
  }
}

TEST_F(KvClientTest, CallbacksMayCallAgainAndPoll) {
  constexpr int kCalls = 500;
  for (const auto spin : kSpins) {
    unlink(path().c_str());
    FakeServer server(path(), AnswerAll);
    ClientOptions some = options();
    some.spin = spin;
    const auto client = Connect(some);
    std::atomic<int> made{0};
    std::atomic<int> deepest{0};
    int depth = 0;  // callbacks of one client run one at a time
    Callback<uint64_t> again = [&](const absl::StatusOr<uint64_t>&) {
      deepest = std::max(deepest.load(), ++depth);
      client->Poll();
      // Every third call has failed before it is made.
      if (++made < kCalls) AppendOne(*client, again, milliseconds(made % 3 == 0 ? -1 : 20000));
      client->Poll();
      --depth;
    };
    AppendOne(*client, again);
    EXPECT_NO_FATAL_FAILURE(PollUntil(*client, [&] { return made.load() == kCalls; }));
    EXPECT_EQ(deepest.load(), 1);
  }
}

TEST_F(KvClientTest, DeadlinesAndBreaksWhilePolling) {
  for (const auto spin : kSpins) {
    unlink(path().c_str());
    std::promise<void> die;
    FakeServer server(path(), [&](RawSocket& socket) {
      if (FakeServer::Welcome(socket)) die.get_future().wait();
    });
    ClientOptions some = options();
    some.spin = spin;
    const auto client = Connect(some);
    std::atomic<absl::StatusCode> code{absl::StatusCode::kOk};
    const auto done = [&](const absl::StatusOr<uint64_t>& held) { code = held.status().code(); };
    const auto over = [&] { return code.load() != absl::StatusCode::kOk; };
    const auto before = Clock::now();
    AppendOne(*client, done, milliseconds(50));
    EXPECT_NO_FATAL_FAILURE(PollUntil(*client, over));
    EXPECT_EQ(code.load(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_GE(Clock::now() - before, milliseconds(50));
    EXPECT_LT(Clock::now() - before, milliseconds(500));

    // Nobody polls any more.
    EXPECT_EQ(client->Health({.deadline = milliseconds(50)}).code(),
              absl::StatusCode::kDeadlineExceeded);

    code = absl::StatusCode::kOk;
    AppendOne(*client, done);
    for (int i = 0; i < 100; ++i) client->Poll();
    die.set_value();
    EXPECT_NO_FATAL_FAILURE(PollUntil(*client, over));
    EXPECT_EQ(code.load(), absl::StatusCode::kUnavailable);
  }
}

}  // namespace
}  // namespace kvseek
