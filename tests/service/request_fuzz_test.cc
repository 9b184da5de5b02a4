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
#include "tests/service/right_calls.h"
#include "tests/service/service_fixture.h"

namespace kvseek::service {
namespace {

using google::protobuf::Message;
using proto::Op;
using std::chrono::milliseconds;

constexpr uint32_t kBystanderTokens = 1100;  // a sealed segment and a tail
constexpr size_t kTogether = 8;              // requests under way at a time

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

  std::shared_ptr<Ticket> Send(const TestCall& call) {
    Request request;
    request.op = call.op;
    request.metadata = call.metadata;
    request.payload = MakePayload(call.payload.size());
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
    *open.mutable_shape() = SmallShape();
    for (const proto::IndexKind kind :
         {proto::INDEX_LANDMARK, proto::INDEX_CLUSTER, proto::INDEX_GRAPH, proto::INDEX_PRODUCT}) {
      open.add_build(kind);
    }
    open.mutable_landmark()->set_summary(proto::LANDMARK_GIVEN);
    open.mutable_landmark()->set_block(kLandmarkBlock);
    auto session = Succeed<proto::OpenSessionResponse>(Op::kOpenSession, open).session();
    proto::MessageMutator random(seed);
    for (uint32_t layer = 0; layer < open.shape().layers(); ++layer) {
      const TestCall append = RightAppend(session, layer, 0, tokens, random);
      proto::AppendRequest message;
      message.ParseFromString(append.metadata);
      EXPECT_EQ(Succeed<proto::AppendResponse>(Op::kAppend, message, append.payload).tokens_held(),
                tokens);
    }
    return session;
  }

  // What the bystander answers, all bits of it but the time it took.
  std::string BystanderAnswer() {
    std::string bits;
    for (const proto::IndexKind index : {proto::INDEX_EXACT, proto::INDEX_LADDER}) {
      const auto ticket = Send(RightAttend({bystander_}, index, 99));
      EXPECT_TRUE(ticket->Wait());
      EXPECT_FALSE(ticket->response().error) << Error(ticket->response());
      proto::AttendResponse message;
      EXPECT_TRUE(message.ParseFromString(ticket->response().metadata));
      message.clear_compute_us();
      bits += message.SerializeAsString() + PayloadText(ticket->response());
    }
    return bits;
  }

  static TestCall Mutate(const std::vector<TestCall>& calls, proto::MessageMutator& random);
  bool ChangesBystander(const TestCall& call) const;
  static void CheckAnswer(const TestCall& call, const Response& response);
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

// One right request, made wrong: in a field, in its bytes, in its payload, in its time, or sent as
// another operation.
TestCall RequestFuzzTest::Mutate(const std::vector<TestCall>& calls,
                                 proto::MessageMutator& random) {
  TestCall call = calls[random.Below(calls.size())];
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
bool RequestFuzzTest::ChangesBystander(const TestCall& call) const {
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

void RequestFuzzTest::CheckAnswer(const TestCall& call, const Response& response) {
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
  for (const TestCall& call : RightCalls(victim)) {
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
    std::vector<TestCall> calls = RightCalls(MakeSession(kVictimTokens, 2));
    for (int batch = 0; batch < kBatches; ++batch) {
      std::vector<std::pair<TestCall, std::shared_ptr<Ticket>>> sent;
      while (sent.size() < kTogether) {
        TestCall call = Mutate(calls, random);
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
      TestCall call;
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
