// What the tests of the requests' checks share: sessions that no refusal may change.
#ifndef KVSEEK_TESTS_SERVICE_VALIDATION_FIXTURE_H_
#define KVSEEK_TESTS_SERVICE_VALIDATION_FIXTURE_H_

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "tests/service/service_fixture.h"

namespace kvseek::service {

/// Two small sessions, and at the end a look at whether a refusal changed anything.
class ValidationTest : public testing::Test {
 protected:
  static constexpr uint64_t kTokens = 100;

  ValidationTest() : service_(Limits()) {
    session_ = OpenSession(service_, SmallShape());
    other_ = OpenSession(service_, SmallShape());
    const Rows rows = RandomRows(1, SmallShape(), kTokens);
    EXPECT_TRUE(AppendRows(service_, session_, 0, 0, kTokens, rows).ok());
    EXPECT_TRUE(AppendRows(service_, other_, 0, 0, kTokens, rows).ok());
    before_ = Look();
  }
  ~ValidationTest() override {
    // A worker that has answered may still hold what it worked on.
    const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (Look() != before_ && std::chrono::steady_clock::now() < late) std::this_thread::yield();
    EXPECT_EQ(Look(), before_) << "a refusal changed something";
  }

  static DaemonOptions Limits() {
    DaemonOptions options = Service::SmallOptions(2);
    options.batch_items_max = 4;
    options.query_tokens_max = 8;
    options.payload_bytes_max = 64 << 10;
    options.metadata_bytes_max = 4000;
    options.tokens_max = 1 << 20;
    return options;
  }
  /// Memory in use and what both sessions answer, as bytes.
  std::pair<uint64_t, std::vector<uint8_t>> Look() {
    proto::AttendRequest request = Attend();
    *request.mutable_items(0)->mutable_session() = session_;
    *request.add_items() = request.items(0);
    *request.mutable_items(1)->mutable_session() = other_;
    auto answer = service_.Call(request, Tensors().Add(Queries()).Add(Queries()));
    EXPECT_TRUE(answer.ok()) << answer.status;
    return {service_.budget().used_bytes(), answer.tensors.bytes()};
  }
  static std::vector<float> Queries(size_t tokens = 1) {
    return reference::RandomFloats(5, tokens * 6 * 16, 1.0F);
  }
  proto::AttendRequest Attend() const {
    proto::AttendRequest request;
    proto::QueryItem& item = *request.add_items();
    *item.mutable_session() = session_;
    item.set_tokens(1);
    request.set_query_dtype(proto::DTYPE_FP32);
    return request;
  }

  Service service_;
  proto::SessionRef session_;
  proto::SessionRef other_;
  std::pair<uint64_t, std::vector<uint8_t>> before_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_TESTS_SERVICE_VALIDATION_FIXTURE_H_
