#include "transport/shared_rings.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstring>
#include <utility>

namespace kvseek::transport {
namespace {

constexpr uint64_t kRingBytesMin = uint64_t{4} << 10;
constexpr uint64_t kRingBytesMax = uint64_t{1} << 30;
constexpr uint64_t kCountersBytes = 4096;  ///< a page: requests' at 0, answers' behind them

bool InRange(uint64_t bytes) {
  return std::has_single_bit(bytes) && bytes >= kRingBytesMin && bytes <= kRingBytesMax;
}

}  // namespace

// ---- one ring

size_t RingWriter::Write(const void* from, size_t bytes) {
  const uint64_t written = written_.load(std::memory_order_relaxed);
  if (bytes_max_ - (written - read_) < bytes) {
    const uint64_t read = counters_.read.load(std::memory_order_acquire);
    if (corrupt_ || read - read_ > written - read_) {  // not from there to here
      corrupt_ = true;
      return 0;
    }
    read_ = read;
  }
  bytes = std::min<uint64_t>(bytes, bytes_max_ - (written - read_));
  if (bytes == 0) return 0;
  const size_t at = written & (bytes_max_ - 1);
  const size_t to_end = std::min(bytes, bytes_max_ - at);
  std::memcpy(memory_ + at, from, to_end);
  std::memcpy(memory_, static_cast<const uint8_t*>(from) + to_end, bytes - to_end);
  written_.store(written + bytes, std::memory_order_relaxed);
  return bytes;
}

bool RingWriter::Publish() {
  // In one order with the reader's AskForBell and Ready: one of both sees the other.
  counters_.written.store(written_.load(std::memory_order_relaxed), std::memory_order_seq_cst);
  return counters_.reader_sleeps.load(std::memory_order_seq_cst) != 0 &&
         counters_.reader_sleeps.exchange(0, std::memory_order_seq_cst) != 0;
}

bool RingWriter::Ready() const {
  const uint64_t used =
      written_.load(std::memory_order_relaxed) - counters_.read.load(std::memory_order_seq_cst);
  return used > bytes_max_ || bytes_max_ - used >= bytes_max_ / 4;
}

size_t RingReader::Read(void* out, size_t bytes) {
  const uint64_t read = read_.load(std::memory_order_relaxed);
  if (written_ - read < bytes) {
    const uint64_t written = counters_.written.load(std::memory_order_acquire);
    if (corrupt_ || written - written_ > read + bytes_max_ - written_) {  // not from there to full
      corrupt_ = true;
      return 0;
    }
    written_ = written;
  }
  bytes = std::min<uint64_t>(bytes, written_ - read);
  if (bytes == 0) return 0;
  const size_t at = read & (bytes_max_ - 1);
  const size_t to_end = std::min(bytes, bytes_max_ - at);
  std::memcpy(out, memory_ + at, to_end);
  std::memcpy(static_cast<uint8_t*>(out) + to_end, memory_, bytes - to_end);
  read_.store(read + bytes, std::memory_order_relaxed);
  return bytes;
}

bool RingReader::Free(bool all) {
  const uint64_t read = read_.load(std::memory_order_relaxed);
  if (read == freed_ || (!all && read - freed_ < bytes_max_ / 8)) return false;
  freed_ = read;
  counters_.read.store(freed_, std::memory_order_seq_cst);
  if (counters_.writer_sleeps.load(std::memory_order_seq_cst) == 0) return false;
  // It would find less room than it waits for, and sleep again.
  const uint64_t used = counters_.written.load(std::memory_order_seq_cst) - freed_;
  if (used <= bytes_max_ && bytes_max_ - used < bytes_max_ / 4) return false;
  return counters_.writer_sleeps.exchange(0, std::memory_order_seq_cst) != 0;
}

// ---- the memory

bool RingSizes::Sensible() const { return InRange(request_bytes) && InRange(answer_bytes); }

uint64_t RingSizes::MemoryBytes() const { return kCountersBytes + request_bytes + answer_bytes; }

SharedRings::SharedRings(SealedMemory memory, const RingSizes& sizes, bool is_daemon)
    : memory_(std::move(memory)),
      in_(reinterpret_cast<RingCounters*>(memory_.data())[is_daemon ? 0 : 1],
          memory_.data() + kCountersBytes + (is_daemon ? 0 : sizes.request_bytes),
          is_daemon ? sizes.request_bytes : sizes.answer_bytes),
      out_(reinterpret_cast<RingCounters*>(memory_.data())[is_daemon ? 1 : 0],
           memory_.data() + kCountersBytes + (is_daemon ? sizes.request_bytes : 0),
           is_daemon ? sizes.answer_bytes : sizes.request_bytes) {}

absl::StatusOr<std::unique_ptr<SharedRings>> SharedRings::Create(const RingSizes& sizes) {
  assert(sizes.Sensible());
  auto memory = SealedMemory::Create("kvseek-rings", sizes.MemoryBytes());
  if (!memory.ok()) return memory.status();
  return std::unique_ptr<SharedRings>(new SharedRings(*std::move(memory), sizes, true));
}

absl::StatusOr<std::unique_ptr<SharedRings>> SharedRings::ReceiveFrom(int socket,
                                                                      const RingSizes& sizes) {
  auto memory = SealedMemory::ReceiveFrom(socket, sizes.Sensible() ? sizes.MemoryBytes() : 0);
  if (!memory.ok()) return memory.status();
  return std::unique_ptr<SharedRings>(new SharedRings(*std::move(memory), sizes, false));
}

}  // namespace kvseek::transport
