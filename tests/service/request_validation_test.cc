// Every wrong input gets its code and names its field, and changes nothing.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "tests/service/service_fixture.h"

namespace kvseek::service {
namespace {

constexpr uint64_t kTokens = 100;
constexpr uint16_t kBf16Infinity = 0x7f80;

class RequestValidationTest : public testing::Test {
 protected:
  RequestValidationTest() : service_(Limits()) {
    session_ = OpenSession(service_, SmallShape());
    other_ = OpenSession(service_, SmallShape());
    const Rows rows = RandomRows(1, SmallShape(), kTokens);
    EXPECT_TRUE(AppendRows(service_, session_, 0, 0, kTokens, rows).ok());
    EXPECT_TRUE(AppendRows(service_, other_, 0, 0, kTokens, rows).ok());
    before_ = Look();
  }
  ~RequestValidationTest() override { EXPECT_EQ(Look(), before_) << "a refusal changed something"; }

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
  proto::OpenSessionRequest Open() const {
    proto::OpenSessionRequest request;
    *request.mutable_shape() = SmallShape();
    return request;
  }
  proto::AttendRequest Attend() const {
    proto::AttendRequest request;
    proto::QueryItem& item = *request.add_items();
    *item.mutable_session() = session_;
    item.set_tokens(1);
    request.set_query_dtype(proto::DTYPE_FP32);
    return request;
  }
  proto::TopKRequest TopK(uint32_t k) const {
    proto::TopKRequest request;
    *request.add_items() = Attend().items(0);
    request.set_query_dtype(proto::DTYPE_FP32);
    request.set_k(k);
    request.set_with_rows(true);
    request.set_with_state(true);
    return request;
  }
  proto::AppendRequest Append(uint32_t tokens) const {
    proto::AppendRequest request;
    *request.mutable_session() = session_;
    request.set_start(kTokens);
    request.set_tokens(tokens);
    return request;
  }
  std::string RefusedOpen(const std::function<void(proto::OpenSessionRequest&)>& spoil) {
    proto::OpenSessionRequest request = Open();
    spoil(request);
    return Describe(service_.Call(request).status);
  }
  std::string RefusedShape(const std::function<void(proto::ModelShape&)>& spoil) {
    return RefusedOpen([&](auto& request) { spoil(*request.mutable_shape()); });
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

  Service service_;
  proto::SessionRef session_;
  proto::SessionRef other_;
  std::pair<uint64_t, std::vector<uint8_t>> before_;
};

TEST_F(RequestValidationTest, OpenSession) {
  const std::string invalid = "INVALID_ARGUMENT ";
  EXPECT_EQ(RefusedOpen([](auto& m) { m.clear_shape(); }), invalid + "shape");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_layers(0); }), invalid + "shape.layers");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_layers(~0U); }), invalid + "shape.layers");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_kv_heads(0); }), invalid + "shape.kv_heads");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_kv_heads(2000); }), invalid + "shape.kv_heads");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_query_heads(0); }), invalid + "shape.query_heads");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_query_heads(7); }), invalid + "shape.query_heads");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_query_heads(130); }), invalid + "shape.query_heads");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_key_dim(0); }), invalid + "shape.key_dim");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_key_dim(20); }), invalid + "shape.key_dim");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_value_dim(520); }), invalid + "shape.value_dim");
  EXPECT_EQ(RefusedShape([](auto& s) { s.clear_dtype(); }), invalid + "shape.dtype");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_dtype(proto::DTYPE_FP32); }), invalid + "shape.dtype");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_softmax_scale(NAN); }),
            invalid + "shape.softmax_scale");
  EXPECT_EQ(RefusedShape([](auto& s) { s.set_softmax_scale(-1.0F); }),
            invalid + "shape.softmax_scale");
  EXPECT_EQ(RefusedOpen([](auto& m) { m.set_scan_bits(3); }), invalid + "scan_bits");
  EXPECT_EQ(RefusedOpen([](auto& m) { m.set_name(std::string(257, 'x')); }), invalid + "name");
  EXPECT_EQ(RefusedOpen([](auto& m) { m.set_tokens_expected(~uint64_t{0}); }),
            invalid + "tokens_expected");
  EXPECT_EQ(RefusedOpen([](auto& m) {
              m.set_tokens_expected(1 << 20);
              m.mutable_shape()->set_layers(512);
            }),
            "RESOURCE_EXHAUSTED tokens_expected");
}

TEST_F(RequestValidationTest, Handles) {
  EXPECT_EQ(RefusedItem([](auto& m) { m.clear_session(); }), "INVALID_ARGUMENT items[1].session");
  EXPECT_EQ(RefusedItem([](auto& m) { m.mutable_session()->set_boot_id(1); }),
            "FAILED_PRECONDITION items[1].session.boot_id");
  EXPECT_EQ(RefusedItem([](auto& m) { m.mutable_session()->set_session_id(99); }),
            "NOT_FOUND items[1].session");
  proto::AppendRequest append = Append(0);
  append.clear_session();
  EXPECT_EQ(Describe(service_.Call(append, {}).status), "INVALID_ARGUMENT session");
  EXPECT_EQ(Describe(service_.Call(proto::FetchRowsRequest(), {}).status),
            "INVALID_ARGUMENT session");
  EXPECT_EQ(Describe(service_.Call(proto::ForkRequest()).status), "INVALID_ARGUMENT session");
  EXPECT_EQ(Describe(service_.Call(proto::TruncateRequest()).status), "INVALID_ARGUMENT session");
  EXPECT_EQ(Describe(service_.Call(proto::CloseSessionRequest()).status),
            "INVALID_ARGUMENT session");
  proto::CloseSessionRequest close;
  *close.mutable_session() = session_;
  close.mutable_session()->set_boot_id(3);
  EXPECT_EQ(Describe(service_.Call(close).status), "FAILED_PRECONDITION session.boot_id");
}

TEST_F(RequestValidationTest, Append) {
  const auto call = [&](const std::function<void(proto::AppendRequest&)>& spoil,
                        const Tensors& tensors) {
    proto::AppendRequest request = Append(2);
    spoil(request);
    return Describe(service_.Call(request, tensors).status);
  };
  const Rows good = RandomRows(7, SmallShape(), 2);
  const Tensors payload = Tensors().Add(good.keys).Add(good.values);
  EXPECT_EQ(call([](auto& m) { m.set_layer(2); }, payload), "INVALID_ARGUMENT layer");
  EXPECT_EQ(call([](auto& m) { m.set_start(kTokens + 1); }, payload), "FAILED_PRECONDITION start");
  EXPECT_EQ(call([](auto& m) { m.set_start(~uint64_t{0}); }, payload), "INVALID_ARGUMENT start");
  EXPECT_EQ(call([](auto& m) { m.set_tokens(~0U); }, payload), "INVALID_ARGUMENT tokens");
  EXPECT_EQ(call([](auto& m) { m.set_tokens(1); }, payload), "INVALID_ARGUMENT payload");
  EXPECT_EQ(call([](auto& m) { m.set_tokens(0); }, payload), "INVALID_ARGUMENT payload");
  EXPECT_EQ(call([](auto&) {}, {}), "INVALID_ARGUMENT payload");
  EXPECT_EQ(call([](auto&) {}, Tensors(payload).Add(std::vector<uint8_t>{1})),
            "INVALID_ARGUMENT payload");

  Rows bad = good;
  bad.keys[1 * 32 + 1 * 16 + 3] = kBf16Infinity;
  proto::AppendRequest request = Append(2);
  absl::Status status = service_.Call(request, Tensors().Add(bad.keys).Add(bad.values)).status;
  EXPECT_EQ(Describe(status), "INVALID_ARGUMENT payload");
  EXPECT_NE(status.message().find("key of token 1, KV head 1, element 3"), std::string::npos)
      << status;
  bad = good;
  bad.values[0 * 48 + 1 * 24 + 23] = 0xffff;
  request.set_start(kTokens - 2);  // held already, and yet looked at
  status = service_.Call(request, Tensors().Add(bad.keys).Add(bad.values)).status;
  EXPECT_NE(status.message().find("value of token 0, KV head 1, element 23"), std::string::npos)
      << status;
}

TEST_F(RequestValidationTest, Items) {
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

TEST_F(RequestValidationTest, HeadsOfItems) {
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

TEST_F(RequestValidationTest, HeldRows) {
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

TEST_F(RequestValidationTest, SampledQueriesOfAppends) {
  const proto::SessionRef session = OpenSession(service_, SmallShape());
  const auto refused = [&](const std::vector<uint64_t>& positions, size_t queries) {
    const Rows rows = RandomRows(3, SmallShape(), 4);
    proto::AppendRequest request;
    *request.mutable_session() = session;
    request.set_start(0);
    request.set_tokens(4);
    for (const uint64_t position : positions) request.add_query_positions(position);
    const std::vector<uint16_t> elements(queries * 6 * SmallShape().key_dim());
    return Describe(
        service_.Call(request, Tensors().Add(rows.keys).Add(rows.values).Add(elements)).status);
  };
  const std::string invalid = "INVALID_ARGUMENT ";
  EXPECT_EQ(refused({0, 3}, 2), "OK");
  EXPECT_EQ(refused({0, 4}, 2), invalid + "query_positions[1]");
  EXPECT_EQ(refused({2, 2}, 2), invalid + "query_positions[1]");
  EXPECT_EQ(refused({0, 3}, 1), invalid + "payload");
  EXPECT_EQ(refused({}, 1), invalid + "payload");
  proto::CloseSessionRequest close;
  *close.mutable_session() = session;
  EXPECT_TRUE(service_.Call(close).ok());
}

TEST_F(RequestValidationTest, OptionsAndQueries) {
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

TEST_F(RequestValidationTest, AnswersThatDoNotFit) {
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

TEST_F(RequestValidationTest, RowsForksAndCuts) {
  proto::FetchRowsRequest fetch;
  *fetch.mutable_session() = session_;
  fetch.set_count(3);
  const auto call = [&](const std::vector<int64_t>& positions) {
    return Describe(service_.Call(fetch, Tensors().Add(positions)).status);
  };
  EXPECT_EQ(call({1, 2}), "INVALID_ARGUMENT payload");
  EXPECT_EQ(call({1, 2, kTokens}), "INVALID_ARGUMENT positions[2]");
  EXPECT_EQ(call({1, -1, 2}), "INVALID_ARGUMENT positions[1]");
  fetch.set_kv_head(2);
  EXPECT_EQ(call({1, 2, 3}), "INVALID_ARGUMENT kv_head");
  fetch.set_layer(2);
  EXPECT_EQ(call({1, 2, 3}), "INVALID_ARGUMENT layer");

  proto::TruncateRequest truncate;
  *truncate.mutable_session() = session_;
  truncate.set_tokens(kTokens + 1);
  EXPECT_EQ(Describe(service_.Call(truncate).status), "INVALID_ARGUMENT tokens");
  proto::ForkRequest fork;
  *fork.mutable_session() = session_;
  fork.set_tokens(~uint64_t{0});
  EXPECT_EQ(Describe(service_.Call(fork).status), "INVALID_ARGUMENT tokens");
  fork.clear_tokens();
  fork.set_name(std::string(300, 'x'));
  EXPECT_EQ(Describe(service_.Call(fork).status), "INVALID_ARGUMENT name");
}

TEST_F(RequestValidationTest, MetadataAndOperations) {
  using proto::Op;
  for (const Op op : {Op::kOpenSession, Op::kAppend, Op::kAttend, Op::kTopK, Op::kFetchRows,
                      Op::kFork, Op::kTruncate, Op::kCloseSession, Op::kStats, Op::kHealth}) {
    const auto answer = Service::Wait<proto::StatsResponse>(service_.Start(op, "\xff\xff\xff"));
    EXPECT_EQ(Describe(answer.status), "INVALID_ARGUMENT metadata") << proto::OpName(op);
  }
  for (const Op op : {Op::kHello, Op::kCancel, static_cast<Op>(200)}) {
    const auto answer = Service::Wait<proto::StatsResponse>(service_.Start(op, ""));
    EXPECT_EQ(Describe(answer.status), "INVALID_ARGUMENT op");
  }
  for (const Op op :
       {Op::kOpenSession, Op::kFork, Op::kTruncate, Op::kCloseSession, Op::kStats, Op::kHealth}) {
    const auto answer = Service::Wait<proto::HealthResponse>(
        service_.Start(op, "", Tensors().Add(std::vector<int>{1}).Copy()));
    EXPECT_EQ(Describe(answer.status), "INVALID_ARGUMENT payload") << proto::OpName(op);
  }
}

}  // namespace
}  // namespace kvseek::service
