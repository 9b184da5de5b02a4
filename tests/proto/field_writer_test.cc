// What is written field by field is what protobuf writes of a message of the same fields.
#include "proto/field_writer.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "proto/kvseek.pb.h"

namespace kvseek::proto {
namespace {

std::string Written(const uint8_t* begin, const uint8_t* end) { return {begin, end}; }

TEST(FieldWriterTest, FieldsAreThoseOfAReport) {
  for (const uint64_t number : {uint64_t{0}, uint64_t{1}, uint64_t{127}, uint64_t{128},
                                uint64_t{1} << 40, std::numeric_limits<uint64_t>::max()}) {
    for (const size_t floats : {0, 1, 4, 64}) {
      Report report;
      report.set_keys_scanned(number);
      report.set_bytes_touched(number);
      for (size_t i = 0; i < floats; ++i) report.add_missed_mass(0.25F * static_cast<float>(i));
      report.set_index(INDEX_PRODUCT);
      report.set_reused(true);
      std::vector<uint8_t> bytes(1024);
      uint8_t* end = WriteNumber(Report::kKeysScannedFieldNumber, number, bytes.data());
      end = WriteNumber(Report::kBytesTouchedFieldNumber, number, end);
      const std::vector<float> masses{report.missed_mass().begin(), report.missed_mass().end()};
      end = WriteFloats(Report::kMissedMassFieldNumber, masses, end);
      end = WriteNumber(Report::kIndexFieldNumber, INDEX_PRODUCT, end);
      end = WriteNumber(Report::kReusedFieldNumber, 1, end);
      EXPECT_EQ(Written(bytes.data(), end), report.SerializeAsString());
    }
  }
}

TEST(FieldWriterTest, MessagesAndLists) {
  TopKResponse response;
  response.add_reports();  // of no fields
  response.add_reports()->set_keys_fine(300);
  const std::vector<uint32_t> counts{0, 127, 128, 1U << 31};
  response.mutable_position_counts()->Add(counts.begin(), counts.end());
  std::vector<uint8_t> report(64);
  uint8_t* const report_end = WriteNumber(Report::kKeysFineFieldNumber, 300, report.data());
  std::vector<uint8_t> bytes(256);
  uint8_t* end = WriteBytes(TopKResponse::kReportsFieldNumber, {}, bytes.data());
  end = WriteBytes(TopKResponse::kReportsFieldNumber,
                   absl::MakeConstSpan(report.data(), report_end), end);
  end = WriteNumbers(TopKResponse::kPositionCountsFieldNumber, counts, end);
  EXPECT_EQ(Written(bytes.data(), end), response.SerializeAsString());
  EXPECT_EQ(WriteNumbers(TopKResponse::kPositionCountsFieldNumber, {}, bytes.data()), bytes.data());
}

}  // namespace
}  // namespace kvseek::proto
