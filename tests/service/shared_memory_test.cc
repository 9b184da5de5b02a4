// Shared memory against clients that do with it what they like, and against the ends of processes.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "client/kv_client.h"
#include "service/daemon.h"
#include "tests/client/raw_socket.h"
#include "tests/transport/receive_descriptor.h"
#include "transport/shared_rings.h"

namespace kvseek::service {
namespace {

using proto::Op;
using std::chrono::milliseconds;
using test::MakeFrame;
using test::RawSocket;
using transport::RingCounters;
using Clock = std::chrono::steady_clock;

constexpr uint64_t kRingBytes = 64 << 10;
constexpr uint64_t kMemoryBytes = 4096 + 2 * kRingBytes;

/// A client that has the memory in its hands.
class Hostile {
 public:
  explicit Hostile(const std::string& path) : socket_(RawSocket::Connect("unix:" + path)) {
    proto::HelloRequest hello;
    hello.set_version_min(1);
    hello.set_version_max(1);
    hello.add_features(proto::kSharedMemory);
    EXPECT_TRUE(socket_.SendFrame(Op::kHello, 1, hello.SerializeAsString()));
    EXPECT_TRUE(socket_.ReadFrame().has_value());
    const int descriptor = transport::ReceiveDescriptor(socket_.descriptor());
    EXPECT_GE(descriptor, 0);
    memory_ = static_cast<uint8_t*>(
        mmap(nullptr, kMemoryBytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0));
    close(descriptor);
    EXPECT_NE(static_cast<void*>(memory_), MAP_FAILED);
  }
  ~Hostile() { munmap(memory_, kMemoryBytes); }
  Hostile(const Hostile&) = delete;
  Hostile& operator=(const Hostile&) = delete;

  RingCounters& requests() { return reinterpret_cast<RingCounters*>(memory_)[0]; }
  RingCounters& answers() { return reinterpret_cast<RingCounters*>(memory_)[1]; }
  uint8_t* request_bytes() { return memory_ + 4096; }
  uint8_t* answer_bytes() { return memory_ + 4096 + kRingBytes; }
  uint8_t* memory() { return memory_; }
  RawSocket& socket() { return socket_; }
  void Bell() { send(socket_.descriptor(), "", 1, MSG_NOSIGNAL | MSG_DONTWAIT); }

 private:
  RawSocket socket_;
  uint8_t* memory_ = nullptr;
};

class SharedMemoryTest : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    options_.listen = {"unix:" + path()};
    options_.workers = 1;
    options_.io_spin = std::chrono::microseconds(GetParam());
    options_.shared_ring_bytes = kRingBytes;
    options_.frame_timeout = milliseconds(300);
    Start();
  }
  void Start() {
    daemon_.reset();
    auto daemon = Daemon::Start(options_);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
  }
  std::string path() const { return dir_.path() + "/s"; }
  std::unique_ptr<KvClient> Connect(const std::string& scheme = "shm:") const {
    auto client = KvClient::Connect(
        {.address = scheme + path(), .spin = std::chrono::microseconds(GetParam())});
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? *std::move(client) : nullptr;
  }
  static uint64_t Connections(KvClient& client) {
    const auto stats = client.Stats(false);
    EXPECT_TRUE(stats.ok()) << stats.status();
    return stats.ok() ? stats->connections_open : 0;
  }
  /// Until only the one that asks is left.
  static void ExpectOthersGone(KvClient& client, milliseconds patience) {
    const auto give_up = Clock::now() + patience;
    while (Connections(client) > 1 && Clock::now() < give_up) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    EXPECT_EQ(Connections(client), 1U);
  }

  test::TempDir dir_;
  DaemonOptions options_;
  std::unique_ptr<Daemon> daemon_;
};

INSTANTIATE_TEST_SUITE_P(Spins, SharedMemoryTest, testing::Values(0, 500));

TEST_P(SharedMemoryTest, CountersThatCannotBeEndTheConnection) {
  const auto honest = Connect();
  for (const uint64_t written : {kRingBytes + 1, ~uint64_t{0}, uint64_t{1} << 63}) {
    Hostile client(path());
    client.requests().written = written;
    client.Bell();
    EXPECT_TRUE(client.socket().Ended());
    // It was told why.
    proto::FrameHeader header;
    std::array<uint8_t, proto::kHeaderBytes> bytes{};
    std::memcpy(bytes.data(), client.answer_bytes(), bytes.size());
    const auto last_words = proto::DecodeHeader(bytes, {});
    ASSERT_TRUE(last_words.ok()) << last_words.status();
    EXPECT_EQ(last_words->request_id, 0U);
    EXPECT_EQ(last_words->flags, proto::kFlagResponse | proto::kFlagError);
    EXPECT_TRUE(honest->Health().ok());
  }
  {  // room that cannot be, once something is to be answered
    Hostile client(path());
    const std::string frame = MakeFrame(Op::kHealth, 7, "");
    std::memcpy(client.request_bytes(), frame.data(), frame.size());
    client.answers().read = 1;  // nothing had been written
    client.requests().written = frame.size();
    client.Bell();
    const std::string more = MakeFrame(Op::kStats, 8, "");
    for (uint64_t at = frame.size(); at < 8 * kRingBytes; at += more.size()) {
      for (size_t i = 0; i < more.size(); ++i) {
        client.request_bytes()[(at + i) % kRingBytes] = static_cast<uint8_t>(more[i]);
      }
      client.requests().written = at + more.size();
      client.Bell();
      while (client.requests().read + kRingBytes / 2 < at) {
        if (client.socket().Ended(milliseconds(0))) break;
      }
    }
    ExpectOthersGone(*honest, std::chrono::seconds(5));
  }
  EXPECT_TRUE(honest->Health().ok());
}

TEST_P(SharedMemoryTest, ScribblingOverEverythingHarmsNobodyElse) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE(seed);
  const auto honest = Connect();
  const ModelShape shape{
      .layers = 1, .kv_heads = 1, .query_heads = 2, .key_dim = 8, .value_dim = 8};
  const auto session = honest->Open(shape, {});
  ASSERT_TRUE(session.ok()) << session.status();
  std::atomic<bool> stop{false};
  std::thread bystander([&] {
    const std::vector<uint16_t> rows(8, kernels::FloatToBf16(1.0F));
    for (uint64_t at = 0; !stop; ++at) {
      const auto held = honest->Append(*session, 0, at, 1, rows, rows);
      ASSERT_TRUE(held.ok()) << held.status();
      ASSERT_EQ(*held, at + 1);
    }
  });
  std::mt19937_64 random(seed);
  for (int round = 0; round < 60; ++round) {
    Hostile client(path());
    std::string frames;
    for (int i = 0; i < 20; ++i) {
      frames += MakeFrame(i % 2 == 0 ? Op::kHealth : Op::kAppend, static_cast<uint64_t>(i) + 2,
                          std::string(i, 'm'), std::string(random() % 3000, 'p'));
    }
    std::memcpy(client.request_bytes(), frames.data(), std::min<size_t>(frames.size(), kRingBytes));
    client.requests().written = std::min<uint64_t>(frames.size(), kRingBytes);
    client.Bell();
    const int kind = round % 3;  // bytes of frames; and counters a little; and counters wildly
    const auto end = Clock::now() + milliseconds(10);
    while (Clock::now() < end) {
      for (int i = 0; i < 200; ++i) {
        client.request_bytes()[random() % std::min<size_t>(frames.size(), kRingBytes)] ^=
            static_cast<uint8_t>(1U << (random() % 8));
        if (kind == 1) client.requests().written += random() % 64;
        if (kind == 1) client.answers().read += random() % 64;
        if (kind == 2) client.memory()[random() % 512] = static_cast<uint8_t>(random());
      }
      client.Bell();
    }
  }
  stop = true;
  bystander.join();
  ExpectOthersGone(*honest, std::chrono::seconds(5));
}

TEST_P(SharedMemoryTest, BytesBehindTheHelloEndTheConnection) {
  const auto honest = Connect();
  RawSocket socket = RawSocket::Connect("unix:" + path());
  proto::HelloRequest hello;
  hello.set_version_min(1);
  hello.set_version_max(1);
  hello.add_features(proto::kSharedMemory);
  ASSERT_TRUE(socket.Send(MakeFrame(Op::kHello, 1, hello.SerializeAsString()) +
                          MakeFrame(Op::kHealth, 2, "")));
  EXPECT_TRUE(socket.ReadFrame().has_value());
  EXPECT_TRUE(socket.Ended());
  ExpectOthersGone(*honest, std::chrono::seconds(5));
}

TEST_P(SharedMemoryTest, AReaderThatSleepsIsCutOffByTheFrameTimeout) {
  const auto honest = Connect();
  Hostile client(path());
  std::string frames;
  for (uint64_t id = 2; frames.size() < kRingBytes; ++id) frames += MakeFrame(Op::kStats, id, "");
  uint64_t written = 0;
  const auto give_up = Clock::now() + std::chrono::seconds(10);
  while (!client.socket().Ended(milliseconds(0)) && Clock::now() < give_up) {
    const uint64_t room = kRingBytes - (written - client.requests().read);
    for (uint64_t i = 0; i < room; ++i, ++written) {  // never reads an answer
      client.request_bytes()[written % kRingBytes] =
          static_cast<uint8_t>(frames[written % (frames.size() / 32 * 32)]);
    }
    client.requests().written = written;
    client.Bell();
  }
  ExpectOthersGone(*honest, std::chrono::seconds(5));
}

TEST_P(SharedMemoryTest, BoundsOfTheMemory) {
  options_.shared_memory_bytes_max = 2 * kMemoryBytes;
  Start();
  auto first = Connect();
  const auto second = Connect();
  const auto third = KvClient::Connect({.address = "shm:" + path()});
  EXPECT_EQ(third.status().code(), absl::StatusCode::kUnavailable) << third.status();
  EXPECT_THAT(std::string(third.status().message()), testing::HasSubstr("shared memory"));
  EXPECT_NE(Connect("unix:"), nullptr);
  first.reset();
  absl::Status again = absl::UnknownError("");
  for (int i = 0; i < 1000 && !again.ok(); ++i) {
    again = KvClient::Connect({.address = "shm:" + path()}).status();
    if (!again.ok()) std::this_thread::sleep_for(milliseconds(2));
  }
  EXPECT_TRUE(again.ok()) << again;

  options_.shared_memory_bytes_max = kMemoryBytes - 1;
  Start();
  EXPECT_EQ(KvClient::Connect({.address = "shm:" + path()}).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST_P(SharedMemoryTest, AKilledClientIsNoticedAtOnce) {
  const auto honest = Connect();
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    RawSocket socket = RawSocket::Connect("shm:" + path());
    const char good = socket.Greet() ? 'y' : 'n';
    if (write(ends[1], &good, 1) == 1) pause();
    _exit(0);
  }
  char good = 'n';
  EXPECT_EQ(read(ends[0], &good, 1), 1);
  EXPECT_EQ(good, 'y');
  EXPECT_EQ(Connections(*honest), 2U);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  ExpectOthersGone(*honest, milliseconds(500));
  close(ends[0]);
  close(ends[1]);
}

}  // namespace
}  // namespace kvseek::service
