// The write side of a connection: answers wait here in line and leave for the stream from where
// they are, without copying payloads.
//
//   lane    the thread that made an answer sends it itself, as long as nothing is before it: its
//           lines are in that core's cache, and no other thread has to wake up first
//   queue   what the stream did not take, and what came while something was being written: a
//           coroutine on the connection's strand writes it, several answers at a time
//
// Only one of both writes at a time, so a frame is never cut by another: what the lane has sent in
// part goes to the front of the queue, and the lane is closed until the queue is empty again.
#ifndef KVSEEK_SERVICE_ANSWER_WRITER_H_
#define KVSEEK_SERVICE_ANSWER_WRITER_H_

#include <array>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/system/error_code.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "proto/frame.h"
#include "service/request_handler.h"
#include "transport/stream.h"

namespace kvseek::service {

/// One answer on its way out.
struct AnswerFrame {
  std::string head;  ///< header, metadata, padding
  Payload payload;
  std::array<uint8_t, proto::kTrailerBytes> trailer{};
  size_t sent = 0;

  /// Without `checked` the trailer stays zero.
  static AnswerFrame Make(proto::Op op, uint64_t request_id, Response response, bool checked);
  static AnswerFrame MakeError(proto::Op op, uint64_t request_id, const absl::Status& status);
  /// Bytes left to be sent.
  size_t Left() const;
  /// Where they are. Valid while the frame is, and where it is.
  std::array<boost::asio::const_buffer, 3> Rest() const;
};

/// Send: any thread. All else: on the strand, which is the executor of `stream`.
class AnswerWriter {
 public:
  /// What a call of WriteNext has done.
  struct Written {
    boost::system::error_code error;  ///< the connection is of no more use
    size_t frames = 0;                ///< that have left
  };

  /// `stream` is open, and outlives the writer; nobody else writes to it or closes it.
  AnswerWriter(transport::Stream& stream, std::chrono::milliseconds frame_timeout);
  AnswerWriter(const AnswerWriter&) = delete;
  AnswerWriter& operator=(const AnswerWriter&) = delete;

  /// Sends at once what the stream takes, if nothing else is being written or waits; never blocks
  /// on the stream. True: the frame is done with, sent whole or dropped since the writer takes no
  /// more. False: the queue has it, or the rest of it; the caller lets the strand call Wake.
  bool Send(AnswerFrame frame) ABSL_LOCKS_EXCLUDED(mutex_);

  /// Queues a frame.
  void Push(AnswerFrame frame) ABSL_LOCKS_EXCLUDED(mutex_);
  /// Lets WriteNext look at the queue.
  void Wake() { wake_.cancel(); }
  /// Waits for frames in the queue and writes some. One call at a time.
  boost::asio::awaitable<Written> WriteNext() ABSL_LOCKS_EXCLUDED(mutex_);

  /// From now on Send drops its frames; those in the queue still leave.
  void TakeNoMore() ABSL_LOCKS_EXCLUDED(mutex_);
  /// Closes the stream, once no other thread is sending to it, and ends WriteNext.
  void Close() ABSL_LOCKS_EXCLUDED(mutex_);

  /// Nothing waits or is being written.
  bool Idle() const ABSL_LOCKS_EXCLUDED(mutex_);
  /// Of frames that wait or are being written.
  uint64_t queued_bytes() const ABSL_LOCKS_EXCLUDED(mutex_);
  /// The peer has not taken in time what WriteNext is writing.
  bool Overdue(std::chrono::steady_clock::time_point now) const { return now > deadline_; }

 private:
  /// Takes frames out of the queue into batch_; returns their bytes, 0: there are none.
  size_t TakeBatch() ABSL_LOCKS_EXCLUDED(mutex_);

  transport::Stream& stream_;
  const std::chrono::milliseconds frame_timeout_;
  boost::asio::steady_timer wake_;  ///< only ever wakes by cancel
  std::chrono::steady_clock::time_point deadline_ = std::chrono::steady_clock::time_point::max();
  std::vector<AnswerFrame> batch_;  ///< being written

  mutable std::mutex mutex_;
  std::deque<AnswerFrame> queue_ ABSL_GUARDED_BY(mutex_);
  uint64_t queued_bytes_ ABSL_GUARDED_BY(mutex_) = 0;  ///< of queue_ and batch_
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;       ///< batch_
  bool takes_no_more_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_ANSWER_WRITER_H_
