#include "service/session_info.h"

#include <gtest/gtest.h>

#include "tests/service/search_fixture.h"

namespace kvseek::service {
namespace {

using SessionInfoTest = SearchTest;

TEST_F(SessionInfoTest, TellsWhatASessionIsAndHolds) {
  Service service;
  const proto::SessionRef ref = OpenWith(service, {500, 200});
  const std::shared_ptr<Session> session = service.store().List().at(0);
  const TimePoint then = session->last_used() + std::chrono::milliseconds(1234);
  const proto::SessionInfo info = DescribeSession(ref.boot_id(), *session, false, then);
  EXPECT_EQ(info.session().SerializeAsString(), ref.SerializeAsString());
  proto::ModelShape shape = SmallShape();
  shape.set_softmax_scale(0.25F);  // 1 / sqrt(16)
  EXPECT_EQ(info.shape().SerializeAsString(), shape.SerializeAsString());
  ASSERT_EQ(info.tokens_size(), 2);
  EXPECT_EQ(info.tokens(0), 500U);
  EXPECT_EQ(info.tokens(1), 200U);
  EXPECT_EQ(info.bytes(), session->Bytes());
  EXPECT_EQ(info.idle_ms(), 1234U);
  EXPECT_EQ(info.scan_bits(), 2U);
  EXPECT_EQ(info.built_size(), 0);
  EXPECT_FALSE(info.has_plan());
  EXPECT_FALSE(info.has_landmark());
}

TEST_F(SessionInfoTest, TimesAreNeverNegative) {
  EXPECT_EQ(Milliseconds(std::chrono::microseconds(1999)), 1U);
  EXPECT_EQ(Milliseconds(std::chrono::hours(-1)), 0U);
}

}  // namespace
}  // namespace kvseek::service
