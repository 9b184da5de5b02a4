// Searches of sessions of SmallShape: what the tests of requests and of their answers share.
#ifndef KVSEEK_TESTS_SERVICE_SEARCH_FIXTURE_H_
#define KVSEEK_TESTS_SERVICE_SEARCH_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tests/service/service_fixture.h"

namespace kvseek::service {

inline constexpr size_t kQueryHeads = 6;
inline constexpr size_t kKvHeads = 2;
inline constexpr size_t kGroup = 3;
inline constexpr size_t kKeyDim = 16;
inline constexpr size_t kValueDim = 24;

inline proto::QueryItem Item(const proto::SessionRef& session, uint32_t layer, uint32_t tokens,
                             uint64_t begin = 0, const std::vector<uint64_t>& ends = {}) {
  proto::QueryItem item;
  *item.mutable_session() = session;
  item.set_layer(layer);
  item.set_tokens(tokens);
  item.set_range_begin(begin);
  for (const uint64_t end : ends) item.add_range_end(end);
  return item;
}

inline proto::AttendRequest Attend(const std::vector<proto::QueryItem>& items,
                                   proto::IndexKind index = proto::INDEX_AUTO) {
  proto::AttendRequest request;
  for (const auto& item : items) *request.add_items() = item;
  request.set_query_dtype(proto::DTYPE_FP32);
  request.mutable_options()->set_index(index);
  return request;
}

inline proto::TopKRequest TopK(const std::vector<proto::QueryItem>& items, uint32_t k,
                               proto::IndexKind index = proto::INDEX_AUTO) {
  proto::TopKRequest request;
  for (const auto& item : items) *request.add_items() = item;
  request.set_query_dtype(proto::DTYPE_FP32);
  request.set_k(k);
  request.set_with_rows(true);
  request.set_with_state(true);
  request.mutable_options()->set_index(index);
  return request;
}

inline std::vector<float> Queries(uint32_t seed, size_t tokens) {
  return reference::RandomFloats(seed, tokens * kQueryHeads * kKeyDim, 1.0F);
}

/// Sessions of SmallShape with known rows.
class SearchTest : public testing::Test {
 protected:
  /// A session whose layers hold `lengths` tokens of the rows in rows_.
  proto::SessionRef OpenWith(Service& service, const std::vector<size_t>& lengths) {
    proto::SessionRef session = OpenSession(service, SmallShape());
    for (size_t layer = 0; layer < lengths.size(); ++layer) {
      Rows part = rows_;
      part.keys.resize(lengths[layer] * kKvHeads * kKeyDim);
      part.values.resize(lengths[layer] * kKvHeads * kValueDim);
      const auto answer =
          AppendRows(service, session, static_cast<uint32_t>(layer), 0, lengths[layer], part);
      EXPECT_TRUE(answer.ok()) << answer.status;
      EXPECT_EQ(answer.message.tokens_held(), lengths[layer]);
    }
    return session;
  }

  const Rows rows_ = RandomRows(11, SmallShape(), 9000);
};

}  // namespace kvseek::service

#endif  // KVSEEK_TESTS_SERVICE_SEARCH_FIXTURE_H_
