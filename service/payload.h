// Memory for payloads of requests and answers.
//
// A prefill is a stream of payloads of some megabytes. Memory of that size would come from the
// system with each and go back after it, and be cleared page by page in between, on the one thread
// that reads the socket. So the process keeps some of what has been freed, in sizes of powers of
// two; the last freed is used first, since it is most likely to be in a cache.
#ifndef KVSEEK_SERVICE_PAYLOAD_H_
#define KVSEEK_SERVICE_PAYLOAD_H_

#include <cstddef>
#include <cstdint>
#include <memory>

namespace kvseek::service {

/// Payloads from kKeptLeast to kKeptMost bytes are kept, together kSparePayloads bytes; smaller
/// ones are malloc's own business.
inline constexpr size_t kKeptLeast = size_t{64} << 10;
inline constexpr size_t kKeptMost = size_t{32} << 20;
inline constexpr size_t kSparePayloads = size_t{128} << 20;

/// Gives an array back to where it came from. Thread-safe.
struct PayloadFree {
  size_t bytes = 0;
  void operator()(uint8_t* data) const noexcept;
};

/// An owned, 64-byte aligned payload.
struct Payload {
  std::unique_ptr<uint8_t[], PayloadFree> data;
  size_t bytes = 0;
};

/// Uninitialised. Throws std::bad_alloc. Thread-safe.
Payload MakePayload(size_t bytes);

/// Of what is kept for the next payloads. Thread-safe.
size_t SparePayloadBytes();

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_PAYLOAD_H_
