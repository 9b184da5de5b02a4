// Listening, accepting and stopping, with answers from a script.
#include "service/server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <mutex>
#include <thread>

#include "proto/status_code.h"
#include "tests/client/raw_socket.h"

namespace kvseek::service {
namespace {

using proto::Op;
using std::chrono::milliseconds;
using test::RawFrame;
using test::RawSocket;
using Clock = std::chrono::steady_clock;

/// Echoes, on a thread of its own where the metadata says "slow".
Dispatch Echo() {
  return [](Request request, const std::function<void(Response)>& done) {
    Response response;
    response.metadata = request.metadata;
    response.payload = std::move(request.payload);
    done(std::move(response));
  };
}

class ServerTest : public testing::Test {
 protected:
  std::string path() const { return dir_.path() + "/s"; }
  absl::StatusOr<std::unique_ptr<Server>> Start(Dispatch dispatch = Echo()) {
    if (options_.listen.empty()) options_.listen = {"unix:" + path()};
    return Server::Start(options_, {.boot_id = 5}, std::move(dispatch));
  }

  test::TempDir dir_;
  DaemonOptions options_;
};

TEST_F(ServerTest, ListensOnManyAddressesAndTellsRealPorts) {
  options_.listen = {"unix:" + path(), "tcp://127.0.0.1:0", "tcp://localhost:0"};
  const auto server = Start();
  ASSERT_TRUE(server.ok()) << server.status();
  ASSERT_EQ((*server)->addresses().size(), 3U);
  EXPECT_EQ((*server)->addresses()[0], "unix:" + path());
  EXPECT_THAT((*server)->addresses()[1], testing::StartsWith("tcp://127.0.0.1:"));
  EXPECT_THAT((*server)->addresses()[1], testing::Not(testing::EndsWith(":0")));
  RawSocket local = RawSocket::Connect((*server)->addresses()[0]);
  RawSocket remote = RawSocket::Connect((*server)->addresses()[1]);
  EXPECT_TRUE(local.Greet());
  EXPECT_TRUE(remote.Greet());
  EXPECT_EQ((*server)->connections_open(), 2U);
}

TEST_F(ServerTest, SocketFileIsPrivateAndGoesAway) {
  {
    const auto server = Start();
    ASSERT_TRUE(server.ok()) << server.status();
    struct stat info {};
    ASSERT_EQ(stat(path().c_str(), &info), 0);
    EXPECT_TRUE(S_ISSOCK(info.st_mode));
    EXPECT_EQ(info.st_mode & 0777U, 0600U);
  }
  EXPECT_NE(access(path().c_str(), F_OK), 0);
}

TEST_F(ServerTest, AddressesThatAreNone) {
  for (const char* address : {"", "unix:", "tcp://", "tcp://x", "tcp://x:70000", "udp://x:1"}) {
    options_.listen = {address};
    EXPECT_EQ(Start().status().code(), absl::StatusCode::kInvalidArgument) << address;
  }
  options_.listen = {"unix:/" + std::string(200, 'x')};
  EXPECT_EQ(Start().status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Server::Start(DaemonOptions(), {}, Echo()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(ServerTest, AnAddressInUseIsLeftAlone) {
  const auto first = Start();
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(Start().status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_TRUE(RawSocket::Connect("unix:" + path()).Greet());
}

TEST_F(ServerTest, AFileThatIsNoSocketIsLeftAlone) {
  std::ofstream(path()) << "precious";
  EXPECT_EQ(Start().status().code(), absl::StatusCode::kAlreadyExists);
  std::string content;
  std::ifstream(path()) >> content;
  EXPECT_EQ(content, "precious");
}

TEST_F(ServerTest, AStaleSocketFileIsReplaced) {
  const int stale = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path().copy(address.sun_path, sizeof(address.sun_path) - 1);
  ASSERT_EQ(bind(stale, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  close(stale);
  const auto server = Start();
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_TRUE(RawSocket::Connect("unix:" + path()).Greet());
}

TEST_F(ServerTest, TooManyConnectionsAreToldWhy) {
  options_.connections_max = 2;
  const auto server = Start();
  ASSERT_TRUE(server.ok()) << server.status();
  RawSocket first = RawSocket::Connect("unix:" + path());
  RawSocket second = RawSocket::Connect("unix:" + path());
  ASSERT_TRUE(first.Greet());
  ASSERT_TRUE(second.Greet());
  RawSocket third = RawSocket::Connect("unix:" + path());
  third.SendHello();
  const std::optional<RawFrame> answer = third.ReadFrame();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->header.request_id, 0U);
  EXPECT_EQ(answer->Error().code(), static_cast<uint32_t>(absl::StatusCode::kResourceExhausted));
  EXPECT_GT(answer->Error().retry_after_ms(), 0U);
  EXPECT_TRUE(third.Ended());
  first.Close();
  bool served = false;
  for (int i = 0; i < 200 && !served; ++i) {
    RawSocket next = RawSocket::Connect("unix:" + path());
    served = next.Greet();
    if (!served) std::this_thread::sleep_for(milliseconds(10));
  }
  EXPECT_TRUE(served);
}

TEST_F(ServerTest, ManyClientsOnManyThreads) {
  options_.listen = {"unix:" + path(), "tcp://127.0.0.1:0"};
  options_.io_threads = 3;
  std::mutex mutex;
  std::vector<std::thread> workers;
  const auto server = Start([&](Request request, std::function<void(Response)> done) {
    std::lock_guard<std::mutex> lock(mutex);
    workers.emplace_back([metadata = request.metadata, done = std::move(done)] {
      Response response;
      response.metadata = metadata;
      done(std::move(response));
    });
  });
  ASSERT_TRUE(server.ok()) << server.status();
  std::vector<std::thread> clients;
  for (int i = 0; i < 20; ++i) {
    clients.emplace_back([&, i] {
      RawSocket socket = RawSocket::Connect((*server)->addresses()[i % 2]);
      ASSERT_TRUE(socket.Greet());
      for (uint64_t call = 1; call <= 20; ++call) {
        const std::string said = std::to_string(i) + " " + std::to_string(call);
        ASSERT_TRUE(socket.SendFrame(Op::kHealth, call, said));
        const std::optional<RawFrame> answer = socket.ReadFrame();
        ASSERT_TRUE(answer.has_value());
        EXPECT_EQ(answer->header.request_id, call);
        EXPECT_EQ(answer->metadata, said);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  (*server)->Stop();
  for (std::thread& worker : workers) worker.join();
}

TEST_F(ServerTest, StopLetsAnswersLeave) {
  std::mutex mutex;
  std::function<void(Response)> held;
  std::atomic<bool> asked{false};
  const auto server = Start([&](Request, std::function<void(Response)> done) {
    std::lock_guard<std::mutex> lock(mutex);
    held = std::move(done);
    asked = true;
  });
  ASSERT_TRUE(server.ok()) << server.status();
  RawSocket socket = RawSocket::Connect("unix:" + path());
  ASSERT_TRUE(socket.Greet());
  ASSERT_TRUE(socket.SendFrame(Op::kAttend, 9, ""));
  for (int i = 0; i < 1000 && !asked; ++i) std::this_thread::sleep_for(milliseconds(10));
  ASSERT_TRUE(asked);
  std::thread worker([&] {
    std::this_thread::sleep_for(milliseconds(100));
    held({.error = false, .metadata = "done", .payload = {}});
    held = nullptr;
  });
  (*server)->Stop();
  worker.join();
  const std::optional<RawFrame> answer = socket.ReadFrame();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->header.request_id, 9U);
  EXPECT_EQ(answer->metadata, "done");
  EXPECT_TRUE(socket.Ended());
  EXPECT_FALSE(RawSocket::Connect("unix:" + path()).is_open());
}

TEST_F(ServerTest, StopCancelsWhatTakesTooLong) {
  options_.shutdown_grace = milliseconds(100);
  std::atomic<bool> cancelled{false};
  std::atomic<bool> asked{false};
  std::thread worker;
  const auto server = Start([&](Request request, std::function<void(Response)> done) {
    worker = std::thread([&, flag = request.cancelled, done = std::move(done)]() mutable {
      asked = true;
      while (!flag->load()) std::this_thread::sleep_for(milliseconds(1));
      cancelled = true;
      done({});
      done = nullptr;
    });
  });
  ASSERT_TRUE(server.ok()) << server.status();
  RawSocket socket = RawSocket::Connect("unix:" + path());
  ASSERT_TRUE(socket.Greet());
  ASSERT_TRUE(socket.SendFrame(Op::kAttend, 9, ""));
  for (int i = 0; i < 1000 && !asked; ++i) std::this_thread::sleep_for(milliseconds(10));
  const auto before = Clock::now();
  (*server)->Stop();
  EXPECT_LT(Clock::now() - before, milliseconds(3000));
  EXPECT_TRUE(cancelled);  // Stop has waited for the answer
  worker.join();
  EXPECT_TRUE(socket.Ended());
}

TEST_F(ServerTest, StopDoesNotWaitForIdleOrHalfFrames) {
  const auto server = Start();
  ASSERT_TRUE(server.ok()) << server.status();
  RawSocket silent = RawSocket::Connect("unix:" + path());
  RawSocket idle = RawSocket::Connect("unix:" + path());
  RawSocket half = RawSocket::Connect("unix:" + path());
  ASSERT_TRUE(idle.Greet());
  ASSERT_TRUE(half.Greet());
  ASSERT_TRUE(half.Send(test::MakeFrame(Op::kHealth, 1, "metadata").substr(0, 35)));
  const auto before = Clock::now();
  (*server)->Stop();
  EXPECT_LT(Clock::now() - before, milliseconds(2000));
  EXPECT_TRUE(idle.Ended());
  EXPECT_EQ((*server)->connections_open(), 0U);
}

}  // namespace
}  // namespace kvseek::service
