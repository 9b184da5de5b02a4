#include "transport/address.h"

#include <gtest/gtest.h>

namespace kvseek::transport {
namespace {

TEST(AddressTest, IsTakenApart) {
  const auto unix_socket = Address::Parse("unix:/run/s");
  ASSERT_TRUE(unix_socket.ok());
  EXPECT_EQ(unix_socket->kind, Address::Kind::kUnix);
  EXPECT_EQ(unix_socket->path, "/run/s");
  const auto shared = Address::Parse("shm:/run/s");
  ASSERT_TRUE(shared.ok());
  EXPECT_EQ(shared->kind, Address::Kind::kShared);
  EXPECT_EQ(shared->path, "/run/s");
  const auto tcp = Address::Parse("tcp://host:080");
  ASSERT_TRUE(tcp.ok());
  EXPECT_EQ(tcp->kind, Address::Kind::kTcp);
  EXPECT_EQ(tcp->host, "host");
  EXPECT_EQ(tcp->port, "80");
  const auto v6 = Address::Parse("tcp://[::1]:7");
  ASSERT_TRUE(v6.ok());
  EXPECT_EQ(v6->host, "::1");
}

TEST(AddressTest, AllElseIsRefused) {
  for (const std::string& text :
       {std::string(), std::string("unix:"), std::string("shm:"), std::string("tcp://"),
        std::string("tcp://x"), std::string("tcp://:1"), std::string("tcp://x:65536"),
        std::string("tcp://x:-1"), std::string("http://x:1"), "unix:/" + std::string(200, 'x'),
        "shm:/" + std::string(200, 'x')}) {
    EXPECT_EQ(Address::Parse(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

}  // namespace
}  // namespace kvseek::transport
