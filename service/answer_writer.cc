#include "service/answer_writer.h"

#include <algorithm>
#include <boost/asio/error.hpp>
#include <utility>

#include "proto/status_code.h"

namespace kvseek::service {
namespace {

namespace asio = boost::asio;

constexpr size_t kBatchBytes = 64 << 10;  ///< answers that fit are sent together
constexpr size_t kBatchFrames = 16;

}  // namespace

// ---- frames

AnswerFrame AnswerFrame::Make(proto::Op op, uint64_t request_id, Response response, bool checked) {
  proto::FrameHeader header;
  header.op = op;
  header.flags = proto::kFlagResponse;
  if (response.error) header.flags |= proto::kFlagError;
  header.request_id = request_id;
  header.metadata_bytes = static_cast<uint32_t>(response.metadata.size());
  header.payload_bytes = static_cast<uint32_t>(response.payload.bytes);
  AnswerFrame frame;
  frame.head.reserve(proto::kHeaderBytes + response.metadata.size() + header.PaddingBytes());
  frame.head.resize(proto::kHeaderBytes);
  proto::EncodeHeader(header, reinterpret_cast<uint8_t*>(frame.head.data()));
  frame.head.append(response.metadata);
  frame.head.append(header.PaddingBytes(), '\0');
  frame.payload = std::move(response.payload);
  if (checked && frame.payload.bytes != 0) {
    frame.trailer = proto::MakeTrailer({frame.payload.data.get(), frame.payload.bytes});
  }
  return frame;
}

AnswerFrame AnswerFrame::MakeError(proto::Op op, uint64_t request_id, const absl::Status& status) {
  Response response;
  response.error = true;
  response.metadata = proto::ToError(status).SerializeAsString();
  return Make(op, request_id, std::move(response), true);
}

size_t AnswerFrame::Left() const {
  return head.size() + (payload.bytes == 0 ? 0 : payload.bytes + trailer.size()) - sent;
}

std::array<asio::const_buffer, 3> AnswerFrame::Rest() const {
  std::array<asio::const_buffer, 3> parts = {
      asio::const_buffer(head.data(), head.size()),
      asio::const_buffer(payload.data.get(), payload.bytes),
      asio::const_buffer(trailer.data(), payload.bytes == 0 ? 0 : trailer.size())};
  size_t skip = sent;
  for (asio::const_buffer& part : parts) {
    const size_t step = std::min(skip, part.size());
    part += step;
    skip -= step;
  }
  return parts;
}

// ---- any thread

AnswerWriter::AnswerWriter(transport::Stream& stream, std::chrono::milliseconds frame_timeout)
    : stream_(stream),
      frame_timeout_(frame_timeout),
      wake_(stream.executor(), asio::steady_timer::time_point::max()) {}

bool AnswerWriter::Send(AnswerFrame frame) {
  const std::lock_guard lock(mutex_);
  if (takes_no_more_) return true;
  if (!writing_ && queue_.empty()) {
    boost::system::error_code for_write_next;
    frame.sent += stream_.WriteSome(frame.Rest(), for_write_next);
    if (frame.Left() == 0) return true;
  }
  queued_bytes_ += frame.Left();
  queue_.push_back(std::move(frame));
  return false;
}

// ---- the strand

void AnswerWriter::Push(AnswerFrame frame) {
  {
    const std::lock_guard lock(mutex_);
    queued_bytes_ += frame.Left();
    queue_.push_back(std::move(frame));
  }
  Wake();
}

size_t AnswerWriter::TakeBatch() {
  const std::lock_guard lock(mutex_);
  size_t bytes = 0;
  while (!queue_.empty() && batch_.size() < kBatchFrames) {
    const size_t next = queue_.front().Left();
    if (!batch_.empty() && bytes + next > kBatchBytes) break;
    bytes += next;
    batch_.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  writing_ = !batch_.empty();
  return bytes;
}

asio::awaitable<AnswerWriter::Written> AnswerWriter::WriteNext() {
  size_t bytes = TakeBatch();
  while (bytes == 0) {
    if (!stream_.is_open()) co_return Written{asio::error::operation_aborted};
    co_await wake_.async_wait(transport::kAsTuple);
    bytes = TakeBatch();
  }
  std::vector<asio::const_buffer> buffers;
  buffers.reserve(batch_.size() * 3);
  for (const AnswerFrame& frame : batch_) {
    for (const asio::const_buffer& part : frame.Rest()) {
      if (part.size() != 0) buffers.push_back(part);
    }
  }
  deadline_ = std::chrono::steady_clock::now() + frame_timeout_;
  const boost::system::error_code error = co_await stream_.Write(std::move(buffers));
  deadline_ = std::chrono::steady_clock::time_point::max();
  const Written written{error, batch_.size()};
  batch_.clear();
  const std::lock_guard lock(mutex_);
  queued_bytes_ -= bytes;
  writing_ = false;
  co_return written;
}

void AnswerWriter::TakeNoMore() {
  const std::lock_guard lock(mutex_);
  takes_no_more_ = true;
}

void AnswerWriter::Close() {
  {
    // Under the lock: the system gives a closed descriptor's number to the next connection.
    const std::lock_guard lock(mutex_);
    takes_no_more_ = true;
    stream_.Close();
  }
  Wake();
}

bool AnswerWriter::Idle() const {
  const std::lock_guard lock(mutex_);
  return queue_.empty() && !writing_;
}

uint64_t AnswerWriter::queued_bytes() const {
  const std::lock_guard lock(mutex_);
  return queued_bytes_;
}

}  // namespace kvseek::service
