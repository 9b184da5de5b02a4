// What Attend, TopK and FetchRows answer, compared with naive references and with itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "index/slab_memory.h"
#include "tests/service/search_fixture.h"
#include "tests/service/two_nodes.h"

namespace kvseek::service {
namespace {

using kernels::DType;

using QueryAnswersTest = SearchTest;

/// Attention of one query token over positions [begin, end), except `without`, in double precision.
reference::Attention Expected(const Rows& rows, const float* queries, size_t kv_head, int64_t begin,
                              int64_t end, const std::set<int64_t>& without = {}) {
  const std::vector<uint16_t> keys = HeadRows(rows.keys, kKvHeads, kKeyDim, kv_head);
  const std::vector<uint16_t> values = HeadRows(rows.values, kKvHeads, kValueDim, kv_head);
  const auto count = static_cast<int>(end - begin);
  std::vector<double> scores =
      reference::Scores(queries + kv_head * kGroup * kKeyDim, kGroup, keys.data() + begin * 16,
                        DType::kBf16, count, kKeyDim);
  for (double& score : scores) score *= 0.25;  // 1 / sqrt(16)
  for (const int64_t position : without) {
    for (size_t h = 0; h < kGroup; ++h) {
      scores[h * static_cast<size_t>(count) + static_cast<size_t>(position - begin)] = -INFINITY;
    }
  }
  return reference::Attend(scores, kGroup, values.data() + begin * 24, DType::kBf16, count,
                           kValueDim);
}

TEST_F(QueryAnswersTest, AttendIsExactAttention) {
  Service service;
  const proto::SessionRef session = OpenWith(service, {2500, 700});
  const std::vector<float> queries = Queries(3, 3);
  for (const proto::DType dtype : {proto::DTYPE_FP32, proto::DTYPE_BF16, proto::DTYPE_FP16}) {
    auto request = Attend({Item(session, 0, 3, 10, {2500, 11, 1300})});
    request.set_query_dtype(dtype);
    Tensors payload;
    std::vector<float> seen = queries;
    if (dtype == proto::DTYPE_FP32) {
      payload.Add(queries);
    } else {
      std::vector<uint16_t> rounded;
      for (float& query : seen) {
        rounded.push_back(reference::Round(query, static_cast<DType>(dtype)));
        query = kernels::LoadElement(&rounded.back(), static_cast<DType>(dtype), 0);
      }
      payload.Add(rounded);
    }
    auto answer = service.Call(request, payload);
    ASSERT_TRUE(answer.ok()) << answer.status;
    const auto out = answer.tensors.Take<float>(3 * kQueryHeads * kValueDim);
    const auto lse = answer.tensors.Take<float>(3 * kQueryHeads);
    ASSERT_TRUE(answer.tensors.AllTaken());
    ASSERT_EQ(answer.message.reports_size(), 6);
    EXPECT_EQ(answer.message.position_counts_size(), 0);
    const std::vector<int64_t> ends{2500, 11, 1300};
    for (size_t t = 0; t < 3; ++t) {
      for (size_t h = 0; h < kKvHeads; ++h) {
        const auto expected =
            Expected(rows_, seen.data() + t * kQueryHeads * kKeyDim, h, 10, ends[t]);
        const size_t head = t * kQueryHeads + h * kGroup;
        const auto error =
            reference::Compare(expected, out.data() + head * kValueDim, lse.data() + head);
        EXPECT_LT(error.out, 1e-4);
        EXPECT_LT(error.lse, 1e-4);
        const proto::Report& report = answer.message.reports(static_cast<int>(t * kKvHeads + h));
        EXPECT_EQ(report.index(), proto::INDEX_EXACT);
        EXPECT_EQ(report.keys_exact(), static_cast<uint64_t>(ends[t] - 10));
        EXPECT_EQ(report.missed_mass_size(), static_cast<int>(kGroup));
        EXPECT_EQ(report.missed_low_size(), 0);
      }
    }
  }
}

TEST_F(QueryAnswersTest, TopKReturnsStoredRowsAndTheRestOfTheState) {
  Service service;
  const proto::SessionRef session = OpenWith(service, {2500, 700});
  for (const proto::IndexKind index : {proto::INDEX_EXACT, proto::INDEX_LADDER}) {
    for (const uint32_t k : {0U, 1U, 100U, 3000U}) {
      SCOPED_TRACE(testing::Message() << "index " << index << ", k " << k);
      const std::vector<float> first = Queries(3, 2);
      const std::vector<float> second = Queries(4, 1);
      auto answer = service.Call(
          TopK({Item(session, 0, 2, 0, {2500, 50}), Item(session, 1, 1, 20)}, k, index),
          Tensors().Add(first).Add(second));
      ASSERT_TRUE(answer.ok()) << answer.status;
      const std::vector<size_t> ranges{2500, 2500, 50, 50, 680, 680};
      ASSERT_EQ(answer.message.position_counts_size(), 6);
      size_t all = 0;
      std::vector<size_t> counts;
      for (size_t r = 0; r < 6; ++r) {
        counts.push_back(answer.message.position_counts(static_cast<int>(r)));
        EXPECT_EQ(counts.back(), std::min<size_t>(k, ranges[r]));
        all += counts.back();
      }
      const auto positions = answer.tensors.Take<int64_t>(all);
      const size_t of_first = counts[0] + counts[1] + counts[2] + counts[3];
      std::vector<std::vector<uint16_t>> keys;
      std::vector<std::vector<uint16_t>> values;
      for (const size_t n : {of_first, all - of_first}) {
        keys.push_back(answer.tensors.Take<uint16_t>(n * kKeyDim));
      }
      for (const size_t n : {of_first, all - of_first}) {
        values.push_back(answer.tensors.Take<uint16_t>(n * kValueDim));
      }
      std::vector<std::vector<float>> out;
      std::vector<std::vector<float>> lse;
      for (const size_t tokens : {2, 1}) {
        out.push_back(answer.tensors.Take<float>(tokens * kQueryHeads * kValueDim));
        lse.push_back(answer.tensors.Take<float>(tokens * kQueryHeads));
      }
      ASSERT_TRUE(answer.tensors.AllTaken());

      const int64_t* next = positions.data();
      for (size_t r = 0; r < 6; ++r) {
        const size_t item = r / 4;
        const size_t token = item == 0 ? r / 2 : 0;
        const size_t kv_head = r % 2;
        const int64_t begin = item == 0 ? 0 : 20;
        std::set<int64_t> chosen;
        size_t row = static_cast<size_t>(next - positions.data()) - (item == 0 ? 0 : of_first);
        for (size_t i = 0; i < counts[r]; ++i, ++row) {
          const int64_t position = *next++;
          ASSERT_TRUE(chosen.empty() || *chosen.rbegin() < position);
          chosen.insert(position);
          const size_t stored = static_cast<size_t>(position) * kKvHeads + kv_head;
          ASSERT_EQ(std::memcmp(&keys[item][row * kKeyDim], &rows_.keys[stored * kKeyDim], 32), 0);
          ASSERT_EQ(
              std::memcmp(&values[item][row * kValueDim], &rows_.values[stored * kValueDim], 48),
              0);
        }
        if (index != proto::INDEX_EXACT) continue;
        const std::vector<float>& queries = item == 0 ? first : second;
        const auto expected =
            Expected(rows_, queries.data() + token * kQueryHeads * kKeyDim, kv_head, begin,
                     begin + static_cast<int64_t>(ranges[r]), chosen);
        const size_t head = token * kQueryHeads + kv_head * kGroup;
        const auto error =
            reference::Compare(expected, &out[item][head * kValueDim], &lse[item][head]);
        EXPECT_LT(error.out, 2e-3);  // the rest is what is left after a subtraction
        EXPECT_LT(error.lse, 2e-3);
      }
    }
  }
}

TEST_F(QueryAnswersTest, PartsMayBeLeftOut) {
  Service service;
  const proto::SessionRef session = OpenWith(service, {500});
  auto request = TopK({Item(session, 0, 1)}, 10);
  request.set_with_rows(false);
  auto answer = service.Call(request, Tensors().Add(Queries(1, 1)));
  EXPECT_EQ(answer.tensors.Take<int64_t>(20).size(), 20U);
  EXPECT_EQ(answer.tensors.Take<float>(kQueryHeads * kValueDim).size(), kQueryHeads * kValueDim);
  EXPECT_EQ(answer.tensors.Take<float>(kQueryHeads).size(), kQueryHeads);
  EXPECT_TRUE(answer.tensors.AllTaken());
  request.set_with_state(false);
  answer = service.Call(request, Tensors().Add(Queries(1, 1)));
  EXPECT_EQ(answer.tensors.bytes().size(), 20 * sizeof(int64_t));
}

TEST_F(QueryAnswersTest, AttendListsWhatItRead) {
  Service service;
  const proto::SessionRef session = OpenWith(service, {3000});
  auto request = Attend({Item(session, 0, 1, 5, {2900})}, proto::INDEX_LADDER);
  request.mutable_options()->set_list_read(true);
  request.mutable_options()->set_candidates(256);
  request.mutable_options()->set_audit_samples(32);
  auto answer = service.Call(request, Tensors().Add(Queries(1, 1)));
  ASSERT_TRUE(answer.ok()) << answer.status;
  answer.tensors.Take<float>(kQueryHeads * kValueDim);
  answer.tensors.Take<float>(kQueryHeads);
  ASSERT_EQ(answer.message.position_counts_size(), 2);
  const size_t count = answer.message.position_counts(0) + answer.message.position_counts(1);
  const auto positions = answer.tensors.Take<int64_t>(count);
  ASSERT_TRUE(answer.tensors.AllTaken());
  ASSERT_EQ(positions.size(), count);
  for (const int64_t position : positions) EXPECT_TRUE(position >= 5 && position < 2900);
  EXPECT_EQ(answer.message.reports(0).index(), proto::INDEX_LADDER);
  EXPECT_EQ(answer.message.reports(0).missed_low_size(), static_cast<int>(kGroup));
}

TEST_F(QueryAnswersTest, EmptyRangesAreEmptyAnswers) {
  Service service;
  const proto::SessionRef session = OpenWith(service, {500});
  for (const proto::IndexKind index :
       {proto::INDEX_AUTO, proto::INDEX_EXACT, proto::INDEX_LADDER}) {
    auto answer = service.Call(
        TopK({Item(session, 1, 1), Item(session, 0, 1, 200, {200}), Item(session, 0, 1, 500)}, 10,
             index),
        Tensors().Add(Queries(1, 1)).Add(Queries(1, 1)).Add(Queries(1, 1)));
    ASSERT_TRUE(answer.ok()) << answer.status;
    for (int r = 0; r < 6; ++r) EXPECT_EQ(answer.message.position_counts(r), 0U);
    for (int item = 0; item < 3; ++item) {
      for (const float out : answer.tensors.Take<float>(kQueryHeads * kValueDim)) {
        EXPECT_EQ(out, 0.0F);
      }
      const auto lse = answer.tensors.Take<float>(kQueryHeads);
      ASSERT_EQ(lse.size(), kQueryHeads);
      for (const float value : lse) EXPECT_EQ(value, -INFINITY);
    }
    EXPECT_TRUE(answer.tensors.AllTaken());
  }
}

/// Answers of a batch of several sessions, layers, lengths and query tokens, one of them in the
/// ladder's range, as bytes.
std::vector<uint8_t> AskBatch(Service& service, const proto::SessionRef& a,
                              const proto::SessionRef& b, proto::AttendResponse* message) {
  auto answer = service.Call(
      Attend({Item(a, 0, 2), Item(b, 1, 1, 3), Item(a, 0, 1, 0, {8500}),
              Item(b, 0, 4, 0, {1, 2, 3, 0})}),
      Tensors().Add(Queries(1, 2)).Add(Queries(2, 1)).Add(Queries(3, 1)).Add(Queries(4, 4)));
  EXPECT_TRUE(answer.ok()) << answer.status;
  EXPECT_GE(answer.message.compute_us(), 1U);
  *message = answer.message;
  message->clear_compute_us();  // the one thing that two answers need not have in common
  return answer.tensors.bytes();
}

TEST_F(QueryAnswersTest, BatchesEqualSingleCallsAndWorkersDoNotMatter) {
  std::vector<uint8_t> first;
  proto::AttendResponse first_message;
  for (const int workers : {1, 4}) {
    Service service(Service::SmallOptions(workers));
    const proto::SessionRef a = OpenWith(service, {9000});
    const proto::SessionRef b = OpenWith(service, {300, 1500});
    proto::AttendResponse message;
    const std::vector<uint8_t> batch = AskBatch(service, a, b, &message);
    if (workers == 1) {
      first = batch;
      first_message = message;
    }
    EXPECT_EQ(batch, first) << "the same bits whatever the number of workers";
    EXPECT_EQ(message.SerializeAsString(), first_message.SerializeAsString());
    EXPECT_EQ(message.reports(0).index(), proto::INDEX_LADDER);

    Tensors all;
    int report = 0;
    const auto add = [&](const proto::QueryItem& item, const std::vector<float>& queries) {
      auto answer = service.Call(Attend({item}), Tensors().Add(queries));
      ASSERT_TRUE(answer.ok()) << answer.status;
      const size_t tokens = item.tokens();
      all.Add(answer.tensors.Take<float>(tokens * kQueryHeads * kValueDim));
      all.Add(answer.tensors.Take<float>(tokens * kQueryHeads));
      for (const proto::Report& single : answer.message.reports()) {
        EXPECT_EQ(single.SerializeAsString(), message.reports(report++).SerializeAsString());
      }
    };
    add(Item(a, 0, 2), Queries(1, 2));
    add(Item(b, 1, 1, 3), Queries(2, 1));
    add(Item(a, 0, 1, 0, {8500}), Queries(3, 1));
    add(Item(b, 0, 4, 0, {1, 2, 3, 0}), Queries(4, 4));
    EXPECT_EQ(all.bytes(), batch);
  }
}

TEST_F(QueryAnswersTest, SameBitsOnOneNodeAndTwo) {
  Service one(Service::SmallOptions(3));
  Service two(Service::SmallOptions(3), TwoNodes());
  const proto::SessionRef in_one = OpenWith(one, {9000, 5000});
  EXPECT_EQ(index::SlabBytes(1), 0U);
  const proto::SessionRef in_two = OpenWith(two, {9000, 5000});
#if !defined(__SANITIZE_ADDRESS__)  // no slabs there
  EXPECT_GT(index::SlabBytes(1), 0U);
#endif
  const Tensors queries = Tensors().Add(Queries(3, 4));
  for (const proto::IndexKind index :
       {proto::INDEX_AUTO, proto::INDEX_EXACT, proto::INDEX_LADDER}) {
    for (const uint32_t layer : {0U, 1U}) {
      const auto item = [&](const proto::SessionRef& session) {
        return Item(session, layer, 4, 3, {5000, 4999, 70, 2048});
      };
      auto a = one.Call(Attend({item(in_one)}, index), queries);
      auto b = two.Call(Attend({item(in_two)}, index), queries);
      ASSERT_TRUE(a.ok() && b.ok()) << a.status << b.status;
      EXPECT_EQ(a.tensors.bytes(), b.tensors.bytes());
      auto c = one.Call(TopK({item(in_one)}, 50, index), queries);
      auto d = two.Call(TopK({item(in_two)}, 50, index), queries);
      ASSERT_TRUE(c.ok() && d.ok()) << c.status << d.status;
      EXPECT_EQ(c.tensors.bytes(), d.tensors.bytes());
    }
  }
  EXPECT_EQ(one.pool().search_counts().Sum().units_other_node, 0U);
  EXPECT_GT(two.pool().search_counts().Sum().units_own_node +
                two.pool().search_counts().Sum().units_other_node,
            0U);
  std::set<std::string> names;
  const auto stats = two.Call(proto::StatsRequest());
  for (const proto::Counter& counter : stats.message.counters()) {
    names.insert(counter.name());
  }
  for (const char* name :
       {"units_own_node", "units_other_node", "slab_bytes_node_0", "slab_bytes_node_1"}) {
    EXPECT_EQ(names.count(name), 1U) << name;
  }
}

TEST_F(QueryAnswersTest, FetchesRowsInAnyOrderAndTwice) {
  Service service;
  const proto::SessionRef session = OpenWith(service, {2500});
  proto::FetchRowsRequest request;
  *request.mutable_session() = session;
  request.set_kv_head(1);
  std::vector<int64_t> positions{2499, 0, 0, 1024, 1023, 2048};
  for (int64_t i = 0; i < 2500; ++i) positions.push_back(i * 7 % 2500);
  request.set_count(static_cast<uint32_t>(positions.size()));
  auto answer = service.Call(request, Tensors().Add(positions));
  ASSERT_TRUE(answer.ok()) << answer.status;
  const auto keys = answer.tensors.Take<uint16_t>(positions.size() * kKeyDim);
  const auto values = answer.tensors.Take<uint16_t>(positions.size() * kValueDim);
  ASSERT_TRUE(answer.tensors.AllTaken());
  for (size_t i = 0; i < positions.size(); ++i) {
    const size_t stored = static_cast<size_t>(positions[i]) * kKvHeads + 1;
    ASSERT_EQ(std::memcmp(&keys[i * kKeyDim], &rows_.keys[stored * kKeyDim], 32), 0);
    ASSERT_EQ(std::memcmp(&values[i * kValueDim], &rows_.values[stored * kValueDim], 48), 0);
  }
  request.set_count(0);
  EXPECT_TRUE(service.Call(request, {}).ok());
}

}  // namespace
}  // namespace kvseek::service
