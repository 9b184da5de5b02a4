#include "cli/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/cli/test_files.h"

namespace kvseek::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::Status OpenBytes(const std::string& bytes) {
  const TempDir dir;
  return SafeTensors::Open(dir.Write("file.safetensors", bytes)).status();
}

void ExpectRefused(const std::string& bytes, const std::string& why) {
  const absl::Status status = OpenBytes(bytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << why;
  EXPECT_THAT(std::string(status.message()), HasSubstr(why));
}

/// A file of 8 data bytes whose only tensor "a" is described by `entry`.
std::string OneTensor(const std::string& entry) {
  return RawFile(absl::StrCat(R"({"a":)", entry, "}"), "12345678");
}

TEST(SafeTensorsTest, ReadsBackWhatWasWritten) {
  const TempDir dir;
  const TensorData floats = MakeTensor("x.floats", "F32", {2, 3}, {1, -2, 3.5F, 4, 5, 6});
  const TensorData halves = MakeTensor("halves", "BF16", {4}, {1, 2, 3, 4});
  const TensorData empty{"empty", "I64", {0, 7}, ""};
  auto file = SafeTensors::Open(dir.Write("a", SafeTensorsFile({floats, halves, empty})));
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->tensors().size(), 3U);
  EXPECT_EQ(file->Find("x.floats")->dtype, "F32");
  EXPECT_THAT(file->Find("x.floats")->shape, ElementsAre(2, 3));
  EXPECT_EQ(file->Find("empty")->bytes, 0U);
  for (const TensorData& tensor : {halves, floats, empty}) {  // out of order: each read seeks
    const auto bytes = file->Read(tensor.name);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    EXPECT_EQ(std::string(bytes->begin(), bytes->end()), tensor.bytes);
  }
}

TEST(SafeTensorsTest, ReadsARealFile) {
  auto file = SafeTensors::Open(KVSEEK_SOURCE_DIR "/tests/data/code8.layer15.kv1.safetensors");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT(file->Find("k")->shape, ElementsAre(7680, 128));
  EXPECT_EQ(file->Read("v")->size(), 7680U * 128U * 2U);
}

TEST(SafeTensorsTest, NamesWhatIsMissing) {
  const TempDir dir;
  const std::string path = dir.Write("a", SafeTensorsFile({MakeTensor("k", "F32", {1}, {1})}));
  auto file = SafeTensors::Open(path);
  ASSERT_TRUE(file.ok());
  EXPECT_EQ(file->Find("v").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(file->Read("v").status().message()), HasSubstr("\"v\""));
  EXPECT_EQ(SafeTensors::Open(dir.File("none")).status().code(), absl::StatusCode::kUnavailable);
}

TEST(SafeTensorsTest, RefusesBadHeaders) {
  ExpectRefused("", "shorter than 8 bytes");
  ExpectRefused("1234567", "shorter than 8 bytes");
  ExpectRefused(LittleEndian64(100) + "{}", "goes beyond the file");
  ExpectRefused(LittleEndian64(~uint64_t{0}) + "{}", "goes beyond the file");
  ExpectRefused(LittleEndian64(~uint64_t{0} - 7) + "{}", "goes beyond the file");
  ExpectRefused(RawFile("", ""), "not a JSON object");
  ExpectRefused(RawFile("{", ""), "not a JSON object");
  ExpectRefused(RawFile("[1]", ""), "not a JSON object");
  ExpectRefused(RawFile(std::string(100000, '['), ""), "not a JSON object");
  ExpectRefused(RawFile("{\"\xff\xfe\":1}", ""), "not a JSON object");
  ExpectRefused(RawFile(std::string(kSafeTensorsHeaderBytesMax + 1, ' '), ""), "over the limit");
  ExpectRefused(RawFile("{}", "trailing"), "belong to none");
}

TEST(SafeTensorsTest, RefusesBadEntries) {
  EXPECT_TRUE(OpenBytes(OneTensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})")).ok());
  ExpectRefused(OneTensor("7"), "tensor \"a\": is not an object");
  ExpectRefused(OneTensor(R"({"shape":[2],"data_offsets":[0,8]})"), "dtype is missing");
  ExpectRefused(OneTensor(R"({"dtype":5,"shape":[2],"data_offsets":[0,8]})"), "dtype");
  ExpectRefused(OneTensor(R"({"dtype":"X9","shape":[2],"data_offsets":[0,8]})"), "\"X9\"");
  ExpectRefused(OneTensor(R"({"dtype":"F32","data_offsets":[0,8]})"), "shape is missing");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), "shape has");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"), "shape has");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[[[[2]]]],"data_offsets":[0,8]})"),
                "shape has");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[2]})"), "data_offsets is missing");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0]})"), "data_offsets");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[2],"data_offsets":[-8,0]})"), "data_offsets");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), "end before");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[4],"data_offsets":[0,16]})"),
                "8 bytes of data");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"), "need 12");
}

TEST(SafeTensorsTest, RefusesOverflow) {
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[4611686018427387906],"data_offsets":[0,8]})"),
                "overflows");
  ExpectRefused(
      OneTensor(R"({"dtype":"U8","shape":[4294967296,4294967296,8],"data_offsets":[0,8]})"),
      "overflows");
  ExpectRefused(
      OneTensor(R"({"dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,16]})"),
      "end before");
  ExpectRefused(OneTensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0,99999999999999999999]})"),
                "data_offsets");
}

TEST(SafeTensorsTest, RefusesOverlapsHolesAndTwins) {
  const auto two = [](const std::string& a, const std::string& b, const std::string& second) {
    return RawFile(absl::StrCat(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)", a, R"(},")",
                                second, R"(":{"dtype":"U8","shape":[4],"data_offsets":)", b, "}}"),
                   "12345678");
  };
  EXPECT_TRUE(OpenBytes(two("[0,4]", "[4,8]", "b")).ok());
  EXPECT_TRUE(OpenBytes(two("[4,8]", "[0,4]", "b")).ok());
  ExpectRefused(two("[0,4]", "[2,6]", "b"), "\"b\": data_offsets overlap tensor \"a\"");
  ExpectRefused(two("[0,4]", "[0,4]", "b"), "overlap");
  ExpectRefused(two("[1,5]", "[5,9]", "b"), "tensor \"b\"");
  ExpectRefused(RawFile(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})", "12345678"),
                "hole");
  ExpectRefused(two("[0,4]", "[4,8]", "a"), "named twice");
}

}  // namespace
}  // namespace kvseek::cli
