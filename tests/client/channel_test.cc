// One connection and its calls: deadlines, breaks, threads, polling.
#include "client/channel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <functional>
#include <future>
#include <mutex>
#include <thread>
#include <vector>

#include "client/kv_client.h"
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
using test::RawSocket;
using Clock = std::chrono::steady_clock;

class ChannelTest : public test::ClientTest {};

TEST_F(ChannelTest, SpinningClientsKeepDeadlinesAndMissNothing) {
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

TEST_F(ChannelTest, BreakInTheMiddleOfAnAnswer) {
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

TEST_F(ChannelTest, LastWordsOfTheDaemonAreKept) {
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

TEST_F(ChannelTest, DeadlineEndsACallAndALateAnswerIsDropped) {
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

TEST_F(ChannelTest, ADeadlineThatHasPassedSendsNothing) {
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

TEST_F(ChannelTest, DeadlineWhileADaemonTakesNothingIn) {
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

TEST_F(ChannelTest, TheNextCallConnectsAgain) {
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

TEST_F(ChannelTest, ABreakFailsAllThatIsUnderWay) {
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

TEST_F(ChannelTest, TheEndOfTheClientCancels) {
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

TEST_F(ChannelTest, CallsAtOnceAreBounded) {
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

TEST_F(ChannelTest, ManyThreadsShareOneConnection) {
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

TEST_F(ChannelTest, PollRunsCallbacksOnTheCallingThread) {
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

TEST_F(ChannelTest, CallbacksNeverRunWithinTheirCall) {
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

TEST_F(ChannelTest, ManyThreadsPollAndCallAtOnce) {
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

TEST_F(ChannelTest, CallbacksMayCallAgainAndPoll) {
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

TEST_F(ChannelTest, DeadlinesAndBreaksWhilePolling) {
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
