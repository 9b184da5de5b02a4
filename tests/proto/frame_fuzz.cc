// What a peer does with bytes that it was sent: header, lengths, metadata, payload, Error. A broken
// promise aborts. Built with the replay main (fuzz_replay.cc) or, with KVSEEK_FUZZ, with libFuzzer.
#include <google/protobuf/stubs/logging.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"
#include "tests/proto/messages.h"

namespace kvseek::proto {
namespace {

using Bytes = absl::Span<const uint8_t>;

constexpr FrameLimits kLimits{.metadata_bytes_max = 1U << 16, .payload_bytes_max = 1U << 20};

void Require(bool promise, const char* what) {
  if (promise) return;
  std::fprintf(stderr, "broken promise: %s\n", what);
  std::abort();
}

std::string Text(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void CheckErrorConversion(const std::string& metadata) {
  Error error;
  if (!error.ParseFromString(metadata)) return;
  const absl::Status status = FromError(error);
  Require(!status.ok(), "an Error is never a success");
  Require(ErrorField(status) == error.field(), "the field is kept");
  Require(RetryAfterMs(status) == error.retry_after_ms(), "retry-after is kept");

  const Error again = ToError(status);
  Require(again.message().size() <= kErrorMessageBytesMax, "messages are bounded");
  Require(again.field().size() <= kErrorFieldBytesMax, "fields are bounded");
  Error travelled;
  Require(travelled.ParseFromString(Serialize(again)), "what ToError made can be parsed");
  const bool fits = error.message().size() <= kErrorMessageBytesMax &&
                    error.field().size() <= kErrorFieldBytesMax;
  if (fits) Require(FromError(travelled) == status, "a status travels whole");
}

// Bytes that are no UTF-8, from a bug or a peer's session name, must not make the Error unreadable.
void CheckErrorOfAnyText(Bytes bytes) {
  const std::string text = Text(bytes);
  const absl::Status status = FieldError(absl::StatusCode::kInvalidArgument, text, text);
  Error travelled;
  Require(travelled.ParseFromString(Serialize(ToError(status))), "any text can be sent");
}

void CheckMessage(const FrameHeader& header, const std::string& metadata) {
  const auto message = NewMessage(header.op, header.flags);
  const bool is_error = (header.flags & kFlagResponse) != 0 && (header.flags & kFlagError) != 0;
  Require((message != nullptr) == (is_error || IsKnownOp(static_cast<uint8_t>(header.op))),
          "every known op has its messages");
  if (message == nullptr || !message->ParseFromString(metadata)) return;
  const std::unique_ptr<google::protobuf::Message> again(message->New());
  const std::string bytes = Serialize(*message);
  Require(again->ParseFromString(bytes), "what was parsed can be parsed again");
  Require(Serialize(*again) == bytes, "and says the same");
}

void CheckFrame(Bytes bytes) {
  const auto header = DecodeHeader(bytes, kLimits);
  if (!header.ok()) {
    const absl::StatusCode code = header.status().code();
    Require(code == absl::StatusCode::kDataLoss || code == absl::StatusCode::kFailedPrecondition ||
                code == absl::StatusCode::kResourceExhausted ||
                code == absl::StatusCode::kInvalidArgument,
            "DecodeHeader fails with the codes it names");
    return;
  }
  uint8_t encoded[kHeaderBytes];
  EncodeHeader(*header, encoded);
  Require(bytes.first(kHeaderBytes) == Bytes(encoded), "a header has one encoding");
  Require(header->metadata_bytes <= kLimits.metadata_bytes_max, "metadata within its limit");
  Require(header->payload_bytes <= kLimits.payload_bytes_max, "payload within its limit");
  const size_t body_max = size_t{kLimits.metadata_bytes_max} + kLimits.payload_bytes_max +
                          kPayloadAlignment + kTrailerBytes;
  Require(header->BodyBytes() <= body_max, "a body is bounded by the limits");

  const Bytes body = bytes.subspan(kHeaderBytes);
  if (body.size() < header->BodyBytes()) return;
  const std::string metadata = Text(body.first(header->metadata_bytes));
  CheckMessage(*header, metadata);
  if (header->payload_bytes == 0) return;
  const Bytes payload =
      body.subspan(header->metadata_bytes + header->PaddingBytes(), header->payload_bytes);
  const Bytes trailer = body.subspan(header->BodyBytes() - kTrailerBytes, kTrailerBytes);
  if (!VerifyPayload(payload, trailer).ok()) return;
  FrameHeader rest = *header;
  const std::string frame = EncodeFrame(rest, metadata, payload);
  Require(frame.size() == kHeaderBytes + header->BodyBytes(), "a frame has one length");
  Require(BytesOf(frame).first(kHeaderBytes) == Bytes(encoded), "and one header");
}

// Gives the header the magic, version and checksum it needs, so that mutations get past them.
std::vector<uint8_t> Repaired(Bytes bytes) {
  std::vector<uint8_t> frame(bytes.begin(), bytes.end());
  const FrameHeader plain;
  uint8_t encoded[kHeaderBytes];
  EncodeHeader(plain, encoded);
  for (size_t i = 0; i < 5; ++i) frame[i] = encoded[i];
  const uint64_t checksum = Checksum(absl::MakeConstSpan(frame.data(), kHeaderBytes - 4));
  for (size_t i = 0; i < 4; ++i) {
    frame[kHeaderBytes - 4 + i] = static_cast<uint8_t>(checksum >> (8 * i));
  }
  return frame;
}

void CheckInput(const Bytes& bytes) {
  [[maybe_unused]] static const auto log =
      google::protobuf::SetLogHandler(nullptr);  // it logs each bad string
  CheckFrame(bytes);
  if (bytes.size() < kHeaderBytes) return;
  const Bytes rest = bytes.subspan(kHeaderBytes);
  CheckErrorConversion(Text(rest));
  CheckErrorOfAnyText(rest);
  const std::vector<uint8_t> repaired = Repaired(bytes);
  CheckFrame(repaired);
}

}  // namespace
}  // namespace kvseek::proto

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvseek::proto::CheckInput({data, size});
  return 0;
}
