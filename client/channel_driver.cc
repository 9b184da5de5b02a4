#include "client/channel_driver.h"

#include <pthread.h>

#include <utility>

namespace kvseek::client {
namespace {

/// The channel's thread is back so long after the last Poll at the latest. Longer than what a
/// decoder does between two layers' questions, so that it finds the seat free.
constexpr std::chrono::microseconds kStandBack{200};
constexpr int kPausesBetween = 4;  ///< turns of a spinning thread, so that others get theirs
/// Of Poll at rings, for one at the socket and the timers: rings cost no system call.
constexpr unsigned kLooksBetween = 16;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

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
    Pause();
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

/// io_.run(), which after any work looks for more for a while before it sleeps, and leaves that to
/// threads that poll.
void ChannelDriver::Run() {
  if (spin_.count() <= 0) {
    asleep_.store(true, std::memory_order_relaxed);
    const Seat seat(*this);
    io_.run();
    return;
  }
  lookout_.Begin();
  Clock::time_point last_work = Clock::now();
  while (!io_.stopped()) {
    if (Clock::now() - polled_.load(std::memory_order_relaxed) < kStandBack) {
      std::this_thread::sleep_for(kStandBack);
      last_work = Clock::now();
    } else if (RunTurn(Clock::now() - last_work < spin_)) {
      last_work = Clock::now();
    }
    for (int i = 0; i < kPausesBetween; ++i) Pause();
  }
  lookout_.End();
}

/// Whether there was anything to do. Sleeps until there is, unless told to look only.
bool ChannelDriver::RunTurn(bool look_only) {
  const Seat seat(*this);
  if (lookout_.Look() || io_.poll() != 0) return true;
  if (look_only) return false;
  asleep_.store(true, std::memory_order_relaxed);
  lookout_.End();
  io_.run_one();
  lookout_.Begin();
  asleep_.store(false, std::memory_order_relaxed);
  return true;
}

void ChannelDriver::Poll() {
  polled_.store(Clock::now(), std::memory_order_relaxed);
  const Seat seat(*this, 1);
  if (!seat.taken()) return;
  if (lookout_.HasStreams() && !lookout_.Look() && ++looks_ % kLooksBetween != 0) return;
  io_.poll_one();
}

}  // namespace kvseek::client
