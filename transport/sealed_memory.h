// Memory that a daemon shares with a client of its host: a memfd of which all pages are there and
// which nobody can resize any more, handed over beside a byte of a unix socket.
//
// Both sides can write anywhere in it at any time. So whoever reads copies first and checks the
// copy, and believes what the other side wrote only as far as it can be true.
#ifndef KVSEEK_TRANSPORT_SEALED_MEMORY_H_
#define KVSEEK_TRANSPORT_SEALED_MEMORY_H_

#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvseek::transport {

/// One side's mapping. Unmapped with it.
class SealedMemory {
 public:
  /// The daemon's: makes the memory, zeroed. resource_exhausted: there is none.
  static absl::StatusOr<SealedMemory> Create(const char* name, uint64_t bytes);
  /// Hands the memory to the peer of a unix socket, with one byte. For the daemon's, once.
  absl::Status SendTo(int socket);
  /// The client's: what SendTo has sent. Does not wait. unavailable: the peer is gone or nothing is
  /// there; data_loss: not as agreed.
  static absl::StatusOr<SealedMemory> ReceiveFrom(int socket, uint64_t bytes);

  SealedMemory(SealedMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)),
        descriptor_(std::exchange(other.descriptor_, -1)) {}
  SealedMemory& operator=(SealedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  SealedMemory(const SealedMemory&) = delete;
  SealedMemory& operator=(const SealedMemory&) = delete;
  ~SealedMemory();

  /// At a page boundary.
  uint8_t* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  SealedMemory(uint8_t* data, uint64_t bytes, int descriptor)
      : data_(data), bytes_(bytes), descriptor_(descriptor) {}

  uint8_t* data_;
  uint64_t bytes_;
  int descriptor_;  ///< -1: given away, or the client's
};

}  // namespace kvseek::transport

#endif  // KVSEEK_TRANSPORT_SEALED_MEMORY_H_
