// Two rings of bytes in memory that a daemon shares with a client of its host, one each way, which
// carry what a socket would. docs/protocol.md, section 8, describes the memory byte by byte.
//
// A ring has one writer and one reader, in two processes that do not trust each other. Either side
// keeps its own position to itself; the counters in the memory tell the other one, and what the
// other one tells is believed only as far as it can be true: a counter that is ahead of or behind
// what it can be makes the ring corrupt for good. Bytes are copied out before anybody looks at
// them, so what has been checked cannot change any more.
//
// Who has nothing to do may sleep: it says so in the memory (AskForBell) and looks once more; the
// other side then has to wake it, which Publish and Free tell it. How, is the stream's business
// (transport/stream.h).
#ifndef KVSEEK_TRANSPORT_SHARED_RINGS_H_
#define KVSEEK_TRANSPORT_SHARED_RINGS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transport/sealed_memory.h"

namespace kvseek::transport {

/// Of one ring, in the shared memory: each on a line of its own, zero at first.
struct RingCounters {
  alignas(64) std::atomic<uint64_t> written;  ///< bytes, ever; by the writer
  alignas(64) std::atomic<uint64_t> read;     ///< bytes, ever; by the reader
  /// The side sleeps, and the other one sets it back and rings its bell.
  alignas(64) std::atomic<uint32_t> reader_sleeps;
  alignas(64) std::atomic<uint32_t> writer_sleeps;
};
static_assert(sizeof(RingCounters) == 256 && std::atomic<uint64_t>::is_always_lock_free);

/// The writing side of a ring. One thread at a time; Ready also beside it, while it waits.
class RingWriter {
 public:
  /// `bytes_max` is a power of two.
  RingWriter(RingCounters& counters, uint8_t* memory, size_t bytes_max)
      : counters_(counters), memory_(memory), bytes_max_(bytes_max) {}

  /// Copies as many bytes as there is room for, and returns their number. The reader does not see
  /// them yet.
  size_t Write(const void* from, size_t bytes);
  /// Lets the reader see all that has been written. True: it sleeps, and has to be woken.
  bool Publish();

  /// There is room for a quarter of the ring, or it is corrupt.
  bool Ready() const;
  /// From now on the reader rings when there may be that much room. To be followed by Ready.
  void AskForBell() { counters_.writer_sleeps.store(1, std::memory_order_seq_cst); }
  bool corrupt() const { return corrupt_; }

 private:
  RingCounters& counters_;
  uint8_t* const memory_;
  const size_t bytes_max_;
  std::atomic<uint64_t> written_{0};  ///< atomic for Ready's sake only
  uint64_t read_ = 0;                 ///< by the reader, as last seen
  bool corrupt_ = false;
};

/// The reading side. One thread at a time; Ready also beside it, while it waits.
class RingReader {
 public:
  RingReader(RingCounters& counters, const uint8_t* memory, size_t bytes_max)
      : counters_(counters), memory_(memory), bytes_max_(bytes_max) {}

  /// Copies as many bytes as are there, and returns their number.
  size_t Read(void* out, size_t bytes);
  /// Gives the room of what has been read back to the writer, if it is an eighth of the ring or if
  /// `all`. True: the writer sleeps, and has to be woken.
  bool Free(bool all);

  /// There is a byte, or the ring is corrupt.
  bool Ready() const {
    return counters_.written.load(std::memory_order_seq_cst) !=
           read_.load(std::memory_order_relaxed);
  }
  /// From now on the writer rings when there is something. To be followed by Ready.
  void AskForBell() { counters_.reader_sleeps.store(1, std::memory_order_seq_cst); }
  bool corrupt() const { return corrupt_; }

 private:
  RingCounters& counters_;
  const uint8_t* const memory_;
  const size_t bytes_max_;
  std::atomic<uint64_t> read_{0};  ///< atomic for Ready's sake only
  uint64_t freed_ = 0;             ///< of these, as the writer has been told
  uint64_t written_ = 0;           ///< by the writer, as last seen
  bool corrupt_ = false;
};

struct RingSizes {
  uint64_t request_bytes = 0;  ///< powers of two, from 4 KiB to 1 GiB
  uint64_t answer_bytes = 0;

  bool Sensible() const;
  /// Of the whole memory.
  uint64_t MemoryBytes() const;
};

/// One side's view of the memory. Unmapped with it.
class SharedRings {
 public:
  /// The daemon's: makes the memory, all pages of it, sealed against resizing.
  /// resource_exhausted: there is none.
  static absl::StatusOr<std::unique_ptr<SharedRings>> Create(const RingSizes& sizes);
  /// Hands the memory to the peer of a unix socket, with one byte. For the daemon's, once.
  absl::Status SendTo(int socket) { return memory_.SendTo(socket); }
  /// The client's: what SendTo has sent. Does not wait. unavailable, data_loss: not as agreed.
  static absl::StatusOr<std::unique_ptr<SharedRings>> ReceiveFrom(int socket,
                                                                  const RingSizes& sizes);
  SharedRings(const SharedRings&) = delete;
  SharedRings& operator=(const SharedRings&) = delete;

  RingReader& in() { return in_; }
  RingWriter& out() { return out_; }

 private:
  SharedRings(SealedMemory memory, const RingSizes& sizes, bool is_daemon);

  SealedMemory memory_;
  RingReader in_;
  RingWriter out_;
};

}  // namespace kvseek::transport

#endif  // KVSEEK_TRANSPORT_SHARED_RINGS_H_
