// The frame: how messages and tensors stand on a byte stream. docs/protocol.md describes it byte by
// byte.
//
//   header    32 bytes, little-endian (FrameHeader)
//   metadata  metadata_bytes of protobuf
//   padding   zero bytes up to the next multiple of 64, counted from the frame's first byte
//   payload   payload_bytes of raw tensors
//   trailer   8 bytes, little-endian: xxHash64 of the payload; zero, and not looked at, on a
//             connection whose hello has agreed on kUncheckedPayloads
//
// Padding and trailer are there only if there is a payload. A peer believes the lengths only after
// the header's checksum, and checks them against its limits before it allocates. Nothing here
// touches a socket.
#ifndef KVSEEK_PROTO_FRAME_H_
#define KVSEEK_PROTO_FRAME_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace kvseek::proto {

inline constexpr uint32_t kMagic = 0x4b53564bU;  ///< bytes 'K' 'V' 'S' 'K'
inline constexpr uint8_t kVersion = 1;
inline constexpr size_t kHeaderBytes = 32;
inline constexpr size_t kTrailerBytes = 8;
inline constexpr size_t kPayloadAlignment = 64;

/// Operations. A response carries the op of its request. Unknown ones are refused with
/// invalid_argument.
enum class Op : uint8_t {
  kHello = 1,
  kOpenSession = 2,
  kAppend = 3,
  kAttend = 4,
  kTopK = 5,
  kFetchRows = 6,
  kFork = 7,
  kTruncate = 8,
  kCloseSession = 9,
  kStats = 10,
  kHealth = 11,
  kCancel = 12,
  kOpenDoorbell = 13,
};

/// Whether the byte is a known operation.
bool IsKnownOp(uint8_t op);
/// Its name, e.g. "attend"; "unknown" for any other byte.
const char* OpName(Op op);

/// Bits of FrameHeader::flags. Unknown bits are ignored.
inline constexpr uint16_t kFlagResponse = 1U << 0;
/// The metadata is an Error; only together with kFlagResponse.
inline constexpr uint16_t kFlagError = 1U << 1;

/// Feature of a hello: trailers are zero and nobody looks at them. Asked for and granted on unix
/// sockets only, which do not lose bits.
inline constexpr char kUncheckedPayloads[] = "unchecked_payloads";
/// Feature of a hello on a unix socket: all frames behind the hello's answer go through rings in
/// memory that the daemon shares (docs/protocol.md), without checksums of payloads.
inline constexpr char kSharedMemory[] = "shared_memory";

struct FrameHeader {
  uint32_t magic = kMagic;     ///< offset 0
  uint8_t version = kVersion;  ///< 4
  Op op = Op::kHello;          ///< 5
  uint16_t flags = 0;          ///< 6
  uint64_t request_id = 0;     ///< 8; chosen by the client, unique among its requests under way
  /// 16; of a request: what is left until its deadline, 0: none; of a response: 0
  uint32_t time_left_us = 0;
  uint32_t metadata_bytes = 0;  ///< 20
  uint32_t payload_bytes = 0;   ///< 24
  // offset 28: lower half of the xxHash64 of bytes 0..27

  /// Padding between metadata and payload.
  size_t PaddingBytes() const;
  /// All that follows the header: metadata, padding, payload, trailer.
  size_t BodyBytes() const;
};

/// What a peer accepts. Checked by DecodeHeader.
struct FrameLimits {
  uint32_t metadata_bytes_max = 1U << 20;
  uint32_t payload_bytes_max = 256U << 20;
};

/// Writes kHeaderBytes.
void EncodeHeader(const FrameHeader& header, uint8_t* out);

/// Reads the first kHeaderBytes. Errors, in this order: data_loss (fewer bytes, magic, checksum),
/// failed_precondition (version), resource_exhausted (a length over its limit), invalid_argument
/// (an Error with a payload). The message begins with the name of the field. An unknown op is no
/// error here: its frame can be skipped and refused.
absl::StatusOr<FrameHeader> DecodeHeader(absl::Span<const uint8_t> bytes,
                                         const FrameLimits& limits);

/// xxHash64 with seed 0.
uint64_t Checksum(absl::Span<const uint8_t> bytes);

/// The trailer that belongs to a payload.
std::array<uint8_t, kTrailerBytes> MakeTrailer(absl::Span<const uint8_t> payload);

/// data_loss unless `trailer` holds the payload's checksum.
absl::Status VerifyPayload(absl::Span<const uint8_t> payload, absl::Span<const uint8_t> trailer);

/// Next multiple of kPayloadAlignment: where the next tensor of a payload starts.
constexpr size_t AlignUp(size_t offset) {
  return (offset + kPayloadAlignment - 1) / kPayloadAlignment * kPayloadAlignment;
}

/// Where the parts of a payload stand: one after another, each at the next boundary. An empty part
/// takes no place, and the payload ends where its last part ends. REQUIRES: the parts' bytes sum up
/// to less than 2^63.
class PayloadLayout {
 public:
  /// Offset of the next part, which has `bytes` bytes.
  constexpr size_t Add(size_t bytes) {
    if (bytes == 0) return bytes_;
    const size_t offset = AlignUp(bytes_);
    bytes_ = offset + bytes;
    return offset;
  }
  /// Of the whole payload so far.
  constexpr size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

/// One whole frame in memory, for tests, fixtures and small messages. The transports write header,
/// metadata and payload from where they are instead. Without `checked` the trailer is zero.
std::string EncodeFrame(FrameHeader header, const std::string& metadata,
                        absl::Span<const uint8_t> payload, bool checked = true);

}  // namespace kvseek::proto

#endif  // KVSEEK_PROTO_FRAME_H_
