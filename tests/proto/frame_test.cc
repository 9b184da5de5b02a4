#include "proto/frame.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "tests/proto/messages.h"

namespace kvseek::proto {
namespace {

using HeaderBytes = std::array<uint8_t, kHeaderBytes>;

FrameHeader SomeHeader() {
  FrameHeader header;
  header.op = Op::kAttend;
  header.flags = kFlagResponse;
  header.request_id = 0x1122334455667788U;
  header.time_left_us = 0x99aabbccU;
  header.metadata_bytes = 0x12345;
  header.payload_bytes = 0x6789ab;
  return header;
}

HeaderBytes Encode(const FrameHeader& header) {
  HeaderBytes bytes;
  EncodeHeader(header, bytes.data());
  return bytes;
}

// Puts the checksum that belongs to bytes 0..27 into bytes 28..31.
void Reseal(HeaderBytes& bytes) {
  const uint64_t checksum = Checksum(absl::MakeConstSpan(bytes.data(), 28));
  for (size_t i = 0; i < 4; ++i) bytes[28 + i] = static_cast<uint8_t>(checksum >> (8 * i));
}

absl::Status DecodeStatus(const HeaderBytes& bytes, const FrameLimits& limits = {}) {
  return DecodeHeader(bytes, limits).status();
}

TEST(FrameHeaderTest, StandsAtItsOffsetsInLittleEndian) {
  const HeaderBytes bytes = Encode(SomeHeader());
  const HeaderBytes expected = {'K',  'V',  'S',  'K',  1,         4,         0x01,      0x00,  //
                                0x88, 0x77, 0x66, 0x55, 0x44,      0x33,      0x22,      0x11,  //
                                0xcc, 0xbb, 0xaa, 0x99, 0x45,      0x23,      0x01,      0x00,  //
                                0xab, 0x89, 0x67, 0x00, bytes[28], bytes[29], bytes[30], bytes[31]};
  EXPECT_EQ(bytes, expected);
  const uint64_t checksum = Checksum(absl::MakeConstSpan(bytes.data(), 28));
  EXPECT_EQ(bytes[28], checksum & 0xff);
  EXPECT_EQ(bytes[31], (checksum >> 24) & 0xff);
}

TEST(FrameHeaderTest, RoundTrips) {
  for (const uint64_t request_id : {uint64_t{0}, uint64_t{1}, ~uint64_t{0}}) {
    for (const uint16_t flags : {uint16_t{0}, kFlagResponse, uint16_t{0xfffd}}) {
      for (const uint8_t op : {0, 1, 13, 14, 255}) {
        FrameHeader header = SomeHeader();
        header.request_id = request_id;
        header.flags = flags;
        header.op = static_cast<Op>(op);
        const auto decoded = DecodeHeader(Encode(header), {});
        ASSERT_TRUE(decoded.ok()) << decoded.status();
        EXPECT_EQ(decoded->magic, kMagic);
        EXPECT_EQ(decoded->version, kVersion);
        EXPECT_EQ(decoded->op, header.op);
        EXPECT_EQ(decoded->flags, flags);
        EXPECT_EQ(decoded->request_id, request_id);
        EXPECT_EQ(decoded->time_left_us, header.time_left_us);
        EXPECT_EQ(decoded->metadata_bytes, header.metadata_bytes);
        EXPECT_EQ(decoded->payload_bytes, header.payload_bytes);
        EXPECT_EQ(Encode(*decoded), Encode(header));
      }
    }
  }
}

TEST(FrameHeaderTest, EveryFlippedBitIsDetected) {
  const HeaderBytes good = Encode(SomeHeader());
  for (size_t bit = 0; bit < 8 * kHeaderBytes; ++bit) {
    HeaderBytes bad = good;
    bad[bit / 8] ^= static_cast<uint8_t>(1U << (bit % 8));
    EXPECT_EQ(DecodeStatus(bad).code(), absl::StatusCode::kDataLoss) << "bit " << bit;
  }
}

TEST(FrameHeaderTest, EveryOtherValueOfAByteIsDetected) {
  const HeaderBytes good = Encode(SomeHeader());
  for (size_t i = 0; i < kHeaderBytes; ++i) {
    for (unsigned change = 1; change < 256; ++change) {
      HeaderBytes bad = good;
      bad[i] ^= static_cast<uint8_t>(change);
      ASSERT_EQ(DecodeStatus(bad).code(), absl::StatusCode::kDataLoss) << i << " ^ " << change;
    }
  }
}

TEST(FrameHeaderTest, TruncatedIsDataLoss) {
  const HeaderBytes bytes = Encode(SomeHeader());
  for (size_t length = 0; length < kHeaderBytes; ++length) {
    const auto decoded = DecodeHeader(absl::MakeConstSpan(bytes.data(), length), {});
    EXPECT_EQ(decoded.status().code(), absl::StatusCode::kDataLoss) << length;
  }
}

TEST(FrameHeaderTest, ReadsOnlyItsOwnBytes) {
  const HeaderBytes bytes = Encode(SomeHeader());
  std::vector<uint8_t> longer(bytes.begin(), bytes.end());
  longer.resize(100, 0xee);
  EXPECT_TRUE(DecodeHeader(longer, {}).ok());
}

TEST(FrameHeaderTest, OtherMagicIsNamedEvenWithItsChecksum) {
  HeaderBytes bytes = Encode(SomeHeader());
  bytes[0] = 'G';
  Reseal(bytes);
  const absl::Status status = DecodeStatus(bytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(status.message().substr(0, 6), "magic:");
}

TEST(FrameHeaderTest, OtherVersionIsFailedPrecondition) {
  for (const uint8_t version : {0, 2, 255}) {
    HeaderBytes bytes = Encode(SomeHeader());
    bytes[4] = version;
    EXPECT_EQ(DecodeStatus(bytes).code(), absl::StatusCode::kDataLoss) << "checksum comes first";
    Reseal(bytes);
    EXPECT_EQ(DecodeStatus(bytes).code(), absl::StatusCode::kFailedPrecondition);
  }
}

TEST(FrameHeaderTest, LengthsOverTheirLimitsAreRefusedByName) {
  const FrameLimits limits{.metadata_bytes_max = 100, .payload_bytes_max = 1000};
  FrameHeader header;
  header.metadata_bytes = 100;
  header.payload_bytes = 1000;
  EXPECT_TRUE(DecodeStatus(Encode(header), limits).ok());

  header.metadata_bytes = 101;
  absl::Status status = DecodeStatus(Encode(header), limits);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message().substr(0, 15), "metadata_bytes:");

  header.metadata_bytes = 0;
  header.payload_bytes = std::numeric_limits<uint32_t>::max();
  status = DecodeStatus(Encode(header), limits);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message().substr(0, 14), "payload_bytes:");
}

TEST(FrameHeaderTest, AnErrorHasNoPayload) {
  FrameHeader header;
  header.flags = kFlagResponse | kFlagError;
  header.metadata_bytes = 10;
  EXPECT_TRUE(DecodeStatus(Encode(header)).ok());
  header.payload_bytes = 1;
  EXPECT_EQ(DecodeStatus(Encode(header)).code(), absl::StatusCode::kInvalidArgument);
  header.flags = kFlagError;  // without the response bit it means nothing
  EXPECT_TRUE(DecodeStatus(Encode(header)).ok());
}

TEST(FrameHeaderTest, BodyOfTheLargestLengthsDoesNotWrap) {
  FrameHeader header;
  header.metadata_bytes = std::numeric_limits<uint32_t>::max();
  header.payload_bytes = std::numeric_limits<uint32_t>::max();
  EXPECT_EQ((kHeaderBytes + header.metadata_bytes + header.PaddingBytes()) % kPayloadAlignment, 0U);
  EXPECT_GE(header.BodyBytes(), 2 * size_t{std::numeric_limits<uint32_t>::max()} + kTrailerBytes);
}

TEST(FrameTest, EveryPartStandsWhereTheHeaderSays) {
  for (const size_t metadata_bytes : {0, 1, 31, 32, 33, 96, 97}) {
    for (const size_t payload_bytes : {0, 1, 63, 64, 65, 1000}) {
      const std::string metadata(metadata_bytes, 'm');
      std::vector<uint8_t> payload(payload_bytes);
      std::iota(payload.begin(), payload.end(), uint8_t{1});
      const std::string frame = EncodeFrame(SomeHeader(), metadata, payload);

      const auto header = DecodeHeader(BytesOf(frame), {});
      ASSERT_TRUE(header.ok()) << header.status();
      ASSERT_EQ(header->metadata_bytes, metadata_bytes);
      ASSERT_EQ(header->payload_bytes, payload_bytes);
      ASSERT_EQ(frame.size(), kHeaderBytes + header->BodyBytes());
      EXPECT_EQ(frame.substr(kHeaderBytes, metadata_bytes), metadata);
      if (payload_bytes == 0) {
        EXPECT_EQ(header->BodyBytes(), metadata_bytes);
        continue;
      }
      const size_t start = AlignUp(kHeaderBytes + metadata_bytes);
      ASSERT_EQ(start, kHeaderBytes + metadata_bytes + header->PaddingBytes());
      ASSERT_LT(header->PaddingBytes(), kPayloadAlignment);
      EXPECT_EQ(frame.substr(kHeaderBytes + metadata_bytes, header->PaddingBytes()),
                std::string(header->PaddingBytes(), '\0'));
      const auto found = BytesOf(frame).subspan(start, payload_bytes);
      EXPECT_EQ(found, absl::MakeConstSpan(payload));
      EXPECT_TRUE(VerifyPayload(found, BytesOf(frame).subspan(start + payload_bytes)).ok());
    }
  }
}

TEST(FrameTest, PayloadChecksumFindsEveryFlippedBit) {
  std::vector<uint8_t> payload(100);
  std::iota(payload.begin(), payload.end(), uint8_t{7});
  const std::string frame = EncodeFrame({}, "meta", payload);
  const absl::Span<const uint8_t> trailer = BytesOf(frame).last(kTrailerBytes);
  ASSERT_TRUE(VerifyPayload(payload, trailer).ok());
  for (size_t bit = 0; bit < 8 * payload.size(); ++bit) {
    std::vector<uint8_t> bad = payload;
    bad[bit / 8] ^= static_cast<uint8_t>(1U << (bit % 8));
    ASSERT_EQ(VerifyPayload(bad, trailer).code(), absl::StatusCode::kDataLoss) << bit;
  }
  for (size_t bit = 0; bit < 8 * kTrailerBytes; ++bit) {
    std::vector<uint8_t> bad(trailer.begin(), trailer.end());
    bad[bit / 8] ^= static_cast<uint8_t>(1U << (bit % 8));
    ASSERT_EQ(VerifyPayload(payload, bad).code(), absl::StatusCode::kDataLoss) << bit;
  }
  EXPECT_EQ(VerifyPayload(payload, trailer.first(7)).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(VerifyPayload(payload, {}).code(), absl::StatusCode::kDataLoss);
}

TEST(FrameTest, ChecksumIsXxHash64WithSeedZero) {
  EXPECT_EQ(Checksum({}), 0xef46db3751d8e999U);
  EXPECT_EQ(Checksum(BytesOf("a")), 0xd24ec4f1a98c6e5bU);
  EXPECT_EQ(Checksum(BytesOf("abc")), 0x44bc2cf5ad770999U);
}

TEST(PayloadLayoutTest, PartsStandAtBoundariesAndEmptyOnesTakeNoPlace) {
  PayloadLayout layout;
  EXPECT_EQ(layout.Add(0), 0U);
  EXPECT_EQ(layout.Add(10), 0U);
  EXPECT_EQ(layout.bytes(), 10U);
  layout.Add(0);
  EXPECT_EQ(layout.bytes(), 10U);
  EXPECT_EQ(layout.Add(64), 64U);
  EXPECT_EQ(layout.Add(1), 128U);
  EXPECT_EQ(layout.bytes(), 129U);
}

TEST(OpTest, NamesExactlyTheKnownOnes) {
  int known = 0;
  for (int op = 0; op < 256; ++op) {
    const bool named = OpName(static_cast<Op>(op)) != std::string("unknown");
    EXPECT_EQ(named, IsKnownOp(static_cast<uint8_t>(op))) << op;
    known += named ? 1 : 0;
  }
  EXPECT_EQ(known, 13);
  EXPECT_STREQ(OpName(Op::kTopK), "top_k");
}

}  // namespace
}  // namespace kvseek::proto
