// Appends: their order, several layers at once, and what is left when one is refused.
#include "service/append_call.h"

#include <gtest/gtest.h>

#include <cstring>
#include <future>
#include <utility>
#include <vector>

#include "tests/service/search_fixture.h"

namespace kvseek::service {
namespace {

using AppendCallTest = SearchTest;

TEST_F(AppendCallTest, BeyondMemoryChangesNothing) {
  DaemonOptions options = Service::SmallOptions(2);
  options.memory_limit_bytes = 2 << 20;
  Service service(options);
  const proto::SessionRef session = OpenWith(service, {1000});
  const uint64_t used = service.budget().used_bytes();
  const auto refused = AppendRows(service, session, 0, 0, 9000, rows_);
  EXPECT_EQ(Describe(refused.status), "RESOURCE_EXHAUSTED payload");
  EXPECT_GT(proto::RetryAfterMs(refused.status), 0U);
  EXPECT_EQ(service.budget().used_bytes(), used);
  EXPECT_EQ(service.store().List()[0]->State(0)->tokens, 1000);
}

TEST_F(AppendCallTest, PipelinedOnesKeepTheirOrder) {
  Service service(Service::SmallOptions(4));
  const proto::SessionRef session = OpenSession(service, SmallShape());
  std::vector<std::future<Response>> answers;
  for (uint64_t start = 0; start < 1280; start += 10) {
    proto::AppendRequest request;
    *request.mutable_session() = session;
    request.set_start(start);
    request.set_tokens(10);
    const Rows rows = RandomRows(static_cast<uint32_t>(start), SmallShape(), 10);
    answers.push_back(service.Start(proto::Op::kAppend, request.SerializeAsString(),
                                    Tensors().Add(rows.keys).Add(rows.values).Copy()));
  }
  for (size_t i = 0; i < answers.size(); ++i) {
    const auto answer = Service::Wait<proto::AppendResponse>(std::move(answers[i]));
    ASSERT_TRUE(answer.ok()) << answer.status;
    EXPECT_EQ(answer.message.tokens_held(), (i + 1) * 10);
  }
}

TEST_F(AppendCallTest, OfSeveralLayersIsThatOfEach) {
  Service service(Service::SmallOptions(4));
  proto::ModelShape shape = SmallShape();
  shape.set_layers(5);
  const proto::SessionRef one_by_one = OpenSession(service, shape);
  const proto::SessionRef together = OpenSession(service, shape);
  uint64_t start = 0;
  for (const uint32_t tokens : {1000U, 1U, 1U, 40U, 1U}) {  // across the seal of a segment
    proto::AppendRequest request;
    *request.mutable_session() = together;
    request.set_layer(1);
    request.set_layers(3);
    request.set_start(start);
    request.set_tokens(tokens);
    Tensors all;
    for (uint32_t layer = 1; layer < 4; ++layer) {
      const Rows rows = RandomRows(static_cast<uint32_t>(start) + layer, shape, tokens);
      all.Add(rows.keys).Add(rows.values);
      ASSERT_TRUE(AppendRows(service, one_by_one, layer, start, tokens, rows).ok());
    }
    const auto answer = service.Call(request, all);
    ASSERT_TRUE(answer.ok()) << answer.status;
    start += tokens;
    EXPECT_EQ(answer.message.tokens_held(), start);
  }
  const auto sessions = service.store().List();
  ASSERT_EQ(sessions.size(), 2U);
  for (const auto& session : sessions) {
    EXPECT_EQ(session->State(0)->tokens, 0);
    EXPECT_EQ(session->State(4)->tokens, 0);
  }
  for (uint32_t layer = 1; layer < 4; ++layer) {
    const auto a = sessions[0]->State(layer);
    const auto b = sessions[1]->State(layer);
    ASSERT_EQ(a->tokens, static_cast<int64_t>(start));
    ASSERT_EQ(b->tokens, static_cast<int64_t>(start));
    for (size_t head = 0; head < a->kv_heads(); ++head) {
      for (int64_t p = 0; p < a->tokens; ++p) {
        ASSERT_EQ(std::memcmp(a->Head(head).KeyRow(p), b->Head(head).KeyRow(p),
                              a->Head(head).shape().KeyRowBytes()),
                  0);
        ASSERT_EQ(std::memcmp(a->Head(head).ValueRow(p), b->Head(head).ValueRow(p),
                              a->Head(head).shape().ValueRowBytes()),
                  0);
      }
    }
  }
}

TEST_F(AppendCallTest, ALayerThatRefusesDoesNotKeepTheOthers) {
  Service service(Service::SmallOptions(2));
  proto::ModelShape shape = SmallShape();
  shape.set_layers(3);
  const proto::SessionRef session = OpenSession(service, shape);
  const Rows rows = RandomRows(1, shape, 10);
  ASSERT_TRUE(AppendRows(service, session, 0, 0, 10, rows).ok());
  ASSERT_TRUE(AppendRows(service, session, 2, 0, 10, rows).ok());
  proto::AppendRequest request;
  *request.mutable_session() = session;
  request.set_layers(3);
  request.set_start(10);
  request.set_tokens(10);
  Tensors all;
  for (int layer = 0; layer < 3; ++layer) all.Add(rows.keys).Add(rows.values);
  EXPECT_EQ(Describe(service.Call(request, all).status), "FAILED_PRECONDITION start");
  // Repeated from what the least holds: what is held already is skipped.
  request.set_start(0);
  const auto again = service.Call(request, all);
  ASSERT_TRUE(again.ok()) << again.status;
  EXPECT_EQ(again.message.tokens_held(), 10U);
  for (const uint32_t layer : {0U, 2U}) {
    EXPECT_EQ(service.store().List()[0]->State(layer)->tokens, 20);
  }
  EXPECT_EQ(service.store().List()[0]->State(1)->tokens, 10);
}

}  // namespace
}  // namespace kvseek::service
