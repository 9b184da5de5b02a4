// Two streams that talk to each other: whatever they go through and however their threads sleep,
// all bytes arrive and the peer's end is noticed.
#include "transport/stream.h"

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <future>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "transport/stream_reader.h"

namespace kvseek::transport {
namespace {

namespace asio = boost::asio;
using std::chrono::microseconds;
using Clock = std::chrono::steady_clock;
template <typename T>
using Awaitable = asio::awaitable<T>;

uint8_t Content(uint64_t at) { return static_cast<uint8_t>(at * 31 + (at >> 8) * 7); }

/// One side with a thread of its own, which looks for `spin` before it sleeps.
class Side {
 public:
  Side(int descriptor, microseconds spin) : stream_(MakeSocket(descriptor)), spin_(spin) {}
  ~Side() {
    asio::post(io_, [this] {
      stream_.Close();
      work_.reset();
    });
    thread_.join();
  }

  void Share(std::unique_ptr<SharedRings> rings) {
    stream_.Share(std::move(rings), lookout_);
    asio::co_spawn(io_, stream_.HearBells(), asio::detached);
  }
  /// Runs `work`, and then the thread until the stream is closed.
  template <typename T>
  std::future<T> Start(Awaitable<T> work) {
    auto result = std::make_shared<std::promise<T>>();
    asio::co_spawn(io_, std::move(work), [result](const std::exception_ptr&, T value) {
      result->set_value(std::move(value));
    });
    return result->get_future();
  }
  void Run() {
    thread_ = std::thread([this] {
      if (spin_.count() == 0) {
        io_.run();
        return;
      }
      while (!io_.stopped()) {
        LookForWork();
        io_.run_one();
      }
    });
  }
  Stream& stream() { return stream_; }
  asio::io_context& io() { return io_; }

 private:
  void LookForWork() {
    const Lookout::Watch watch(lookout_);
    auto last = Clock::now();
    while (!io_.stopped() && Clock::now() - last < spin_) {
      if (lookout_.Look() || io_.poll() != 0) last = Clock::now();
    }
  }
  Stream::Socket MakeSocket(int descriptor) {
    return {io_, asio::generic::stream_protocol(AF_UNIX, 0), descriptor};
  }
  Lookout lookout_{/*resumes_here=*/true};
  asio::io_context io_;
  asio::executor_work_guard<asio::io_context::executor_type> work_{io_.get_executor()};
  Stream stream_;
  const microseconds spin_;
  std::thread thread_;
};

struct Setting {
  bool shared;
  int spin_us[2];
};

class StreamTest : public testing::TestWithParam<Setting> {
 protected:
  void SetUp() override {
    int ends[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    for (int i = 0; i < 2; ++i) {
      sides_[i] = std::make_unique<Side>(ends[i], microseconds(GetParam().spin_us[i]));
    }
    if (GetParam().shared) {
      const RingSizes sizes{.request_bytes = 4096, .answer_bytes = 4096};
      auto first = SharedRings::Create(sizes);
      ASSERT_TRUE(first.ok()) << first.status();
      ASSERT_TRUE((*first)->SendTo(ends[0]).ok());
      auto second = SharedRings::ReceiveFrom(ends[1], sizes);
      ASSERT_TRUE(second.ok()) << second.status();
      sides_[0]->Share(*std::move(first));
      sides_[1]->Share(*std::move(second));
    }
  }

  /// Sends `total` bytes in pieces of any size, with pauses now and then.
  static Awaitable<bool> SendAll(Side& side, uint64_t total, unsigned seed) {
    std::mt19937 random(seed);
    asio::steady_timer pause(side.io());
    std::vector<uint8_t> bytes;
    for (uint64_t done = 0; done < total; done += bytes.size()) {
      bytes.resize(
          std::min<uint64_t>(1 + random() % (random() % 8 == 0 ? 20000 : 200), total - done));
      for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = Content(done + i);
      const size_t cut = random() % bytes.size();
      std::vector<asio::const_buffer> parts;
      parts.emplace_back(bytes.data(), cut);
      parts.emplace_back(bytes.data() + cut, bytes.size() - cut);
      const Stream::ErrorCode error = co_await side.stream().Write(std::move(parts));
      if (error) co_return false;
      if (random() % 256 == 0) {
        pause.expires_after(microseconds(random() % 300));
        co_await pause.async_wait(kAsTuple);
      }
    }
    co_return true;
  }
  /// Reads until the end or `total` bytes; how many came as they should.
  static Awaitable<uint64_t> ReadAll(Side& side, uint64_t total, unsigned seed) {
    std::mt19937 random(seed);
    asio::steady_timer pause(side.io());
    StreamReader reader(side.stream());
    if (random() % 2 == 0) reader.ReadNothingAhead();
    std::vector<uint8_t> bytes;
    for (uint64_t done = 0; done < total; done += bytes.size()) {
      bytes.resize(
          std::min<uint64_t>(1 + random() % (random() % 8 == 0 ? 90000 : 100), total - done));
      if (random() % 4 == 0) {
        if (!co_await reader.Discard(bytes.size())) co_return done;
      } else {
        if (!co_await reader.ReadInto(bytes.data(), bytes.size())) co_return done;
        for (size_t i = 0; i < bytes.size(); ++i) {
          if (bytes[i] != Content(done + i)) co_return done + i;
        }
      }
      if (random() % 256 == 0) {
        pause.expires_after(microseconds(random() % 300));
        co_await pause.async_wait(kAsTuple);
      }
    }
    co_return total;
  }
  void Run() {
    for (const auto& side : sides_) side->Run();
  }

  std::unique_ptr<Side> sides_[2];
};

std::string NameOf(const testing::TestParamInfo<Setting>& at) {
  return std::string(at.param.shared ? "Shared" : "Unix") + std::to_string(at.param.spin_us[0]) +
         "And" + std::to_string(at.param.spin_us[1]);
}

INSTANTIATE_TEST_SUITE_P(Settings, StreamTest,
                         testing::Values(Setting{false, {0, 0}}, Setting{true, {0, 0}},
                                         Setting{true, {0, 20}}, Setting{true, {20, 0}},
                                         Setting{true, {20, 20}}, Setting{true, {500, 500}}),
                         NameOf);

TEST_P(StreamTest, AllBytesArriveBothWays) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE(seed);
  constexpr uint64_t kTotal = 6'000'000;
  std::vector<std::future<bool>> sent;
  std::vector<std::future<uint64_t>> read;
  for (unsigned i = 0; i < 2; ++i) {
    sent.push_back(sides_[i]->Start(SendAll(*sides_[i], kTotal, seed + i)));
    read.push_back(sides_[i]->Start(ReadAll(*sides_[i], kTotal, seed + 2 + i)));
  }
  Run();
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(read[i].wait_for(std::chrono::seconds(60)), std::future_status::ready)
        << "side " << i;
    EXPECT_EQ(read[i].get(), kTotal);
    ASSERT_EQ(sent[i].wait_for(std::chrono::seconds(60)), std::future_status::ready)
        << "side " << i;
    EXPECT_TRUE(sent[i].get());
  }
}

TEST_P(StreamTest, ThePeersEndWakesWhoeverWaits) {
  constexpr uint64_t kMany = 1 << 30;
  const auto before = Clock::now();
  auto sent = sides_[0]->Start(SendAll(*sides_[0], kMany, 1));
  auto read = sides_[0]->Start(ReadAll(*sides_[0], kMany, 1));
  auto last_words = sides_[1]->Start(SendAll(*sides_[1], 3000, 2));
  Run();
  EXPECT_TRUE(last_words.get());
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // both wait now
  EXPECT_EQ(read.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  EXPECT_EQ(sent.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  sides_[1].reset();
  EXPECT_LE(read.get(), 3000U);  // what had been sent has still been read
  EXPECT_FALSE(sent.get());
  EXPECT_LT(Clock::now() - before, std::chrono::seconds(2));
}

TEST_P(StreamTest, ShutdownReceiveEndsTheReaderOnly) {
  auto read = sides_[0]->Start(ReadAll(*sides_[0], 10, 1));
  Run();
  asio::post(sides_[0]->io(), [&] { sides_[0]->stream().ShutdownReceive(); });
  EXPECT_EQ(read.get(), 0U);
  auto sent = sides_[0]->Start(SendAll(*sides_[0], 100'000, 1));
  auto other = sides_[1]->Start(ReadAll(*sides_[1], 100'000, 2));
  EXPECT_TRUE(sent.get());
  EXPECT_EQ(other.get(), 100'000U);
}

}  // namespace
}  // namespace kvseek::transport
