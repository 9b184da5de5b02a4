// The lane and the queue of one stream: nothing overtakes or cuts a frame, nothing goes to a socket
// that has been closed.
#include "service/answer_writer.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/strand.hpp>
#include <future>
#include <optional>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "tests/client/raw_socket.h"

namespace kvseek::service {
namespace {

namespace asio = boost::asio;
using proto::Op;
using std::chrono::milliseconds;
using test::RawFrame;
using test::RawSocket;

constexpr int kSendBufferBytes = 8 << 10;
constexpr size_t kLarge = 1 << 20;  ///< bytes, more than the socket takes at once
constexpr size_t kRoom = 12 << 10;  ///< a peer that has read so much makes room for a small frame

/// What the payload of an answer holds: another one for each id.
std::string Content(uint64_t id, size_t bytes) {
  std::string content(bytes, '\0');
  for (size_t i = 0; i < bytes; ++i) content[i] = static_cast<char>(i * 31 + id * 7 + (i >> 8));
  return content;
}

AnswerFrame MakeAnswer(uint64_t id, size_t bytes) {
  Response response;
  response.metadata = std::to_string(id);
  if (bytes != 0) {
    response.payload = MakePayload(bytes);
    Content(id, bytes).copy(reinterpret_cast<char*>(response.payload.data.get()), bytes);
  }
  return AnswerFrame::Make(Op::kAttend, id, std::move(response), true);
}

/// What is left of a frame, as it stands on the stream.
std::string Bytes(const AnswerFrame& frame) {
  std::string bytes;
  for (const asio::const_buffer& part : frame.Rest()) {
    bytes.append(static_cast<const char*>(part.data()), part.size());
  }
  return bytes;
}

/// A writer over one end of a pair of sockets, and a strand's thread. The test has the other end.
class AnswerWriterTest : public testing::Test {
 protected:
  /// What `work` returns on the strand.
  template <typename Work>
  auto OnStrand(Work work) {
    std::packaged_task<decltype(work())()> task(std::move(work));
    auto result = task.get_future();
    asio::post(stream_->executor(), [&task] { task(); });
    return result.get();
  }
  void SetUp() override {
    int ends[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &kSendBufferBytes, sizeof(kSendBufferBytes));
    descriptor_ = ends[0];
    peer_descriptor_ = ends[1];
    stream_.emplace(transport::Stream::Socket(asio::make_strand(io_),
                                              asio::generic::stream_protocol(AF_UNIX, 0), ends[0]));
    peer_ = RawSocket(ends[1]);
    writer_.emplace(*stream_, milliseconds(100));
  }
  void TearDown() override {
    if (!thread_.joinable()) Run();
    OnStrand([this] { writer_->Close(); });
    work_.reset();
    thread_.join();
  }

  /// Starts the strand and the coroutine; before, only the lane moves anything.
  void Run() {
    asio::co_spawn(
        stream_->executor(),
        [this]() -> asio::awaitable<void> {
          for (;;) {
            const AnswerWriter::Written written = co_await writer_->WriteNext();
            if (written.error) co_return;
            written_ += written.frames;
          }
        },
        asio::detached);
    thread_ = std::thread([this] { io_.run(); });
  }
  /// As a connection's worker does it.
  bool Send(AnswerFrame frame) {
    const bool left = writer_->Send(std::move(frame));
    if (!left) asio::post(stream_->executor(), [this] { writer_->Wake(); });
    return left;
  }
  /// Reads from the stream, whatever frames they belong to.
  std::string Take(size_t bytes) const {
    std::string taken(bytes, '\0');
    EXPECT_EQ(recv(peer_descriptor_, taken.data(), bytes, MSG_WAITALL),
              static_cast<ssize_t>(bytes));
    return taken;
  }
  void ExpectNext(uint64_t id, size_t bytes) {
    const std::optional<RawFrame> frame = peer_.ReadFrame();
    ASSERT_TRUE(frame.has_value());
    EXPECT_EQ(frame->header.request_id, id);
    EXPECT_EQ(frame->metadata, std::to_string(id));
    EXPECT_TRUE(frame->payload == Content(id, bytes));
  }
  bool AwaitIdle() {
    for (int i = 0; i < 1000 && !writer_->Idle(); ++i) std::this_thread::sleep_for(milliseconds(1));
    return writer_->Idle();
  }

  asio::io_context io_;
  asio::executor_work_guard<asio::io_context::executor_type> work_ = asio::make_work_guard(io_);
  int descriptor_ = -1;
  int peer_descriptor_ = -1;
  std::optional<transport::Stream> stream_;
  RawSocket peer_;
  std::optional<AnswerWriter> writer_;
  std::atomic<size_t> written_{0};
  std::thread thread_;
};

TEST_F(AnswerWriterTest, TheLaneNeedsNoOtherThread) {
  for (const size_t bytes : {0, 1, 63, 64, 1000}) {
    EXPECT_TRUE(writer_->Send(MakeAnswer(bytes + 1, bytes)));
    ExpectNext(bytes + 1, bytes);
  }
  EXPECT_TRUE(writer_->Idle());
  EXPECT_EQ(writer_->queued_bytes(), 0U);
}

TEST_F(AnswerWriterTest, NothingOvertakesOrCutsAFrameSentInPart) {
  EXPECT_FALSE(writer_->Send(MakeAnswer(1, kLarge)));
  EXPECT_FALSE(writer_->Idle());
  EXPECT_LT(writer_->queued_bytes(), MakeAnswer(1, kLarge).Left());  // some has left
  EXPECT_GT(writer_->queued_bytes(), 0U);
  std::string stream = Take(kRoom);  // the socket would take the next
  EXPECT_FALSE(writer_->Send(MakeAnswer(2, 10)));
  EXPECT_FALSE(writer_->Send(MakeAnswer(3, 0)));
  Run();
  const std::string expected =
      Bytes(MakeAnswer(1, kLarge)) + Bytes(MakeAnswer(2, 10)) + Bytes(MakeAnswer(3, 0));
  stream += Take(expected.size() - stream.size());
  EXPECT_TRUE(stream == expected);
  EXPECT_TRUE(AwaitIdle());
  EXPECT_EQ(writer_->queued_bytes(), 0U);
  EXPECT_TRUE(writer_->Send(MakeAnswer(4, 100)));  // the lane is open again
  ExpectNext(4, 100);
}

TEST_F(AnswerWriterTest, NothingCutsAFrameThatTheCoroutineWrites) {
  writer_->Push(MakeAnswer(1, kLarge));
  Run();
  std::promise<void> held;
  std::promise<void> go_on;
  asio::post(stream_->executor(), [&] {  // the coroutine waits by now for the peer to read
    held.set_value();
    go_on.get_future().wait();
  });
  held.get_future().wait();
  std::string stream = Take(kRoom);
  EXPECT_FALSE(Send(MakeAnswer(2, 10)));
  go_on.set_value();
  const std::string expected = Bytes(MakeAnswer(1, kLarge)) + Bytes(MakeAnswer(2, 10));
  stream += Take(expected.size() - stream.size());
  EXPECT_TRUE(stream == expected);
}

TEST_F(AnswerWriterTest, ThePeerMayStopAnywhereInAFrame) {
  AnswerFrame frame = MakeAnswer(1, 3000);
  const std::string whole = Bytes(frame);
  for (frame.sent = 0; frame.sent <= whole.size(); frame.sent += 61) {
    EXPECT_TRUE(Bytes(frame) == whole.substr(frame.sent)) << frame.sent;
    EXPECT_EQ(frame.Left(), whole.size() - frame.sent);
  }
}

TEST_F(AnswerWriterTest, ManyWorkersAndASlowReader) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE(seed);
  Run();
  constexpr uint64_t kEach = 200;
  constexpr uint64_t kWorkers = 4;
  std::vector<std::vector<size_t>> bytes(kWorkers);
  std::mt19937 random(seed);
  for (auto& sizes : bytes) {
    for (uint64_t i = 0; i < kEach; ++i) {
      sizes.push_back(random() % (random() % 8 == 0 ? 100000U : 3000U));
    }
  }
  std::atomic<size_t> at_once{0};
  std::vector<std::thread> workers;
  for (uint64_t worker = 0; worker < kWorkers; ++worker) {
    workers.emplace_back([&, worker] {
      for (uint64_t i = 0; i < kEach; ++i) {
        if (Send(MakeAnswer(worker * kEach + i + 1, bytes[worker][i]))) ++at_once;
        if (i % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
      }
    });
  }
  std::set<uint64_t> seen;
  for (uint64_t i = 0; i < kWorkers * kEach; ++i) {
    if (i % 32 == 0) std::this_thread::sleep_for(milliseconds(3));
    const std::optional<RawFrame> frame = peer_.ReadFrame();
    if (!frame.has_value()) break;
    const uint64_t id = frame->header.request_id;
    EXPECT_TRUE(seen.insert(id).second);
    EXPECT_TRUE(frame->payload == Content(id, bytes[(id - 1) / kEach][(id - 1) % kEach]));
  }
  for (std::thread& worker : workers) worker.join();
  EXPECT_EQ(seen.size(), kWorkers * kEach);
  EXPECT_TRUE(AwaitIdle());
  EXPECT_EQ(written_ + at_once, kWorkers * kEach);
  EXPECT_EQ(writer_->queued_bytes(), 0U);
}

TEST_F(AnswerWriterTest, TakesNoMoreButSendsWhatItHas) {
  EXPECT_FALSE(writer_->Send(MakeAnswer(1, kLarge)));
  writer_->Push(MakeAnswer(2, 10));
  writer_->TakeNoMore();
  EXPECT_TRUE(writer_->Send(MakeAnswer(3, 10)));
  Run();
  ExpectNext(1, kLarge);
  ExpectNext(2, 10);
  EXPECT_TRUE(AwaitIdle());
  EXPECT_TRUE(writer_->Send(MakeAnswer(4, 10)));
  EXPECT_FALSE(peer_.Ended(milliseconds(20)));  // nothing more has come
}

TEST_F(AnswerWriterTest, APeerThatDoesNotReadIsOverdue) {
  Run();
  EXPECT_FALSE(OnStrand([&] { return writer_->Overdue(std::chrono::steady_clock::now()); }));
  EXPECT_FALSE(Send(MakeAnswer(1, kLarge)));
  bool overdue = false;
  for (int i = 0; i < 1000 && !overdue; ++i) {
    std::this_thread::sleep_for(milliseconds(5));
    overdue = OnStrand([&] { return writer_->Overdue(std::chrono::steady_clock::now()); });
  }
  EXPECT_TRUE(overdue);
}

TEST_F(AnswerWriterTest, NothingGoesToAClosedDescriptorsNextOwner) {
  Run();
  std::atomic<bool> stop{false};
  std::vector<std::thread> workers;
  for (uint64_t id = 1; id <= 3; ++id) {
    workers.emplace_back([&, id] {
      while (!stop) Send(MakeAnswer(id, 10));
    });
  }
  while (!peer_.ReadFrame().has_value()) {
  }
  OnStrand([this] { writer_->Close(); });
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  RawSocket next(ends[0]);
  RawSocket other(ends[1]);
  EXPECT_TRUE(ends[0] == descriptor_ || ends[1] == descriptor_);  // else it would prove nothing
  std::this_thread::sleep_for(milliseconds(20));
  stop = true;
  for (std::thread& worker : workers) worker.join();
  char byte = 0;
  EXPECT_EQ(recv(ends[0], &byte, 1, MSG_DONTWAIT), -1);
  EXPECT_EQ(recv(ends[1], &byte, 1, MSG_DONTWAIT), -1);
  EXPECT_TRUE(writer_->Send(MakeAnswer(9, 10)));  // dropped
}

}  // namespace
}  // namespace kvseek::service
