#include "client/channel_driver.h"

#include <pthread.h>

#include <utility>

#include "transport/pause.h"

namespace kvseek::client {
namespace {

/// The channel's thread is back so long after the last Poll at the latest. Longer than what a
/// decoder does between two layers' questions, so that it finds the seat free.
constexpr std::chrono::microseconds kStandBack{200};
constexpr int kPausesBetween = 4;  ///< turns of a spinning thread, so that others get theirs
/// Of Poll at rings, for one at the socket and the timers: rings cost no system call.
constexpr unsigned kLooksBetween = 16;

}  // namespace

// ---- the seat

ChannelDriver::Seat::Seat(ChannelDriver& driver) : driver_(driver), lock_(driver.seat_) { Sit(); }

ChannelDriver::Seat::Seat(ChannelDriver& driver, int tries)
    : driver_(driver), lock_(driver.seat_, std::defer_lock) {
  if (driver_.sitting_.load(std::memory_order_relaxed) == std::this_thread::get_id()) return;
  for (int i = 0; i < tries && !driver_.asleep_.load(std::memory_order_relaxed); ++i) {
    if (lock_.try_lock()) {
      Sit();
      break;
    }
    transport::Pause();
  }
}

ChannelDriver::Seat::~Seat() {
  if (taken()) driver_.sitting_.store({}, std::memory_order_relaxed);
}

void ChannelDriver::Seat::Sit() {
  driver_.sitting_.store(std::this_thread::get_id(), std::memory_order_relaxed);
}

// ---- driving

ChannelDriver::ChannelDriver(std::chrono::microseconds spin)
    : spin_(spin), work_(boost::asio::make_work_guard(io_)) {}

void ChannelDriver::Begin() {
  thread_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "kvseek-client");
    Run();
  });
}

void ChannelDriver::End(std::function<void()> last) {
  boost::asio::post(io_, [this, last = std::move(last)] {
    last();
    work_.reset();
  });
  thread_.join();
}

void ChannelDriver::Run() {
  if (spin_.count() <= 0) {
    asleep_.store(true, std::memory_order_relaxed);
    const Seat seat(*this);
    io_.run();
    return;
  }
  while (!io_.stopped()) {
    LookForWork();
    const Seat seat(*this);
    asleep_.store(true, std::memory_order_relaxed);
    io_.run_one();
    asleep_.store(false, std::memory_order_relaxed);
  }
}

/// Does what there is to do, until there has been nothing for `spin_`, or leaves it to threads that
/// poll.
void ChannelDriver::LookForWork() {
  const transport::Lookout::Watch watch(lookout_);
  Clock::time_point last_work = Clock::now();
  while (!io_.stopped() && Clock::now() - last_work < spin_) {
    if (Clock::now() - polled_.load(std::memory_order_relaxed) < kStandBack) {
      std::this_thread::sleep_for(kStandBack);
      last_work = Clock::now();
    } else {
      const Seat seat(*this);
      if (lookout_.Look() || io_.poll() != 0) last_work = Clock::now();
    }
    for (int i = 0; i < kPausesBetween; ++i) transport::Pause();
  }
}

void ChannelDriver::Poll() {
  polled_.store(Clock::now(), std::memory_order_relaxed);
  const Seat seat(*this, 1);
  if (!seat.taken()) return;
  if (lookout_.Look()) return;
  if (lookout_.HasStreams() && ++looks_ < kLooksBetween) return;
  if (io_.poll_one() == 0) looks_ = 0;
}

}  // namespace kvseek::client
