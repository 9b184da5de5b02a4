// The frames of tests/proto/fixtures: what we encode is what was recorded, and what was recorded
// decodes to what we expect. KVSEEK_WRITE_FIXTURES=1 writes missing fixtures; to change one that is
// there, which breaks the protocol, delete it first.
#include <gmock/gmock.h>
#include <google/protobuf/unknown_field_set.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "proto/status_code.h"
#include "tests/proto/messages.h"
#include "tests/proto/recorded_frames.h"

namespace kvseek::proto {
namespace {

std::string FixturePath(const std::string& name) { return FixtureFolder() + "/" + name + ".bin"; }

class CompatibilityTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    const char* write = std::getenv("KVSEEK_WRITE_FIXTURES");
    if (write == nullptr || std::string(write) != "1") return;
    for (const RecordedFrame& frame : RecordedFrames()) {
      const std::string path = FixturePath(frame.name);
      if (std::filesystem::exists(path)) continue;
      std::ofstream(path, std::ios::binary) << EncodeRecorded(frame);
    }
  }
};

TEST_F(CompatibilityTest, EncodesWhatWasRecorded) {
  for (const RecordedFrame& frame : RecordedFrames()) {
    const std::string recorded = ReadFile(FixturePath(frame.name));
    ASSERT_FALSE(recorded.empty()) << frame.name << ": no fixture (KVSEEK_WRITE_FIXTURES=1)";
    EXPECT_TRUE(EncodeRecorded(frame) == recorded) << frame.name << " is not what was recorded";
  }
}

TEST_F(CompatibilityTest, DecodesWhatWasRecorded) {
  for (const RecordedFrame& expected : RecordedFrames()) {
    SCOPED_TRACE(expected.name);
    const std::string recorded = ReadFile(FixturePath(expected.name));
    const auto header = DecodeHeader(BytesOf(recorded), {});
    ASSERT_TRUE(header.ok()) << header.status();
    EXPECT_EQ(header->op, expected.header.op);
    EXPECT_EQ(header->flags, expected.header.flags);
    EXPECT_EQ(header->request_id, expected.header.request_id);
    EXPECT_EQ(header->time_left_us, expected.header.time_left_us);
    ASSERT_EQ(recorded.size(), kHeaderBytes + header->BodyBytes());

    const auto message = NewMessage(header->op, header->flags);
    ASSERT_EQ(message == nullptr, expected.message == nullptr);
    if (message != nullptr) {
      ASSERT_TRUE(message->ParseFromString(recorded.substr(kHeaderBytes, header->metadata_bytes)));
      const bool has_unknown = !message->GetReflection()->GetUnknownFields(*message).empty();
      EXPECT_EQ(has_unknown, !expected.unknown.empty());
      message->DiscardUnknownFields();
      EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(*message, *expected.message))
          << message->DebugString();
    }

    ASSERT_EQ(header->payload_bytes, expected.payload.size());
    if (expected.payload.empty()) continue;
    const size_t start = AlignUp(kHeaderBytes + header->metadata_bytes);
    const auto payload = BytesOf(recorded).subspan(start, header->payload_bytes);
    EXPECT_EQ(payload, absl::MakeConstSpan(expected.payload));
    const auto trailer = BytesOf(recorded).last(kTrailerBytes);
    EXPECT_EQ(VerifyPayload(payload, trailer).ok(), expected.checked);
    if (!expected.checked) {
      EXPECT_THAT(trailer, testing::Each(0));
    }
  }
}

TEST_F(CompatibilityTest, EveryOpHasARequestAndAResponse) {
  std::set<int> requests;
  std::set<int> responses;
  for (const RecordedFrame& frame : RecordedFrames()) {
    if ((frame.header.flags & kFlagError) != 0 && (frame.header.flags & kFlagResponse) != 0)
      continue;
    const bool response = (frame.header.flags & kFlagResponse) != 0;
    (response ? responses : requests).insert(static_cast<int>(frame.header.op));
  }
  for (int op = 0; op < 256; ++op) {
    if (!IsKnownOp(static_cast<uint8_t>(op))) continue;
    EXPECT_EQ(requests.count(op), 1U) << OpName(static_cast<Op>(op));
    EXPECT_EQ(responses.count(op), 1U) << OpName(static_cast<Op>(op));
  }
}

TEST_F(CompatibilityTest, NoFixtureIsForgotten) {
  std::set<std::string> names;
  for (const RecordedFrame& frame : RecordedFrames()) {
    EXPECT_TRUE(names.insert(frame.name + ".bin").second) << frame.name;
  }
  for (const auto& entry : std::filesystem::directory_iterator(FixtureFolder())) {
    EXPECT_EQ(names.count(entry.path().filename().string()), 1U) << entry.path();
  }
}

TEST_F(CompatibilityTest, FrameOfAnUnknownOpCanBeSkipped) {
  const std::string stream = ReadFile(FixturePath("later_op_request")) +
                             ReadFile(FixturePath("later_fetch_rows_request")) +
                             ReadFile(FixturePath("health_request"));
  auto rest = BytesOf(stream);
  std::vector<int> ops;
  while (!rest.empty()) {
    const auto header = DecodeHeader(rest, {});
    ASSERT_TRUE(header.ok()) << header.status();
    ops.push_back(static_cast<int>(header->op));
    ASSERT_GE(rest.size(), kHeaderBytes + header->BodyBytes());
    rest.remove_prefix(kHeaderBytes + header->BodyBytes());
  }
  EXPECT_EQ(ops, (std::vector<int>{200, 6, 11}));
  EXPECT_FALSE(IsKnownOp(200));
}

TEST_F(CompatibilityTest, AnUncheckedFrameDiffersInItsTrailerAlone) {
  const std::string checked = ReadFile(FixturePath("fetch_rows_request"));
  const std::string unchecked = ReadFile(FixturePath("unchecked_fetch_rows_request"));
  ASSERT_EQ(checked.size(), unchecked.size());
  const size_t end = checked.size() - kTrailerBytes;
  EXPECT_TRUE(checked.substr(0, end) == unchecked.substr(0, end));
  EXPECT_EQ(unchecked.substr(end), std::string(kTrailerBytes, '\0'));
}

TEST_F(CompatibilityTest, RecordedErrorsComeBackWhole) {
  const auto decode = [](const std::string& name) {
    const std::string recorded = ReadFile(FixturePath(name));
    Error error;
    EXPECT_TRUE(error.ParseFromString(recorded.substr(kHeaderBytes)));
    return FromError(error);
  };
  EXPECT_EQ(decode("error_invalid_argument"),
            FieldError(absl::StatusCode::kInvalidArgument, "items[1].layer", "3, of 3"));
  EXPECT_EQ(decode("error_resource_exhausted"),
            Exhausted("queue", "1024 requests are waiting", 50));
}

// ---- payload lengths as docs/protocol.md states them, computed from the messages alone

constexpr size_t kGroups = 2;  // KV heads of the recorded model
constexpr size_t kQueryHeads = 4;
constexpr size_t kKeyDim = 8;
constexpr size_t kValueDim = 16;

size_t PaddedSum(std::initializer_list<size_t> parts) {
  size_t end = 0;
  for (const size_t bytes : parts) {
    if (bytes != 0) end = (end + 63) / 64 * 64 + bytes;
  }
  return end;
}

size_t PayloadBytes(const std::string& name) {
  for (const RecordedFrame& frame : RecordedFrames()) {
    if (frame.name == name) return frame.payload.size();
  }
  ADD_FAILURE() << name;
  return 0;
}

template <typename M>
M MessageOf(const std::string& name) {
  const std::string recorded = ReadFile(FixturePath(name));
  const auto header = DecodeHeader(BytesOf(recorded), {});
  M message;
  EXPECT_TRUE(header.ok() &&
              message.ParseFromString(recorded.substr(kHeaderBytes, header->metadata_bytes)));
  return message;
}

TEST_F(CompatibilityTest, PayloadsOfSearchesAreAsLongAsTheirMessagesSay) {
  const auto attend = MessageOf<AttendRequest>("attend_request");
  const size_t t0 = attend.items(0).tokens();
  const size_t t1 = attend.items(1).tokens();
  EXPECT_EQ(PayloadBytes("attend_request"),
            PaddedSum({t0 * kQueryHeads * kKeyDim * 4, t1 * kQueryHeads * kKeyDim * 4}));
  EXPECT_EQ(PayloadBytes("top_k_request"),
            PaddedSum({t0 * kQueryHeads * kKeyDim * 2, t1 * kQueryHeads * kKeyDim * 2}));

  const auto attended = MessageOf<AttendResponse>("attend_response");
  ASSERT_EQ(static_cast<size_t>(attended.reports_size()), (t0 + t1) * kGroups);
  ASSERT_EQ(attended.position_counts_size(), attended.reports_size());
  size_t listed = 0;
  for (const uint32_t count : attended.position_counts()) listed += count;
  EXPECT_EQ(PayloadBytes("attend_response"),
            PaddedSum({t0 * kQueryHeads * kValueDim * 4, t0 * kQueryHeads * 4,
                       t1 * kQueryHeads * kValueDim * 4, t1 * kQueryHeads * 4, listed * 8}));

  const auto found = MessageOf<TopKResponse>("top_k_response");
  ASSERT_EQ(static_cast<size_t>(found.position_counts_size()), (t0 + t1) * kGroups);
  size_t keys0 = 0;
  size_t keys1 = 0;
  for (int i = 0; i < found.position_counts_size(); ++i) {
    (static_cast<size_t>(i) < t0 * kGroups ? keys0 : keys1) += found.position_counts(i);
  }
  EXPECT_EQ(
      PayloadBytes("top_k_response"),
      PaddedSum({(keys0 + keys1) * 8, keys0 * kKeyDim * 2, keys1 * kKeyDim * 2,
                 keys0 * kValueDim * 2, keys1 * kValueDim * 2, t0 * kQueryHeads * kValueDim * 4,
                 t0 * kQueryHeads * 4, t1 * kQueryHeads * kValueDim * 4, t1 * kQueryHeads * 4}));
}

TEST_F(CompatibilityTest, PayloadsOfSomeHeadsAreAsLongAsTheirMessagesSay) {
  const auto request = MessageOf<TopKRequest>("top_k_of_some_request");
  std::vector<size_t> queries;
  std::vector<size_t> held(2);
  for (size_t i = 0; i < 2; ++i) {
    const QueryItem& item = request.items(static_cast<int>(i));
    const auto heads = static_cast<size_t>(item.kv_heads_size());
    ASSERT_EQ(static_cast<size_t>(item.held_counts_size()), item.tokens() * heads);
    queries.push_back(item.tokens() * heads * (kQueryHeads / kGroups) * kKeyDim * 2);
    for (const uint32_t count : item.held_counts()) held[i] += count * 4;
  }
  EXPECT_EQ(PayloadBytes("top_k_of_some_request"),
            PaddedSum({queries[0], held[0], queries[1], held[1]}));

  const auto response = MessageOf<TopKResponse>("top_k_of_some_response");
  size_t positions = 0;
  for (const uint32_t count : response.position_counts()) positions += count;
  constexpr size_t kRows = 2;  // of positions that are not held
  EXPECT_EQ(PayloadBytes("top_k_of_some_response"),
            PaddedSum({positions * 8, kRows * kKeyDim * 2, kRows * kValueDim * 2}));
}

TEST_F(CompatibilityTest, PayloadsOfRowsAreAsLongAsTheirMessagesSay) {
  const size_t tokens = MessageOf<AppendRequest>("append_request").tokens();
  EXPECT_EQ(PayloadBytes("append_request"),
            PaddedSum({tokens * kGroups * kKeyDim * 2, tokens * kGroups * kValueDim * 2}));
  const auto append = MessageOf<AppendRequest>("append_with_landmarks_request");
  const auto sampled = static_cast<size_t>(append.query_positions_size());
  const auto landmarks = static_cast<size_t>(append.landmark_positions_size());
  EXPECT_EQ(
      PayloadBytes("append_with_landmarks_request"),
      PaddedSum({append.tokens() * kGroups * kKeyDim * 2, append.tokens() * kGroups * kValueDim * 2,
                 sampled * kQueryHeads * kKeyDim * 2, landmarks * kGroups * kKeyDim * 2}));
  const size_t count = MessageOf<FetchRowsRequest>("fetch_rows_request").count();
  EXPECT_EQ(PayloadBytes("fetch_rows_request"), count * 8);
  EXPECT_EQ(PayloadBytes("fetch_rows_response"),
            PaddedSum({count * kKeyDim * 2, count * kValueDim * 2}));
}

}  // namespace
}  // namespace kvseek::proto
