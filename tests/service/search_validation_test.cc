// Every wrong search gets its code and names its field, and changes nothing.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "tests/service/validation_fixture.h"

namespace kvseek::service {
namespace {

class SearchValidationTest : public ValidationTest {
 protected:
  proto::TopKRequest TopK(uint32_t k) const {
    proto::TopKRequest request;
    *request.add_items() = Attend().items(0);
    request.set_query_dtype(proto::DTYPE_FP32);
    request.set_k(k);
    request.set_with_rows(true);
    request.set_with_state(true);
    return request;
  }
  std::string RefusedAttend(const std::function<void(proto::AttendRequest&)>& spoil) {
    proto::AttendRequest request = Attend();
    spoil(request);
    return Describe(service_.Call(request, Tensors().Add(Queries())).status);
  }
  std::string RefusedItem(const std::function<void(proto::QueryItem&)>& spoil) {
    return RefusedAttend([&](auto& request) {
      *request.add_items() = request.items(0);
      spoil(*request.mutable_items(1));
    });
  }
};

TEST_F(SearchValidationTest, HandlesOfItems) {
  EXPECT_EQ(RefusedItem([](auto& m) { m.clear_session(); }), "INVALID_ARGUMENT items[1].session");
  EXPECT_EQ(RefusedItem([](auto& m) { m.mutable_session()->set_boot_id(1); }),
            "FAILED_PRECONDITION items[1].session.boot_id");
  EXPECT_EQ(RefusedItem([](auto& m) { m.mutable_session()->set_session_id(99); }),
            "NOT_FOUND items[1].session");
}

TEST_F(SearchValidationTest, Items) {
  const std::string invalid = "INVALID_ARGUMENT ";
  EXPECT_EQ(RefusedAttend([](auto& m) { m.clear_items(); }), invalid + "items");
  EXPECT_EQ(RefusedAttend([](auto& m) {
              for (int i = 0; i < 4; ++i) *m.add_items() = m.items(0);
            }),
            invalid + "items");
  EXPECT_EQ(RefusedItem([](auto& m) { m.set_layer(2); }), invalid + "items[1].layer");
  EXPECT_EQ(RefusedItem([](auto& m) { m.set_tokens(0); }), invalid + "items[1].tokens");
  EXPECT_EQ(RefusedItem([](auto& m) { m.set_tokens(9); }), invalid + "items[1].tokens");
  EXPECT_EQ(RefusedItem([](auto& m) { m.set_range_begin(kTokens + 1); }),
            invalid + "items[1].range_begin");
  EXPECT_EQ(RefusedItem([](auto& m) { m.set_range_begin(~uint64_t{0}); }),
            invalid + "items[1].range_begin");
  EXPECT_EQ(RefusedItem([](auto& m) { m.add_range_end(kTokens + 1); }),
            invalid + "items[1].range_end[0]");
  EXPECT_EQ(RefusedItem([](auto& m) {
              m.set_range_begin(50);
              m.set_tokens(2);
              m.add_range_end(60);
              m.add_range_end(49);
            }),
            invalid + "items[1].range_end[1]");
  EXPECT_EQ(RefusedItem([](auto& m) {
              m.set_tokens(3);
              m.add_range_end(60);
              m.add_range_end(60);
            }),
            invalid + "items[1].range_end");
  EXPECT_EQ(RefusedItem([](auto& m) { m.set_tokens(1); }), invalid + "payload");
}

TEST_F(SearchValidationTest, HeadsOfItems) {
  const std::string invalid = "INVALID_ARGUMENT ";
  const auto refused = [&](const std::vector<uint32_t>& heads) {
    return RefusedItem([&](auto& m) { m.mutable_kv_heads()->Add(heads.begin(), heads.end()); });
  };
  EXPECT_EQ(refused({2}), invalid + "items[1].kv_heads[0]");
  EXPECT_EQ(refused({0, ~0U}), invalid + "items[1].kv_heads[1]");
  EXPECT_EQ(refused({1, 0}), invalid + "items[1].kv_heads[1]");
  EXPECT_EQ(refused({0, 1, 1}), invalid + "items[1].kv_heads[2]");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.mutable_items(0)->add_kv_heads(1); }),
            invalid + "payload")
      << "queries of heads that are not asked for";

  proto::AttendRequest request = Attend();
  request.mutable_items(0)->set_tokens(2);
  request.mutable_items(0)->add_kv_heads(1);
  std::vector<float> queries = reference::RandomFloats(5, size_t{2} * 3 * 16, 1.0F);
  queries[(1 * 3 + 2) * 16 + 7] = NAN;
  const absl::Status status = service_.Call(request, Tensors().Add(queries)).status;
  EXPECT_NE(status.message().find("items[0], token 1, query head 5, element 7"), std::string::npos)
      << status;
}

TEST_F(SearchValidationTest, HeldRows) {
  const std::string invalid = "INVALID_ARGUMENT ";
  const auto refused = [&](const std::vector<uint32_t>& counts,
                           const std::vector<uint32_t>& positions) {
    proto::TopKRequest request = TopK(5);
    *request.add_items() = request.items(0);
    request.mutable_items(1)->mutable_held_counts()->Add(counts.begin(), counts.end());
    const Tensors payload = Tensors().Add(Queries()).Add(Queries()).Add(positions);
    return Describe(service_.Call(request, payload).status);
  };
  EXPECT_EQ(refused({}, {}), "OK");
  EXPECT_EQ(refused({0, 0}, {}), "OK");
  EXPECT_EQ(refused({3, 2}, {0, 1, 99, 0, 99}), "OK");
  EXPECT_EQ(refused({3}, {0, 1, 2}), invalid + "items[1].held_counts");
  EXPECT_EQ(refused({1, 1, 1}, {0, 1, 2}), invalid + "items[1].held_counts");
  EXPECT_EQ(refused({1, (1U << 16) + 1}, {0}), invalid + "items[1].held_counts[1]");
  EXPECT_EQ(refused({~0U, 1}, {0}), invalid + "items[1].held_counts[0]");
  EXPECT_EQ(refused({3, 2}, {0, 1, 2, 3}), invalid + "payload");
  EXPECT_EQ(refused({3, 2}, {0, 1, 2, 3, 4, 5}), invalid + "payload");
  EXPECT_EQ(refused({}, {1}), invalid + "payload");
  EXPECT_EQ(refused({3, 2}, {0, 1, 1, 3, 4}), invalid + "items[1].held[2]") << "a repeat";
  EXPECT_EQ(refused({3, 2}, {5, 4, 6, 3, 4}), invalid + "items[1].held[1]") << "not ascending";
  EXPECT_EQ(refused({3, 2}, {0, 1, 2, 3, kTokens}), invalid + "items[1].held[4]");
  EXPECT_EQ(refused({3, 2}, {0, 1, ~0U, 3, 4}), invalid + "items[1].held[2]");
  EXPECT_EQ(RefusedItem([](auto& m) {
              m.add_held_counts(0);
              m.add_held_counts(0);
            }),
            invalid + "items[1].held_counts")
      << "an attend";
}

TEST_F(SearchValidationTest, OptionsAndQueries) {
  const std::string invalid = "INVALID_ARGUMENT ";
  EXPECT_EQ(RefusedAttend(
                [](auto& m) { m.mutable_options()->set_index(static_cast<proto::IndexKind>(7)); }),
            invalid + "options.index");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.mutable_options()->set_index(proto::INDEX_GRAPH); }),
            "FAILED_PRECONDITION options.index");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.mutable_options()->set_exact_top(1 << 17); }),
            invalid + "options.exact_top");
  EXPECT_EQ(
      RefusedAttend([](auto& m) { m.mutable_options()->set_vote(static_cast<proto::Vote>(3)); }),
      invalid + "options.vote");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.mutable_options()->set_reuse_steps((1 << 20) + 1); }),
            invalid + "options.reuse_steps");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.mutable_options()->set_reuse_keep((1 << 20) + 1); }),
            invalid + "options.reuse_keep");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.mutable_options()->set_beta(-1.0F); }),
            invalid + "options.beta");
  for (const float threshold : {0.5F, -1001.0F, std::numeric_limits<float>::quiet_NaN(),
                                -std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(RefusedAttend([=](auto& m) { m.mutable_options()->set_threshold(threshold); }),
              invalid + "options.threshold");
  }
  EXPECT_EQ(RefusedAttend([](auto& m) { m.mutable_options()->set_candidates(0); }),
            invalid + "options.candidates");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.mutable_options()->set_candidates((1 << 20) + 1); }),
            invalid + "options.candidates");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.mutable_options()->set_exact_rows(1 << 17); }),
            invalid + "options.exact_rows");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.mutable_options()->set_audit_samples(5000); }),
            invalid + "options.audit_samples");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.clear_query_dtype(); }), invalid + "query_dtype");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.set_query_dtype(static_cast<proto::DType>(9)); }),
            invalid + "query_dtype");
  EXPECT_EQ(RefusedAttend([](auto& m) { m.set_query_dtype(proto::DTYPE_BF16); }),
            invalid + "payload");
  for (const int dtype : {static_cast<int>(proto::DTYPE_BF16), 9}) {
    EXPECT_EQ(RefusedAttend([&](auto& m) { m.set_state_dtype(static_cast<proto::DType>(dtype)); }),
              invalid + "state_dtype");
  }
  EXPECT_EQ(Describe(service_.Call(TopK(1 << 17), Tensors().Add(Queries())).status), invalid + "k");

  for (const float bad : {NAN, std::numeric_limits<float>::infinity()}) {
    proto::AttendRequest request = Attend();
    request.mutable_items(0)->set_tokens(2);
    *request.add_items() = request.items(0);
    std::vector<float> queries = Queries(2);
    queries[(1 * 6 + 4) * 16 + 2] = bad;
    const absl::Status status =
        service_.Call(request, Tensors().Add(Queries(2)).Add(queries)).status;
    EXPECT_EQ(Describe(status), invalid + "payload");
    EXPECT_NE(status.message().find("items[1], token 1, query head 4, element 2"),
              std::string::npos)
        << status;
  }
}

TEST_F(SearchValidationTest, AnswersThatDoNotFit) {
  proto::TopKRequest topk = TopK(1024);
  topk.mutable_items(0)->set_tokens(8);
  EXPECT_EQ(Describe(service_.Call(topk, Tensors().Add(Queries(8))).status),
            "RESOURCE_EXHAUSTED k");
  proto::AttendRequest attend = Attend();
  attend.mutable_items(0)->set_tokens(8);
  Tensors queries = Tensors().Add(Queries(8));
  for (int i = 0; i < 3; ++i) {
    *attend.add_items() = attend.items(0);
    queries.Add(Queries(8));
  }
  EXPECT_EQ(Describe(service_.Call(attend, queries).status), "RESOURCE_EXHAUSTED items");
}

}  // namespace
}  // namespace kvseek::service
