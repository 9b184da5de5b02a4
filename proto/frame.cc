#include "proto/frame.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "absl/strings/str_cat.h"

namespace kvseek::proto {
namespace {

constexpr size_t kChecksumOffset = 28;
constexpr uint16_t kFlagsErrorAnswer = kFlagResponse | kFlagError;

template <typename T>
void StoreLittle(T value, uint8_t* out) {
  for (size_t i = 0; i < sizeof(T); ++i) out[i] = static_cast<uint8_t>(uint64_t{value} >> (8 * i));
}

template <typename T>
T LoadLittle(const uint8_t* in) {
  uint64_t value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) value |= uint64_t{in[i]} << (8 * i);
  return static_cast<T>(value);
}

uint32_t HeaderChecksum(const uint8_t* header) {
  return static_cast<uint32_t>(Checksum(absl::MakeConstSpan(header, kChecksumOffset)));
}

absl::Status OverLimit(const char* field, uint32_t value, uint32_t max) {
  return absl::ResourceExhaustedError(absl::StrCat(field, ": ", value, " bytes, limit ", max));
}

absl::Status CheckLengths(const FrameHeader& header, const FrameLimits& limits) {
  if (header.metadata_bytes > limits.metadata_bytes_max) {
    return OverLimit("metadata_bytes", header.metadata_bytes, limits.metadata_bytes_max);
  }
  if (header.payload_bytes > limits.payload_bytes_max) {
    return OverLimit("payload_bytes", header.payload_bytes, limits.payload_bytes_max);
  }
  const bool is_error = (header.flags & kFlagsErrorAnswer) == kFlagsErrorAnswer;
  if (is_error && header.payload_bytes != 0) {
    return absl::InvalidArgumentError(absl::StrCat("payload_bytes: an Error has no payload, not ",
                                                   header.payload_bytes, " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace

bool IsKnownOp(uint8_t op) {
  return op >= static_cast<uint8_t>(Op::kHello) && op <= static_cast<uint8_t>(Op::kOpenDoorbell);
}

const char* OpName(Op op) {
  switch (op) {
    case Op::kHello:
      return "hello";
    case Op::kOpenSession:
      return "open_session";
    case Op::kAppend:
      return "append";
    case Op::kAttend:
      return "attend";
    case Op::kTopK:
      return "top_k";
    case Op::kFetchRows:
      return "fetch_rows";
    case Op::kFork:
      return "fork";
    case Op::kTruncate:
      return "truncate";
    case Op::kCloseSession:
      return "close_session";
    case Op::kStats:
      return "stats";
    case Op::kHealth:
      return "health";
    case Op::kCancel:
      return "cancel";
    case Op::kOpenDoorbell:
      return "open_doorbell";
  }
  return "unknown";
}

size_t FrameHeader::PaddingBytes() const {
  if (payload_bytes == 0) return 0;
  const size_t metadata_end = kHeaderBytes + metadata_bytes;
  return AlignUp(metadata_end) - metadata_end;
}

size_t FrameHeader::BodyBytes() const {
  const size_t payload_and_trailer = payload_bytes == 0 ? 0 : payload_bytes + kTrailerBytes;
  return metadata_bytes + PaddingBytes() + payload_and_trailer;
}

void EncodeHeader(const FrameHeader& header, uint8_t* out) {
  StoreLittle(header.magic, out);
  StoreLittle(header.version, out + 4);
  StoreLittle(static_cast<uint8_t>(header.op), out + 5);
  StoreLittle(header.flags, out + 6);
  StoreLittle(header.request_id, out + 8);
  StoreLittle(header.time_left_us, out + 16);
  StoreLittle(header.metadata_bytes, out + 20);
  StoreLittle(header.payload_bytes, out + 24);
  StoreLittle(HeaderChecksum(out), out + kChecksumOffset);
}

absl::StatusOr<FrameHeader> DecodeHeader(absl::Span<const uint8_t> bytes,
                                         const FrameLimits& limits) {
  if (bytes.size() < kHeaderBytes) {
    return absl::DataLossError(absl::StrCat("header: ", bytes.size(), " bytes of ", kHeaderBytes));
  }
  const uint8_t* in = bytes.data();
  FrameHeader header;
  header.magic = LoadLittle<uint32_t>(in);
  if (header.magic != kMagic) return absl::DataLossError("magic: not a kvseek frame");
  if (LoadLittle<uint32_t>(in + kChecksumOffset) != HeaderChecksum(in)) {
    return absl::DataLossError("header: checksum does not match");
  }
  header.version = in[4];
  if (header.version != kVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("version: ", header.version, " is not spoken here, ", kVersion, " is"));
  }
  header.op = static_cast<Op>(in[5]);
  header.flags = LoadLittle<uint16_t>(in + 6);
  header.request_id = LoadLittle<uint64_t>(in + 8);
  header.time_left_us = LoadLittle<uint32_t>(in + 16);
  header.metadata_bytes = LoadLittle<uint32_t>(in + 20);
  header.payload_bytes = LoadLittle<uint32_t>(in + 24);
  if (absl::Status status = CheckLengths(header, limits); !status.ok()) return status;
  return header;
}

uint64_t Checksum(absl::Span<const uint8_t> bytes) { return XXH64(bytes.data(), bytes.size(), 0); }

std::array<uint8_t, kTrailerBytes> MakeTrailer(absl::Span<const uint8_t> payload) {
  std::array<uint8_t, kTrailerBytes> trailer{};
  StoreLittle(Checksum(payload), trailer.data());
  return trailer;
}

absl::Status VerifyPayload(absl::Span<const uint8_t> payload, absl::Span<const uint8_t> trailer) {
  if (trailer.size() != kTrailerBytes) {
    return absl::DataLossError(
        absl::StrCat("trailer: ", trailer.size(), " bytes of ", kTrailerBytes));
  }
  if (LoadLittle<uint64_t>(trailer.data()) != Checksum(payload)) {
    return absl::DataLossError("payload: checksum does not match");
  }
  return absl::OkStatus();
}

std::string EncodeFrame(FrameHeader header, const std::string& metadata,
                        absl::Span<const uint8_t> payload, bool checked) {
  header.metadata_bytes = static_cast<uint32_t>(metadata.size());
  header.payload_bytes = static_cast<uint32_t>(payload.size());
  uint8_t head[kHeaderBytes];
  EncodeHeader(header, head);

  std::string frame;
  frame.reserve(kHeaderBytes + header.BodyBytes());
  frame.append(head, head + kHeaderBytes);
  frame.append(metadata);
  if (payload.empty()) return frame;
  frame.append(header.PaddingBytes(), '\0');
  frame.append(payload.begin(), payload.end());
  std::array<uint8_t, kTrailerBytes> trailer{};
  if (checked) trailer = MakeTrailer(payload);
  frame.append(trailer.begin(), trailer.end());
  return frame;
}

}  // namespace kvseek::proto
