// Who drives a channel: a thread of its own, or callers that have nothing better to do.
//
// One thread at a time is in the seat, runs the io_context and touches what belongs to the channel.
// While there are callers that poll, a thread of its own that spins stands back.
#ifndef KVSEEK_CLIENT_CHANNEL_DRIVER_H_
#define KVSEEK_CLIENT_CHANNEL_DRIVER_H_

#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <chrono>
#include <functional>
#include <mutex>
#include <thread>

#include "transport/lookout.h"

namespace kvseek::client {

/// Drive and Poll: any thread.
class ChannelDriver {
 public:
  using Clock = std::chrono::steady_clock;

  /// `spin` as in ClientOptions.
  explicit ChannelDriver(std::chrono::microseconds spin);
  ChannelDriver(const ChannelDriver&) = delete;
  ChannelDriver& operator=(const ChannelDriver&) = delete;

  /// Starts the thread; all that the io_context's work needs is there.
  void Begin();
  /// Calls `last` in the seat, does what is left to do, and ends the thread.
  void End(std::function<void()> last);

  /// Calls `work` in the seat: here, if it is free soon, else later. Not here from a callback.
  template <typename Work>
  void Drive(Work work) {
    const Seat seat(*this, kSeatTries);
    if (seat.taken()) {
      work();
    } else {
      boost::asio::post(io_, std::move(work));
    }
  }
  /// Looks once for work, and does some; nothing, if another thread is in the seat.
  void Poll();

  boost::asio::io_context& io() { return io_; }
  transport::Lookout& lookout() { return lookout_; }

 private:
  /// The right to drive. Nobody gets it while the channel's thread sleeps in the kernel, which does
  /// it in its seat.
  class Seat {
   public:
    /// Waits for it.
    explicit Seat(ChannelDriver& driver);
    /// Tries so many times. Not taken by a thread that is in it already: a callback's.
    Seat(ChannelDriver& driver, int tries);
    ~Seat();
    Seat(const Seat&) = delete;
    Seat& operator=(const Seat&) = delete;
    bool taken() const { return lock_.owns_lock(); }

   private:
    void Sit();
    ChannelDriver& driver_;
    std::unique_lock<std::mutex> lock_;
  };

  static constexpr int kSeatTries = 64;  ///< some us

  void Run();
  void LookForWork();

  const std::chrono::microseconds spin_;
  std::mutex seat_;
  std::atomic<std::thread::id> sitting_{};  ///< who is in the seat
  std::atomic<bool> asleep_{false};         ///< the channel's thread, in the seat
  std::atomic<Clock::time_point> polled_{Clock::time_point()};
  unsigned looks_ = 0;  ///< of Poll since it last looked at the socket; in the seat

  transport::Lookout lookout_{/*resumes_here=*/true};
  /// One thread at a time: what a handler posts is in the common queue when its turn ends.
  boost::asio::io_context io_{1};
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_;
  std::thread thread_;
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_CHANNEL_DRIVER_H_
