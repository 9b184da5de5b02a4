// Wrong requests against the request handler: each gets exactly one answer, nothing crashes, and a
// session that is not theirs answers as before, bit for bit.
#include <google/protobuf/stubs/logging.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/dtype.h"
#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"
#include "service/compute_pool.h"
#include "service/index_builder.h"
#include "service/memory_budget.h"
#include "service/request_handler.h"
#include "service/session_store.h"
#include "tests/proto/message_mutator.h"
#include "tests/proto/messages.h"
#include "tests/proto/recorded_frames.h"

namespace kvseek::service {
namespace {

using google::protobuf::Message;
using proto::Op;
using std::chrono::milliseconds;

constexpr uint32_t kLayers = 2;
constexpr uint32_t kKvHeads = 2;
constexpr uint32_t kQueryHeads = 6;
constexpr uint32_t kKeyDim = 16;
constexpr uint32_t kValueDim = 24;
constexpr uint32_t kBystanderTokens = 1100;  // a sealed segment and a tail
constexpr uint32_t kVictimTokens = 1030;
constexpr size_t kTogether = 8;  // requests under way at a time

DaemonOptions SmallDaemon() {
  DaemonOptions options;
  options.workers = 2;
  options.memory_limit_bytes = uint64_t{256} << 20;
  options.sessions_max = 32;
  options.tokens_max = 1U << 16;
  options.queue_limit = 64;
  options.payload_bytes_max = 8U << 20;
  options.build_from_tokens = 1024;
  options.audit_share = 0.5;
  return options;
}

std::string PayloadText(const Response& response) {
  const Payload& payload = response.payload;
  return {reinterpret_cast<const char*>(payload.data.get()), payload.bytes};
}

// One request's answers: there must be one.
class Ticket {
 public:
  void Answer(Response response) {
    const std::lock_guard lock(mutex_);
    if (++answers_ == 1) response_ = std::move(response);
    arrived_.notify_all();
  }
  bool Wait() {
    std::unique_lock lock(mutex_);
    return arrived_.wait_for(lock, std::chrono::seconds(60), [this] { return answers_ > 0; });
  }
  int answers() const {
    const std::lock_guard lock(mutex_);
    return answers_;
  }
  /// After Wait.
  const Response& response() const { return response_; }

 private:
  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  int answers_ = 0;
  Response response_;
};

struct Call {
  Op op = Op::kHealth;
  std::string metadata;
  std::string payload;
  milliseconds time_left{30000};
  bool cancelled = false;
};

// Tensor bytes whose parts stand where the protocol wants them.
class Parts {
 public:
  Parts& Add(const std::string& bytes) {
    const size_t offset = layout_.Add(bytes.size());
    payload_.resize(layout_.bytes());
    if (!bytes.empty()) std::memcpy(payload_.data() + offset, bytes.data(), bytes.size());
    return *this;
  }
  std::string Take() { return std::move(payload_); }

 private:
  proto::PayloadLayout layout_;
  std::string payload_;
};

std::string RandomBf16(size_t count, proto::MessageMutator& random) {
  std::string bytes(2 * count, '\0');
  for (size_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(random.Below(2001)) / 500.0F - 2.0F;
    const uint16_t bits = kernels::FloatToBf16(value);
    std::memcpy(bytes.data() + 2 * i, &bits, 2);
  }
  return bytes;
}

class RequestFuzzTest : public testing::Test {
 protected:
  RequestFuzzTest()
      : log_(google::protobuf::SetLogHandler(nullptr)),  // it logs every string that is not UTF-8
        budget_(options_.memory_limit_bytes, options_.retry_after),
        store_(options_, budget_),
        pool_(std::make_unique<ComputePool>(options_)),
        builder_(std::make_unique<IndexBuilder>(options_, budget_)),
        handler_(std::make_unique<RequestHandler>(
            options_, store_, *pool_, *builder_,
            ServerFacts{.connections_open = [] { return uint64_t{1}; }})) {}
  ~RequestFuzzTest() override {
    handler_.reset();
    builder_.reset();
    pool_.reset();
    google::protobuf::SetLogHandler(log_);
  }

  std::shared_ptr<Ticket> Send(const Call& call) {
    Request request;
    request.op = call.op;
    request.metadata = call.metadata;
    request.payload.bytes = call.payload.size();
    request.payload.data = index::MakeAligned<uint8_t>(call.payload.size());
    std::memcpy(request.payload.data.get(), call.payload.data(), call.payload.size());
    request.deadline = std::chrono::steady_clock::now() + call.time_left;
    request.cancelled = std::make_shared<std::atomic<bool>>(call.cancelled);
    auto ticket = std::make_shared<Ticket>();
    tickets_.push_back(ticket);
    handler_->Handle(std::move(request),
                     [ticket](Response response) { ticket->Answer(std::move(response)); });
    return ticket;
  }

  // The answer to a request that must succeed.
  template <typename M>
  M Succeed(Op op, const Message& message, std::string payload = {}) {
    const auto ticket =
        Send({.op = op, .metadata = message.SerializeAsString(), .payload = std::move(payload)});
    EXPECT_TRUE(ticket->Wait());
    const Response& response = ticket->response();
    EXPECT_FALSE(response.error) << Error(response);
    M answer;
    EXPECT_TRUE(answer.ParseFromString(response.metadata));
    return answer;
  }

  // What an answer says was wrong.
  static absl::Status Error(const Response& response) {
    proto::Error error;
    if (!response.error) return absl::OkStatus();
    if (!error.ParseFromString(response.metadata)) return absl::InternalError("not an Error");
    return proto::FromError(error);
  }

  proto::SessionRef MakeSession(uint32_t tokens, uint64_t seed) {
    proto::OpenSessionRequest open;
    proto::ModelShape* shape = open.mutable_shape();
    shape->set_layers(kLayers);
    shape->set_kv_heads(kKvHeads);
    shape->set_query_heads(kQueryHeads);
    shape->set_key_dim(kKeyDim);
    shape->set_value_dim(kValueDim);
    shape->set_dtype(proto::DTYPE_BF16);
    for (const proto::IndexKind kind :
         {proto::INDEX_LANDMARK, proto::INDEX_CLUSTER, proto::INDEX_GRAPH, proto::INDEX_PRODUCT}) {
      open.add_build(kind);
    }
    auto session = Succeed<proto::OpenSessionResponse>(Op::kOpenSession, open).session();
    proto::MessageMutator random(seed);
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const Call append = AppendCall(session, layer, 0, tokens, random);
      proto::AppendRequest message;
      message.ParseFromString(append.metadata);
      EXPECT_EQ(Succeed<proto::AppendResponse>(Op::kAppend, message, append.payload).tokens_held(),
                tokens);
    }
    return session;
  }

  static Call AppendCall(const proto::SessionRef& session, uint32_t layer, uint64_t start,
                         uint32_t tokens, proto::MessageMutator& random) {
    proto::AppendRequest message;
    *message.mutable_session() = session;
    message.set_layer(layer);
    message.set_start(start);
    message.set_tokens(tokens);
    if (tokens > 0) message.add_query_positions(start + tokens / 2);
    const size_t rows = size_t{tokens} * kKvHeads;
    const size_t queries = tokens > 0 ? kQueryHeads : 0;
    return {.op = Op::kAppend,
            .metadata = message.SerializeAsString(),
            .payload = Parts()
                           .Add(RandomBf16(rows * kKeyDim, random))
                           .Add(RandomBf16(rows * kValueDim, random))
                           .Add(RandomBf16(queries * kKeyDim, random))
                           .Take()};
  }

  template <typename M>
  static Call QueryCall(Op op, M message, const std::vector<proto::SessionRef>& sessions,
                        proto::IndexKind index, uint64_t seed) {
    proto::MessageMutator random(seed);
    Parts parts;
    uint32_t tokens = 0;
    for (const proto::SessionRef& session : sessions) {
      proto::QueryItem* item = message.add_items();
      *item->mutable_session() = session;
      item->set_layer(1);
      item->set_tokens(++tokens);
      item->set_range_begin(3);
      size_t heads = kQueryHeads;
      if (tokens > 1) {  // the second item: a range's end, and one KV head only
        item->add_range_end(1000);
        item->add_kv_heads(1);
        heads /= kKvHeads;
      }
      parts.Add(RandomBf16(tokens * heads * kKeyDim, random));
      if (op != Op::kTopK) continue;
      const size_t lists = tokens * heads * kKvHeads / kQueryHeads;
      std::string held;
      for (size_t list = 0; list < lists; ++list) {
        item->add_held_counts(2);
        for (const uint32_t position : {500U, 600U}) {
          held.append(reinterpret_cast<const char*>(&position), sizeof(position));
        }
      }
      parts.Add(held);
    }
    message.set_query_dtype(proto::DTYPE_BF16);
    message.mutable_options()->set_index(index);
    message.mutable_options()->set_candidates(128);
    message.mutable_options()->set_exact_rows(8);
    message.mutable_options()->set_audit_samples(16);
    return {.op = op, .metadata = message.SerializeAsString(), .payload = parts.Take()};
  }

  static Call AttendCall(const std::vector<proto::SessionRef>& sessions, proto::IndexKind index,
                         uint64_t seed) {
    proto::AttendRequest message;
    message.mutable_options()->set_list_read(true);
    return QueryCall(Op::kAttend, message, sessions, index, seed);
  }

  static Call TopKCall(const std::vector<proto::SessionRef>& sessions, proto::IndexKind index,
                       uint64_t seed) {
    proto::TopKRequest message;
    message.set_k(20);
    message.set_with_rows(true);
    message.set_with_state(true);
    return QueryCall(Op::kTopK, message, sessions, index, seed);
  }

  // At least one right request of every op, all on `victim`.
  static std::vector<Call> RightCalls(const proto::SessionRef& victim);

  // What the bystander answers, all bits of it but the time it took.
  std::string BystanderAnswer() {
    std::string bits;
    for (const proto::IndexKind index : {proto::INDEX_EXACT, proto::INDEX_LADDER}) {
      const auto ticket = Send(AttendCall({bystander_}, index, 99));
      EXPECT_TRUE(ticket->Wait());
      EXPECT_FALSE(ticket->response().error) << Error(ticket->response());
      proto::AttendResponse message;
      EXPECT_TRUE(message.ParseFromString(ticket->response().metadata));
      message.clear_compute_us();
      bits += message.SerializeAsString() + PayloadText(ticket->response());
    }
    return bits;
  }

  static Call Mutate(const std::vector<Call>& calls, proto::MessageMutator& random);
  bool ChangesBystander(const Call& call) const;
  static void CheckAnswer(const Call& call, const Response& response);
  void CloseAllButBystander();

  const DaemonOptions options_ = SmallDaemon();
  google::protobuf::LogHandler* const log_;
  MemoryBudget budget_;
  SessionStore store_;
  std::unique_ptr<ComputePool> pool_;
  std::unique_ptr<IndexBuilder> builder_;
  std::unique_ptr<RequestHandler> handler_;
  std::vector<std::shared_ptr<Ticket>> tickets_;
  proto::SessionRef bystander_;
};

std::vector<Call> RequestFuzzTest::RightCalls(const proto::SessionRef& victim) {
  std::vector<Call> calls;
  const auto add = [&calls](Op op, const Message& message, std::string payload = {}) {
    calls.push_back(
        {.op = op, .metadata = message.SerializeAsString(), .payload = std::move(payload)});
  };
  proto::MessageMutator random(7);
  for (const proto::IndexKind index :
       {proto::INDEX_EXACT, proto::INDEX_LADDER, proto::INDEX_LANDMARK, proto::INDEX_CLUSTER,
        proto::INDEX_GRAPH, proto::INDEX_PRODUCT}) {
    calls.push_back(AttendCall({victim}, index, 1));
    calls.push_back(AttendCall({victim, victim}, index, 2));
    calls.push_back(TopKCall({victim, victim}, index, 3));
  }
  calls.push_back(AppendCall(victim, 0, kVictimTokens, 2, random));
  calls.push_back(AppendCall(victim, 1, kVictimTokens - 5, 3, random));

  proto::FetchRowsRequest fetch;
  *fetch.mutable_session() = victim;
  fetch.set_count(3);
  const int64_t positions[] = {0, 1029, 500};
  add(Op::kFetchRows, fetch, {reinterpret_cast<const char*>(positions), sizeof(positions)});

  proto::OpenSessionRequest open;
  open.mutable_shape()->set_layers(1);
  open.mutable_shape()->set_kv_heads(1);
  open.mutable_shape()->set_query_heads(2);
  open.mutable_shape()->set_key_dim(8);
  open.mutable_shape()->set_value_dim(8);
  open.mutable_shape()->set_dtype(proto::DTYPE_FP16);
  open.set_tokens_expected(100);
  open.set_error_target(0.1F);
  open.set_model("m");
  open.mutable_plan()->set_version(1);
  proto::PlannedHead& head = *open.mutable_plan()->add_heads();
  head.set_mode("auto");
  head.set_index("cluster");
  head.set_candidates(200);
  add(Op::kOpenSession, open);
  proto::ForkRequest fork;
  *fork.mutable_session() = victim;
  fork.set_tokens(1000);
  add(Op::kFork, fork);
  proto::TruncateRequest truncate;
  *truncate.mutable_session() = victim;
  truncate.set_tokens(kVictimTokens);
  add(Op::kTruncate, truncate);
  proto::CloseSessionRequest close;
  *close.mutable_session() = victim;
  add(Op::kCloseSession, close);
  proto::StatsRequest stats;
  stats.set_with_sessions(true);
  add(Op::kStats, stats);
  add(Op::kHealth, proto::HealthRequest());
  return calls;
}

// One right request, made wrong: in a field, in its bytes, in its payload, in its time, or sent as
// another operation.
Call RequestFuzzTest::Mutate(const std::vector<Call>& calls, proto::MessageMutator& random) {
  Call call = calls[random.Below(calls.size())];
  for (size_t steps = 1 + random.Below(3); steps > 0; --steps) {
    switch (random.Below(8)) {
      case 0:
      case 1:
      case 2:
      case 3: {
        const auto message = proto::NewMessage(call.op, 0);
        if (!message->ParseFromString(call.metadata)) break;
        random.ChangeField(*message);
        call.metadata = message->SerializeAsString();
        break;
      }
      case 4:
        random.ChangeBytes(call.metadata);
        break;
      case 5:
        random.ChangeBytes(call.payload);
        break;
      case 6:  // a word that is no number, or a position far out
        if (call.payload.size() >= 8) {
          const size_t at = random.Below(call.payload.size() / 8) * 8;
          const uint64_t word = random.Below(2) == 0 ? ~uint64_t{0} : random.Bits();
          std::memcpy(call.payload.data() + at, &word, 8);
        }
        break;
      default:
        if (random.Below(4) == 0) call.op = calls[random.Below(calls.size())].op;
        if (random.Below(8) == 0) call.time_left = milliseconds(random.Below(3)) - milliseconds(1);
        call.cancelled = random.Below(8) == 0;
    }
  }
  return call;
}

// Whether the request, if it were right, would rightly change the bystander.
bool RequestFuzzTest::ChangesBystander(const Call& call) const {
  const auto message = proto::NewMessage(call.op, 0);
  if (!message->ParseFromString(call.metadata)) return false;
  const auto names = [this](const proto::SessionRef& session) {
    return session.session_id() == bystander_.session_id();
  };
  if (const auto* append = dynamic_cast<const proto::AppendRequest*>(message.get())) {
    return names(append->session());
  }
  if (const auto* truncate = dynamic_cast<const proto::TruncateRequest*>(message.get())) {
    return names(truncate->session());
  }
  if (const auto* close = dynamic_cast<const proto::CloseSessionRequest*>(message.get())) {
    return names(close->session());
  }
  return false;
}

void RequestFuzzTest::CheckAnswer(const Call& call, const Response& response) {
  const uint16_t flags = proto::kFlagResponse | (response.error ? proto::kFlagError : 0U);
  const auto message = proto::NewMessage(call.op, flags);
  ASSERT_TRUE(message->ParseFromString(response.metadata));
  if (!response.error) {
    if (response.payload.bytes == 0) return;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(response.payload.data.get()) % 64, 0U);
    EXPECT_TRUE(call.op == Op::kAttend || call.op == Op::kTopK || call.op == Op::kFetchRows);
    return;
  }
  EXPECT_EQ(response.payload.bytes, 0U);
  const auto& error = dynamic_cast<const proto::Error&>(*message);
  const absl::Status status = proto::FromError(error);
  EXPECT_NE(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_NE(status.code(), absl::StatusCode::kUnknown) << status;
  EXPECT_EQ(error.message().rfind(error.field(), 0), 0U) << status;
}

void RequestFuzzTest::CloseAllButBystander() {
  store_.ReapExpired(std::chrono::steady_clock::now());  // of a fork with a lease of 1 ms
  for (const auto& session : store_.List()) {
    if (session->id() == bystander_.session_id()) continue;
    proto::CloseSessionRequest close;
    close.mutable_session()->set_boot_id(store_.boot_id());
    close.mutable_session()->set_session_id(session->id());
    const auto ticket =
        Send({.op = Op::kCloseSession, .metadata = close.SerializeAsString(), .payload = ""});
    ASSERT_TRUE(ticket->Wait());
    const absl::Status status = Error(ticket->response());
    EXPECT_TRUE(status.ok() || absl::IsNotFound(status)) << status;  // its lease ran out meanwhile
  }
  store_.ReapExpired(std::chrono::steady_clock::now());
}

TEST_F(RequestFuzzTest, RightRequestsSucceed) {
  const proto::SessionRef victim = MakeSession(kVictimTokens, 2);
  for (const Call& call : RightCalls(victim)) {
    const auto ticket = Send(call);
    ASSERT_TRUE(ticket->Wait()) << proto::OpName(call.op);
    EXPECT_FALSE(ticket->response().error)
        << proto::OpName(call.op) << ": " << Error(ticket->response());
    CheckAnswer(call, ticket->response());
  }
}

TEST_F(RequestFuzzTest, EachWrongRequestGetsOneAnswerAndHarmsNobody) {
  constexpr int kRounds = 100;
  constexpr int kBatches = 12;
  bystander_ = MakeSession(kBystanderTokens, 1);
  const std::string expected = BystanderAnswer();
  ASSERT_FALSE(expected.empty());
  proto::MessageMutator random(20240607);
  size_t refused = 0;
  size_t done = 0;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<Call> calls = RightCalls(MakeSession(kVictimTokens, 2));
    for (int batch = 0; batch < kBatches; ++batch) {
      std::vector<std::pair<Call, std::shared_ptr<Ticket>>> sent;
      while (sent.size() < kTogether) {
        Call call = Mutate(calls, random);
        if (ChangesBystander(call)) continue;
        auto ticket = Send(call);
        sent.emplace_back(std::move(call), std::move(ticket));
      }
      for (const auto& [call, ticket] : sent) {
        SCOPED_TRACE(proto::OpName(call.op));
        ASSERT_TRUE(ticket->Wait()) << "no answer";
        CheckAnswer(call, ticket->response());
        ++(ticket->response().error ? refused : done);
      }
      ASSERT_TRUE(BystanderAnswer() == expected) << "round " << round << ", batch " << batch;
    }
    CloseAllButBystander();
  }
  handler_.reset();
  pool_.reset();  // whatever might answer twice has had its chance
  for (const auto& ticket : tickets_) ASSERT_EQ(ticket->answers(), 1);
  EXPECT_GT(refused, 1000U);  // else the mutations are too tame,
  EXPECT_GT(done, 300U);      // or too wild
}

// Whole frames kept for fuzzers; what they mean to this daemon does not matter.
TEST_F(RequestFuzzTest, RecordedFramesGetOneAnswer) {
  bystander_ = MakeSession(kBystanderTokens, 1);
  const std::string expected = BystanderAnswer();
  size_t frames = 0;
  for (const std::string folder : {"fixtures", "corpus"}) {
    const std::string path = std::string(KVSEEK_SOURCE_DIR "/tests/proto/") + folder;
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      SCOPED_TRACE(entry.path().filename().string());
      const std::string frame = proto::ReadFile(entry.path().string());
      const auto header = proto::DecodeHeader(proto::BytesOf(frame), {});
      if (!header.ok() || frame.size() < proto::kHeaderBytes + header->BodyBytes()) continue;
      if (!proto::IsKnownOp(static_cast<uint8_t>(header->op)) || header->op == Op::kHello ||
          header->op == Op::kCancel) {
        continue;  // the connection's business
      }
      Call call;
      call.op = header->op;
      call.metadata = frame.substr(proto::kHeaderBytes, header->metadata_bytes);
      call.payload =
          frame.substr(proto::kHeaderBytes + header->metadata_bytes + header->PaddingBytes(),
                       header->payload_bytes);
      const auto ticket = Send(call);
      ASSERT_TRUE(ticket->Wait());
      CheckAnswer(call, ticket->response());
      ++frames;
    }
  }
  EXPECT_GT(frames, 20U);
  EXPECT_TRUE(BystanderAnswer() == expected);
}

}  // namespace
}  // namespace kvseek::service
