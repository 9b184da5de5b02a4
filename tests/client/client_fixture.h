// What tests of the client share: daemons that do as a test says, and calls with short deadlines.
#ifndef KVSEEK_TESTS_CLIENT_CLIENT_FIXTURE_H_
#define KVSEEK_TESTS_CLIENT_CLIENT_FIXTURE_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "client/kv_client.h"
#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "tests/client/raw_socket.h"

namespace kvseek::test {

inline constexpr ModelShape kShape{
    .layers = 2, .kv_heads = 2, .query_heads = 4, .key_dim = 8, .value_dim = 8};

inline std::string HealthAnswer(uint64_t id) {
  proto::HealthResponse serving;
  serving.set_serving(true);
  return MakeFrame(proto::Op::kHealth, id, serving.SerializeAsString(), "", 0,
                   proto::kFlagResponse);
}

class ClientTest : public testing::Test {
 protected:
  std::string path() const { return dir_.path() + "/s"; }
  ClientOptions options() const {
    ClientOptions options;
    options.address = "unix:" + path();
    options.connect_timeout = std::chrono::milliseconds(300);
    options.default_deadline = std::chrono::milliseconds(300);
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
    const auto before = std::chrono::steady_clock::now();
    absl::Status status = client->Health();
    EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::milliseconds(2000));
    unlink(path().c_str());
    return status;
  }

  TempDir dir_;
};

}  // namespace kvseek::test

#endif  // KVSEEK_TESTS_CLIENT_CLIENT_FIXTURE_H_
