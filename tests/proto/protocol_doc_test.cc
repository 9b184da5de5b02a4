// Holds docs/protocol.md to what it describes: the frame it shows, its operations and its codes.
#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "proto/frame.h"
#include "proto/kvseek.pb.h"
#include "tests/proto/messages.h"
#include "tests/proto/recorded_frames.h"

namespace kvseek::proto {
namespace {

constexpr char kShown[] = "fetch_rows_request.bin";

std::vector<std::string> DocLines() {
  return absl::StrSplit(ReadFile(KVSEEK_SOURCE_DIR "/docs/protocol.md"), '\n');
}

// The lines after the one that equals `marker`, up to an empty one.
std::vector<std::string> BlockAfter(const std::string& marker) {
  std::vector<std::string> block;
  bool inside = false;
  for (const std::string& line : DocLines()) {
    if (inside && line.empty()) break;
    if (inside) block.push_back(line);
    inside = inside || line == marker;
  }
  return block;
}

// The cells of the rows of the first table after `marker`, blanks and backquotes removed, without
// its two head lines.
std::vector<std::vector<std::string>> RowsAfter(const std::string& marker) {
  std::vector<std::vector<std::string>> rows;
  bool marked = false;
  for (const std::string& line : DocLines()) {
    const bool in_table = marked && !line.empty() && line.front() == '|';
    if (!in_table && !rows.empty()) break;
    marked = marked || line == marker;
    if (!in_table) continue;
    std::vector<std::string> cells;
    for (absl::string_view cell : absl::StrSplit(line, '|')) {
      cell = absl::StripAsciiWhitespace(cell);
      absl::ConsumePrefix(&cell, "`");
      absl::ConsumeSuffix(&cell, "`");
      cells.emplace_back(cell);
    }
    rows.push_back(cells);
  }
  if (rows.size() >= 2) rows.erase(rows.begin(), rows.begin() + 2);
  return rows;
}

void AppendHex(const std::string& text, std::string& out) {
  for (const absl::string_view byte : absl::StrSplit(text, ' ', absl::SkipEmpty())) {
    ASSERT_EQ(byte.size(), 2U) << byte;
    uint32_t value = 0;
    ASSERT_TRUE(absl::SimpleHexAtoi(byte, &value)) << byte;
    out.push_back(static_cast<char>(value));
  }
}

std::string DumpedFrame() {
  std::string frame;
  for (const std::string& line : BlockAfter(std::string("<!-- dump of ") + kShown + " -->")) {
    if (line == "```") continue;
    uint32_t offset = 0;
    EXPECT_TRUE(absl::SimpleHexAtoi(line.substr(0, 8), &offset)) << line;
    EXPECT_EQ(offset, frame.size()) << line;
    AppendHex(line.substr(10, 47), frame);
  }
  return frame;
}

TEST(ProtocolDocTest, DumpIsTheFixture) {
  const std::string fixture = ReadFile(FixtureFolder() + "/" + kShown);
  ASSERT_FALSE(fixture.empty());
  EXPECT_TRUE(DumpedFrame() == fixture);
}

TEST(ProtocolDocTest, DumpDecodesToWhatTheTextSays) {
  const std::string frame = DumpedFrame();
  const auto header = DecodeHeader(BytesOf(frame), {});
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_EQ(header->op, Op::kFetchRows);
  EXPECT_EQ(header->request_id, 2566U);
  EXPECT_EQ(header->time_left_us, 250000U);
  EXPECT_EQ(header->PaddingBytes(), 6U);
  ASSERT_EQ(frame.size(), kHeaderBytes + header->BodyBytes());
  FetchRowsRequest request;
  ASSERT_TRUE(request.ParseFromString(frame.substr(kHeaderBytes, header->metadata_bytes)));
  EXPECT_EQ(request.session().boot_id(), 0x0123456789abcdefU);
  EXPECT_EQ(request.session().session_id(), 7U);
  EXPECT_EQ(request.layer(), 2U);
  EXPECT_EQ(request.kv_head(), 1U);
  EXPECT_EQ(request.count(), 2U);
  const auto payload = BytesOf(frame).subspan(64, 16);
  EXPECT_TRUE(VerifyPayload(payload, BytesOf(frame).last(kTrailerBytes)).ok());
  EXPECT_EQ(payload[0], 5U);
  EXPECT_EQ(payload[8] + 256U * payload[9] + 65536U * payload[10], 70000U);
}

TEST(ProtocolDocTest, EveryByteOfTheDumpIsExplained) {
  std::string explained;
  for (const auto& row : RowsAfter(std::string("<!-- bytes of ") + kShown + " -->")) {
    ASSERT_EQ(row.size(), 5U);
    size_t offset = 0;
    ASSERT_TRUE(absl::SimpleAtoi(row[1], &offset)) << row[1];
    EXPECT_EQ(offset, explained.size()) << row[3];
    EXPECT_FALSE(row[3].empty());
    AppendHex(row[2], explained);
  }
  EXPECT_TRUE(explained == DumpedFrame());
}

TEST(ProtocolDocTest, UncheckedFrameEndsAsTheTextSays) {
  std::string frame = DumpedFrame();
  const auto rows = RowsAfter("<!-- trailer of unchecked_fetch_rows_request.bin -->");
  ASSERT_EQ(rows.size(), 1U);
  size_t offset = 0;
  ASSERT_TRUE(absl::SimpleAtoi(rows[0][1], &offset));
  frame.resize(offset);
  AppendHex(rows[0][2], frame);
  EXPECT_TRUE(frame == ReadFile(FixtureFolder() + "/unchecked_fetch_rows_request.bin"));
}

TEST(ProtocolDocTest, FeaturesAreTheKnownOnes) {
  const auto rows = RowsAfter("<!-- features -->");
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[0][1], kUncheckedPayloads);
  EXPECT_EQ(rows[1][1], kSharedMemory);
}

TEST(ProtocolDocTest, HeaderTableIsTheCodec) {
  const std::map<std::string, size_t> offsets = {
      {"magic", 0},           {"version", 4},        {"op", 5},
      {"flags", 6},           {"request_id", 8},     {"time_left_us", 16},
      {"metadata_bytes", 20}, {"payload_bytes", 24}, {"checksum", 28}};
  size_t end = 0;
  size_t rows = 0;
  for (const auto& row : RowsAfter("### Header")) {
    ++rows;
    const auto known = offsets.find(row[3]);
    ASSERT_NE(known, offsets.end()) << row[3];
    size_t offset = 0;
    size_t bytes = 0;
    ASSERT_TRUE(absl::SimpleAtoi(row[1], &offset) && absl::SimpleAtoi(row[2], &bytes));
    EXPECT_EQ(offset, known->second);
    EXPECT_EQ(offset, end);
    end = offset + bytes;
  }
  EXPECT_EQ(rows, offsets.size());
  EXPECT_EQ(end, kHeaderBytes);
}

TEST(ProtocolDocTest, OperationsAreTheKnownOnes) {
  std::map<int, std::string> described;
  for (const auto& row : RowsAfter("## 4. Operations")) {
    int op = 0;
    ASSERT_TRUE(absl::SimpleAtoi(row[1], &op)) << row[1];
    EXPECT_TRUE(described.emplace(op, row[2]).second);
    const auto known = static_cast<Op>(op);
    ASSERT_TRUE(IsKnownOp(static_cast<uint8_t>(op))) << op;
    EXPECT_EQ(row[2], OpName(known));
    EXPECT_EQ(row[3], NewMessage(known, 0)->GetDescriptor()->name() + ", " +
                          NewMessage(known, kFlagResponse)->GetDescriptor()->name());
  }
  for (int op = 0; op < 256; ++op) {
    EXPECT_EQ(described.count(op) == 1, IsKnownOp(static_cast<uint8_t>(op))) << op;
  }
}

TEST(ProtocolDocTest, CodesAreThoseOfStatus) {
  int rows = 0;
  for (const auto& row : RowsAfter("## 5. Errors")) {
    int code = 0;
    ASSERT_TRUE(absl::SimpleAtoi(row[1], &code)) << row[1];
    EXPECT_EQ(row[2],
              absl::AsciiStrToLower(absl::StatusCodeToString(static_cast<absl::StatusCode>(code))));
    ++rows;
  }
  EXPECT_GE(rows, 10);
}

}  // namespace
}  // namespace kvseek::proto
