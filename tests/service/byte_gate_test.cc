#include "service/byte_gate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "tests/service/connection_fixture.h"

namespace kvseek::service {
namespace {

using proto::Op;
using std::chrono::milliseconds;
using test::RawSocket;

class ByteGateServerTest : public ScriptedServerTest {};

INSTANTIATE_TEST_SUITE_P(Transports, ByteGateServerTest, AllTransports(), NameOf);

TEST_P(ByteGateServerTest, ReadingPausesWhenTooManyBytesAreHeld) {
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

TEST_P(ByteGateServerTest, ARequestLargerThanTheGateGoesAlone) {
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
