// Rings: bytes arrive as they were, whoever sleeps is woken, and a peer that lies is found out.
#include "transport/shared_rings.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/transport/receive_descriptor.h"

namespace kvseek::transport {
namespace {

constexpr size_t kBytes = 4096;

uint8_t Content(uint64_t at) { return static_cast<uint8_t>(at * 31 + (at >> 8) * 7); }

/// A ring in this process's memory: both sides at the same addresses, for ThreadSanitizer's sake.
struct LocalRing {
  std::unique_ptr<RingCounters> counters = std::make_unique<RingCounters>();
  std::vector<uint8_t> memory = std::vector<uint8_t>(kBytes);
  RingWriter writer{*counters, memory.data(), kBytes};
  RingReader reader{*counters, memory.data(), kBytes};
};

TEST(RingTest, BytesComeAsTheyWereWritten) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  LocalRing ring;
  uint64_t written = 0;
  uint64_t read = 0;
  std::array<uint8_t, 2 * kBytes> bytes{};
  for (int round = 0; round < 20'000; ++round) {
    const size_t size = random() % (round % 10 == 0 ? bytes.size() : 100);
    if (random() % 2 == 0) {
      for (size_t i = 0; i < size; ++i) bytes[i] = Content(written + i);
      const size_t took = ring.writer.Write(bytes.data(), size);
      EXPECT_LE(written + took - read, kBytes);
      EXPECT_LE(took, size);
      written += took;
      EXPECT_FALSE(ring.writer.Publish());  // nobody has asked for a bell
    } else {
      const size_t got = ring.reader.Read(bytes.data(), size);
      EXPECT_EQ(got, std::min<uint64_t>(size, written - read));
      for (size_t i = 0; i < got; ++i) ASSERT_EQ(bytes[i], Content(read + i));
      read += got;
      EXPECT_FALSE(ring.reader.Free(random() % 2 == 0));
    }
    EXPECT_EQ(ring.reader.Ready(), written != read);
  }
  EXPECT_GT(read, 10 * kBytes);
}

TEST(RingTest, NothingIsSeenBeforeItIsPublished) {
  LocalRing ring;
  EXPECT_EQ(ring.writer.Write("abc", 3), 3U);
  EXPECT_FALSE(ring.reader.Ready());
  char byte = 0;
  EXPECT_EQ(ring.reader.Read(&byte, 1), 0U);
  ring.writer.Publish();
  EXPECT_TRUE(ring.reader.Ready());
  EXPECT_EQ(ring.reader.Read(&byte, 1), 1U);
  EXPECT_EQ(byte, 'a');
}

TEST(RingTest, ABellIsRungOnceForWhoAskedForIt) {
  LocalRing ring;
  ring.reader.AskForBell();
  ring.writer.Write("a", 1);
  EXPECT_TRUE(ring.writer.Publish());
  ring.writer.Write("b", 1);
  EXPECT_FALSE(ring.writer.Publish());

  const std::vector<uint8_t> many(kBytes);
  EXPECT_EQ(ring.writer.Write(many.data(), kBytes), kBytes - 2);
  ring.writer.Publish();
  EXPECT_FALSE(ring.writer.Ready());
  ring.writer.AskForBell();
  std::vector<uint8_t> out(kBytes);
  EXPECT_EQ(ring.reader.Read(out.data(), kBytes / 4 - 1), kBytes / 4 - 1);
  EXPECT_FALSE(ring.reader.Free(true));  // less room than the writer waits for
  EXPECT_FALSE(ring.writer.Ready());
  EXPECT_EQ(ring.reader.Read(out.data(), 1), 1U);
  EXPECT_TRUE(ring.reader.Free(true));
  EXPECT_TRUE(ring.writer.Ready());
  EXPECT_EQ(ring.reader.Read(out.data(), 1), 1U);
  EXPECT_FALSE(ring.reader.Free(true));
}

TEST(RingTest, CountersThatCannotBeAreFoundOut) {
  const auto reader_finds = [](uint64_t read, uint64_t claimed) {
    LocalRing ring;
    std::vector<uint8_t> bytes(kBytes);
    ring.writer.Write(bytes.data(), read);
    ring.writer.Publish();
    EXPECT_EQ(ring.reader.Read(bytes.data(), read), read);
    ring.counters->written = claimed;
    EXPECT_TRUE(ring.reader.Ready() || claimed == read);
    const size_t got = ring.reader.Read(bytes.data(), kBytes);
    const bool corrupt = ring.reader.corrupt();
    EXPECT_TRUE(got == 0 || !corrupt);
    ring.counters->written = read + 1;  // it does not get better again
    EXPECT_TRUE(!corrupt || ring.reader.Read(bytes.data(), 1) == 0);
    return corrupt;
  };
  EXPECT_FALSE(reader_finds(100, 100));
  EXPECT_FALSE(reader_finds(100, 100 + kBytes));
  EXPECT_TRUE(reader_finds(100, 101 + kBytes));
  EXPECT_TRUE(reader_finds(100, 99));
  EXPECT_TRUE(reader_finds(100, 0));
  EXPECT_TRUE(reader_finds(100, ~uint64_t{0}));

  const auto writer_finds = [](uint64_t written, uint64_t claimed) {
    LocalRing ring;
    const std::vector<uint8_t> bytes(kBytes);
    ring.writer.Write(bytes.data(), written);
    ring.counters->read = claimed;
    ring.writer.Write(bytes.data(), kBytes);
    return ring.writer.corrupt();
  };
  EXPECT_FALSE(writer_finds(100, 0));
  EXPECT_FALSE(writer_finds(100, 100));
  EXPECT_TRUE(writer_finds(100, 101));
  EXPECT_TRUE(writer_finds(100, ~uint64_t{0}));
}

/// A bell that can be waited for.
class Bell {
 public:
  void Ring() {
    const std::lock_guard lock(mutex_);
    rung_ = true;
    changed_.notify_one();
  }
  bool Await() {
    std::unique_lock lock(mutex_);
    const bool heard = changed_.wait_for(lock, std::chrono::seconds(20), [this] { return rung_; });
    rung_ = false;
    return heard;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool rung_ = false;
};

/// The other one may do anything between any two steps.
void Dawdle(std::mt19937& random) {
  const unsigned choice = random() % 64;
  if (choice == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 100));
  if (choice < 8) std::this_thread::yield();
}

TEST(RingTest, WhoeverSleepsIsWoken) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE(seed);
  constexpr uint64_t kTotal = 20'000'000;
  LocalRing ring;
  Bell reader_bell;
  Bell writer_bell;
  std::thread writing([&] {
    std::mt19937 random(seed);
    std::array<uint8_t, kBytes> bytes{};
    for (uint64_t done = 0; done < kTotal;) {
      const size_t size = std::min<uint64_t>(1 + random() % kBytes, kTotal - done);
      for (size_t i = 0; i < size; ++i) bytes[i] = Content(done + i);
      for (size_t sent = 0; sent < size;) {
        const size_t step = ring.writer.Write(bytes.data() + sent, size - sent);
        Dawdle(random);
        if (step != 0 && ring.writer.Publish()) reader_bell.Ring();
        sent += step;
        if (step != 0) continue;
        ring.writer.AskForBell();
        Dawdle(random);
        while (!ring.writer.Ready()) {
          ASSERT_TRUE(writer_bell.Await()) << "a wake-up of the writer was lost";
          ring.writer.AskForBell();
        }
      }
      done += size;
    }
  });
  std::mt19937 random(seed + 1);
  std::array<uint8_t, kBytes> bytes{};
  uint64_t done = 0;
  while (done < kTotal) {
    const size_t got = ring.reader.Read(bytes.data(), 1 + random() % kBytes);
    size_t same = 0;
    while (same < got && bytes[same] == Content(done + same)) ++same;
    ASSERT_EQ(same, got);
    done += got;
    Dawdle(random);
    if (ring.reader.Free(/*all=*/got == 0)) writer_bell.Ring();
    if (got != 0) continue;
    ring.reader.AskForBell();
    Dawdle(random);
    if (done < kTotal && !ring.reader.Ready()) {
      ASSERT_TRUE(reader_bell.Await()) << "a wake-up of the reader was lost";
    }
  }
  writing.join();
}

class SharedRingsTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends_.data()), 0);
    auto made = SharedRings::Create(kSizes);
    ASSERT_TRUE(made.ok()) << made.status();
    daemon_ = *std::move(made);
  }
  void TearDown() override {
    for (const int end : ends_) close(end);
  }

  static constexpr RingSizes kSizes{.request_bytes = 4096, .answer_bytes = 8192};
  std::array<int, 2> ends_{};
  std::unique_ptr<SharedRings> daemon_;
};

TEST_F(SharedRingsTest, BothSidesSeeTheSameMemory) {
  ASSERT_TRUE(daemon_->SendTo(ends_[0]).ok());
  auto client = SharedRings::ReceiveFrom(ends_[1], kSizes);
  ASSERT_TRUE(client.ok()) << client.status();
  std::vector<uint8_t> bytes(9000, 1);
  EXPECT_EQ((*client)->out().Write(bytes.data(), bytes.size()), kSizes.request_bytes);
  (*client)->out().Publish();
  std::fill(bytes.begin(), bytes.end(), uint8_t{2});
  EXPECT_EQ(daemon_->out().Write(bytes.data(), bytes.size()), kSizes.answer_bytes);
  daemon_->out().Publish();
  EXPECT_EQ(daemon_->in().Read(bytes.data(), bytes.size()), kSizes.request_bytes);
  EXPECT_EQ(bytes, [] {
    std::vector<uint8_t> expected(9000, 2);
    std::fill(expected.begin(), expected.begin() + 4096, uint8_t{1});
    return expected;
  }());
  EXPECT_EQ((*client)->in().Read(bytes.data(), bytes.size()), kSizes.answer_bytes);
  EXPECT_EQ(bytes[0], 2);
}

TEST_F(SharedRingsTest, WhatDoesNotComeAsAgreedIsRefused) {
  EXPECT_EQ(SharedRings::ReceiveFrom(ends_[1], kSizes).status().code(),
            absl::StatusCode::kUnavailable);  // nothing is there
  ASSERT_EQ(write(ends_[0], "x", 1), 1);
  EXPECT_EQ(SharedRings::ReceiveFrom(ends_[1], kSizes).status().code(),
            absl::StatusCode::kDataLoss);  // no descriptor
  for (const RingSizes& others :
       {RingSizes{.request_bytes = 8192, .answer_bytes = 8192}, RingSizes{},
        RingSizes{.request_bytes = 8192, .answer_bytes = 4095},
        RingSizes{.request_bytes = ~uint64_t{0}, .answer_bytes = 1}}) {
    auto made = SharedRings::Create(kSizes);
    ASSERT_TRUE(made.ok());
    ASSERT_TRUE((*made)->SendTo(ends_[0]).ok());
    EXPECT_EQ(SharedRings::ReceiveFrom(ends_[1], others).status().code(),
              absl::StatusCode::kDataLoss);
  }
  close(ends_[0]);
  EXPECT_EQ(SharedRings::ReceiveFrom(ends_[1], kSizes).status().code(),
            absl::StatusCode::kUnavailable);
  ends_[0] = -1;
}

TEST_F(SharedRingsTest, NobodyCanTakePagesAway) {
  ASSERT_TRUE(daemon_->SendTo(ends_[0]).ok());
  const int descriptor = ReceiveDescriptor(ends_[1]);
  ASSERT_GE(descriptor, 0);
  EXPECT_NE(ftruncate(descriptor, 0), 0);
  EXPECT_NE(ftruncate(descriptor, 1 << 20), 0);
  EXPECT_NE(fcntl(descriptor, F_ADD_SEALS, F_SEAL_WRITE), 0);
  close(descriptor);
}

}  // namespace
}  // namespace kvseek::transport
