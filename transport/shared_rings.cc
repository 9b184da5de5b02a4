#include "transport/shared_rings.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

namespace kvseek::transport {
namespace {

constexpr uint64_t kRingBytesMin = uint64_t{4} << 10;
constexpr uint64_t kRingBytesMax = uint64_t{1} << 30;
constexpr uint64_t kCountersBytes = 4096;  ///< a page: requests' at 0, answers' behind them
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

absl::Status Failed(absl::string_view what) {
  return absl::ResourceExhaustedError(
      absl::StrCat("shared memory: ", what, ": ", std::strerror(errno)));
}

uint8_t* Map(int descriptor, uint64_t bytes) {
  void* const memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<uint8_t*>(memory);
}

/// A message of one byte with room for one descriptor beside it.
struct DescriptorMessage {
  DescriptorMessage() {
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
  }
  DescriptorMessage(const DescriptorMessage&) = delete;
  DescriptorMessage& operator=(const DescriptorMessage&) = delete;

  char byte = 0;
  iovec part{.iov_base = &byte, .iov_len = 1};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
};

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

SharedRings::SharedRings(uint8_t* memory, const RingSizes& sizes, int descriptor, bool is_daemon)
    : memory_(memory),
      bytes_(sizes.MemoryBytes()),
      descriptor_(descriptor),
      in_(reinterpret_cast<RingCounters*>(memory)[is_daemon ? 0 : 1],
          memory + kCountersBytes + (is_daemon ? 0 : sizes.request_bytes),
          is_daemon ? sizes.request_bytes : sizes.answer_bytes),
      out_(reinterpret_cast<RingCounters*>(memory)[is_daemon ? 1 : 0],
           memory + kCountersBytes + (is_daemon ? sizes.request_bytes : 0),
           is_daemon ? sizes.answer_bytes : sizes.request_bytes) {}

SharedRings::~SharedRings() {
  munmap(memory_, bytes_);
  if (descriptor_ >= 0) close(descriptor_);
}

absl::StatusOr<std::unique_ptr<SharedRings>> SharedRings::Create(const RingSizes& sizes) {
  assert(sizes.Sensible());
  const int descriptor = memfd_create("kvseek-rings", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (descriptor < 0) return Failed("memfd_create");
  absl::Cleanup closing = [descriptor] { close(descriptor); };
  // All pages now: one that is missing later would be a SIGBUS in the middle of a copy.
  if (fallocate(descriptor, 0, 0, static_cast<off_t>(sizes.MemoryBytes())) != 0) {
    return Failed("fallocate");
  }
  if (fcntl(descriptor, F_ADD_SEALS, kSeals) != 0) return Failed("sealing");
  uint8_t* const memory = Map(descriptor, sizes.MemoryBytes());
  if (memory == nullptr) return Failed("mmap");
  std::move(closing).Cancel();
  return std::unique_ptr<SharedRings>(new SharedRings(memory, sizes, descriptor, true));
}

absl::Status SharedRings::SendTo(int socket) {
  assert(descriptor_ >= 0);
  DescriptorMessage carrier;
  cmsghdr* const header = CMSG_FIRSTHDR(&carrier.message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &descriptor_, sizeof(int));
  if (sendmsg(socket, &carrier.message, MSG_NOSIGNAL | MSG_DONTWAIT) != 1) {
    return absl::UnavailableError(absl::StrCat("shared memory: ", std::strerror(errno)));
  }
  close(std::exchange(descriptor_, -1));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<SharedRings>> SharedRings::ReceiveFrom(int socket,
                                                                      const RingSizes& sizes) {
  DescriptorMessage carrier;
  const ssize_t got = recvmsg(socket, &carrier.message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got <= 0) return absl::UnavailableError("the daemon closed the connection at hello");
  const cmsghdr* const header = CMSG_FIRSTHDR(&carrier.message);
  if (header == nullptr || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS ||
      header->cmsg_len != CMSG_LEN(sizeof(int))) {
    return absl::DataLossError("shared memory: no descriptor came");
  }
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(header), sizeof(int));
  const absl::Cleanup closing = [descriptor] { close(descriptor); };
  struct stat info {};
  if (!sizes.Sensible() || fstat(descriptor, &info) != 0 ||
      static_cast<uint64_t>(info.st_size) != sizes.MemoryBytes() ||
      (fcntl(descriptor, F_GET_SEALS) & F_SEAL_SHRINK) == 0) {
    return absl::DataLossError("shared memory: not of the size agreed on, or not sealed");
  }
  uint8_t* const memory = Map(descriptor, sizes.MemoryBytes());
  if (memory == nullptr) return Failed("mmap");
  return std::unique_ptr<SharedRings>(new SharedRings(memory, sizes, -1, false));
}

}  // namespace kvseek::transport
