// Every wrong input gets its code and names its field, and changes nothing.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "tests/service/validation_fixture.h"

namespace kvseek::service {
namespace {

constexpr uint16_t kBf16Infinity = 0x7f80;

class RequestValidationTest : public ValidationTest {
 protected:
  proto::OpenSessionRequest Open() const {
    proto::OpenSessionRequest request;
    *request.mutable_shape() = SmallShape();
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
  EXPECT_EQ(RefusedOpen([](auto& m) { m.set_model(std::string(257, 'x')); }), invalid + "model");
  EXPECT_EQ(RefusedOpen([](auto& m) { m.set_tokens_expected(~uint64_t{0}); }),
            invalid + "tokens_expected");
  EXPECT_EQ(RefusedOpen([](auto& m) {
              m.set_tokens_expected(1 << 20);
              m.mutable_shape()->set_layers(512);
            }),
            "RESOURCE_EXHAUSTED tokens_expected");
}

TEST_F(RequestValidationTest, Handles) {
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
  EXPECT_EQ(call([](auto& m) { m.set_layers(~0U); }, payload), "INVALID_ARGUMENT layers");
  EXPECT_EQ(call(
                [](auto& m) {
                  m.set_layer(SmallShape().layers() - 1);
                  m.set_layers(2);
                },
                payload),
            "INVALID_ARGUMENT layers");
  EXPECT_EQ(call([](auto& m) { m.set_layers(SmallShape().layers()); }, payload),
            SmallShape().layers() == 1 ? "OK" : "INVALID_ARGUMENT payload");
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

TEST_F(RequestValidationTest, HowLandmarkIsBuilt) {
  const auto refused = [&](int summary, uint32_t block, proto::IndexKind build) {
    return RefusedOpen([&](auto& m) {
      m.add_build(build);
      m.mutable_landmark()->set_summary(static_cast<proto::LandmarkSummary>(summary));
      m.mutable_landmark()->set_block(block);
      m.set_tokens_expected(1 << 20);
      m.mutable_shape()->set_layers(512);  // else right ones would open
    });
  };
  const std::string right = "RESOURCE_EXHAUSTED tokens_expected";
  for (const int summary : {0, 1, 2, 3}) {
    for (const uint32_t block : {0U, 16U, 32U, 64U, 128U, 256U}) {
      EXPECT_EQ(refused(summary, block, proto::INDEX_LANDMARK), right) << summary << " " << block;
    }
  }
  const std::string invalid = "INVALID_ARGUMENT ";
  for (const uint32_t block : {1U, 8U, 15U, 24U, 512U, 1U << 31}) {
    EXPECT_EQ(refused(1, block, proto::INDEX_LANDMARK), invalid + "landmark.block") << block;
  }
  EXPECT_EQ(refused(4, 16, proto::INDEX_LANDMARK), invalid + "landmark.summary");
  EXPECT_EQ(refused(-1, 16, proto::INDEX_LANDMARK), invalid + "landmark.summary");
  EXPECT_EQ(refused(2, 16, proto::INDEX_CLUSTER), invalid + "landmark");
  EXPECT_EQ(RefusedOpen([](auto& m) { m.mutable_landmark(); }), invalid + "landmark");
}

TEST_F(RequestValidationTest, LandmarksOfAppends) {
  proto::OpenSessionRequest open = Open();
  open.add_build(proto::INDEX_LANDMARK);
  const proto::SessionRef bounds = service_.Call(open).message.session();
  open.mutable_landmark()->set_summary(proto::LANDMARK_GIVEN);
  open.mutable_landmark()->set_block(32);
  const proto::SessionRef given = service_.Call(open).message.session();
  ASSERT_TRUE(AppendRows(service_, given, 0, 0, 40, RandomRows(3, SmallShape(), 40)).ok());
  const auto append = [&](const proto::SessionRef& session, uint64_t start, uint32_t tokens,
                          const std::vector<uint64_t>& positions,
                          const std::vector<uint16_t>& landmarks) {
    const Rows rows = RandomRows(3, SmallShape(), tokens);
    proto::AppendRequest request;
    *request.mutable_session() = session;
    request.set_start(start);
    request.set_tokens(tokens);
    for (const uint64_t position : positions) request.add_landmark_positions(position);
    return service_
        .Call(request,
              Tensors().Add(rows.keys).Add(rows.values).Add(std::vector<uint16_t>()).Add(landmarks))
        .status;
  };
  const auto refused = [&](const std::vector<uint64_t>& positions, size_t landmarks) {
    // Tokens [40, 130): blocks 1 to 3 end in them.
    return Describe(append(given, 40, 90, positions, std::vector<uint16_t>(landmarks * 2 * 16)));
  };
  const std::string invalid = "INVALID_ARGUMENT ";
  EXPECT_EQ(refused({32, 96}, 1), invalid + "payload");
  EXPECT_EQ(refused({32, 96}, 4), invalid + "payload");  // fp32
  EXPECT_EQ(refused({}, 1), invalid + "payload");
  EXPECT_EQ(refused({40}, 1), invalid + "landmark_positions[0]");       // begins no block
  EXPECT_EQ(refused({0, 32}, 2), invalid + "landmark_positions[0]");    // has ended before
  EXPECT_EQ(refused({96, 128}, 2), invalid + "landmark_positions[1]");  // is not whole
  EXPECT_EQ(refused({64, 64}, 2), invalid + "landmark_positions[1]");
  EXPECT_EQ(refused({64, 32}, 2), invalid + "landmark_positions[1]");
  EXPECT_EQ(refused({~uint64_t{31}}, 1), invalid + "landmark_positions[0]");
  EXPECT_EQ(Describe(append(bounds, 0, 40, {0}, std::vector<uint16_t>(2 * 16))),
            "FAILED_PRECONDITION landmark_positions");
  EXPECT_EQ(Describe(append(given, 41, 90, {32}, std::vector<uint16_t>(2 * 16))),
            "FAILED_PRECONDITION start");
  std::vector<uint16_t> bad(2 * 2 * 16);
  bad[2 * 16 + 16 + 5] = kBf16Infinity;
  const absl::Status status = append(given, 40, 90, {32, 64}, bad);
  EXPECT_EQ(Describe(status), invalid + "payload");
  EXPECT_NE(status.message().find("landmark 1, KV head 1, element 5"), std::string::npos) << status;
  const auto info = [&] {
    proto::StatsRequest request;
    request.set_with_sessions(true);
    request.set_session_id(given.session_id());
    return service_.Call(request).message.sessions(0);
  };
  EXPECT_EQ(info().tokens(0), 40U);
  EXPECT_EQ(refused({32, 96}, 2), "OK");
  EXPECT_EQ(info().tokens(0), 130U);
  EXPECT_EQ(info().landmarks_given(), 0U) << "of layer 1";
  EXPECT_EQ(info().landmark().summary(), proto::LANDMARK_GIVEN);
  EXPECT_EQ(info().landmark().block(), 32U);
  for (const proto::SessionRef& session : {bounds, given}) {
    proto::CloseSessionRequest close;
    *close.mutable_session() = session;
    EXPECT_TRUE(service_.Call(close).ok());
  }
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
