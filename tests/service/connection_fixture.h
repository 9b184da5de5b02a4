// A server whose requests a test answers itself, from a script instead of the request handler.
#ifndef KVSEEK_TESTS_SERVICE_CONNECTION_FIXTURE_H_
#define KVSEEK_TESTS_SERVICE_CONNECTION_FIXTURE_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "service/server.h"
#include "tests/client/raw_socket.h"

namespace kvseek::service {

/// Holds requests until the test answers them.
class Script {
 public:
  struct Held {
    Request request;
    std::function<void(Response)> done;
  };

  Dispatch dispatch() {
    return [this](Request request, std::function<void(Response)> done) {
      if (request.op == proto::Op::kHealth) {  // echoes, at once
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
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return IsCancelled(index);
  }
  Request& request(size_t index) { return held_[index].request; }
  void Answer(size_t index, const std::string& metadata, size_t payload_bytes = 0) {
    Response response;
    response.metadata = metadata;
    if (payload_bytes != 0) {
      response.payload = MakePayload(payload_bytes);
      std::memset(response.payload.data.get(), 'p', payload_bytes);
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

inline auto AllTransports() {
  return testing::Values(Transport::kUnix, Transport::kTcp, Transport::kShared,
                         Transport::kSharedSpinning);
}
inline std::string NameOf(const testing::TestParamInfo<Transport>& at) {
  constexpr std::array kNames = {"Unix", "Tcp", "Shared", "SharedSpinning"};
  return kNames[static_cast<size_t>(at.param)];
}

class ScriptedServerTest : public testing::TestWithParam<Transport> {
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
  test::RawSocket Dial() {
    const std::string& address = server_->addresses()[0];
    return test::RawSocket::Connect(IsShared() ? "shm:" + dir_.path() + "/s" : address);
  }
  test::RawSocket Greeted() {
    test::RawSocket socket = Dial();
    EXPECT_TRUE(socket.Greet(options_.token));
    return socket;
  }
  static absl::StatusCode CodeOf(const std::optional<test::RawFrame>& frame) {
    return frame.has_value() ? static_cast<absl::StatusCode>(frame->Error().code())
                             : absl::StatusCode::kUnknown;
  }
  /// The peer is told `code` on `request_id`, and the stream ends.
  static void ExpectLastWords(test::RawSocket& socket, uint64_t request_id, absl::StatusCode code,
                              const std::string& field) {
    const std::optional<test::RawFrame> answer = socket.ReadFrame();
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->header.request_id, request_id);
    EXPECT_EQ(CodeOf(answer), code) << answer->Error().message();
    EXPECT_THAT(answer->Error().message(), testing::HasSubstr(field));
    EXPECT_TRUE(socket.Ended());
  }
  /// The connection answers as it should.
  static void ExpectAlive(test::RawSocket& socket, uint64_t request_id = 999) {
    ASSERT_TRUE(socket.SendFrame(proto::Op::kHealth, request_id, "echo", "tensor"));
    const std::optional<test::RawFrame> answer = socket.ReadFrame();
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

}  // namespace kvseek::service

#endif  // KVSEEK_TESTS_SERVICE_CONNECTION_FIXTURE_H_
