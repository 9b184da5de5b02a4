#include "proto/status_code.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

namespace kvseek::proto {
namespace {

// Over the wire and back, as bytes.
absl::Status Travel(const absl::Status& status) {
  std::string bytes;
  EXPECT_TRUE(ToError(status).SerializeToString(&bytes));
  Error error;
  EXPECT_TRUE(error.ParseFromString(bytes));
  return FromError(error);
}

TEST(StatusCodeTest, FieldErrorNamesItsField) {
  const absl::Status status =
      FieldError(absl::StatusCode::kInvalidArgument, "items[1].layer", "7, of 4");
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "items[1].layer: 7, of 4");
  EXPECT_EQ(ErrorField(status), "items[1].layer");
  EXPECT_EQ(RetryAfterMs(status), 0U);
}

TEST(StatusCodeTest, NoFieldNoPrefix) {
  const absl::Status status = FieldError(absl::StatusCode::kNotFound, "", "gone");
  EXPECT_EQ(status.message(), "gone");
  EXPECT_EQ(ErrorField(status), "");
}

TEST(StatusCodeTest, ExhaustedTellsWhenToComeAgain) {
  const absl::Status status = Exhausted("queue", "full", 50);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(), "queue: full");
  EXPECT_EQ(ErrorField(status), "queue");
  EXPECT_EQ(RetryAfterMs(status), 50U);
}

TEST(StatusCodeTest, PlainStatusHasNoDetails) {
  EXPECT_EQ(ErrorField(absl::InternalError("x")), "");
  EXPECT_EQ(RetryAfterMs(absl::InternalError("x")), 0U);
  EXPECT_EQ(ErrorField(absl::OkStatus()), "");
  EXPECT_EQ(RetryAfterMs(absl::OkStatus()), 0U);
}

TEST(StatusCodeTest, EveryCodeTravelsWithAllItsDetails) {
  for (int code = 1; code <= 16; ++code) {
    const auto expected = static_cast<absl::StatusCode>(code);
    const absl::Status field_only = FieldError(expected, "shape.layers", "too many");
    EXPECT_EQ(Travel(field_only), field_only) << field_only;
    EXPECT_EQ(ToError(field_only).code(), static_cast<uint32_t>(code));
    EXPECT_EQ(Travel(absl::Status(expected, "")), absl::Status(expected, ""));
  }
  const absl::Status exhausted =
      Exhausted("memory", "none left", std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(Travel(exhausted), exhausted);
  EXPECT_EQ(RetryAfterMs(Travel(exhausted)), std::numeric_limits<uint64_t>::max());
}

TEST(StatusCodeTest, CodesAreThoseOfGrpc) {
  EXPECT_EQ(ToError(absl::CancelledError("")).code(), 1U);
  EXPECT_EQ(ToError(absl::InvalidArgumentError("")).code(), 3U);
  EXPECT_EQ(ToError(absl::ResourceExhaustedError("")).code(), 8U);
  EXPECT_EQ(ToError(absl::UnauthenticatedError("")).code(), 16U);
}

TEST(StatusCodeTest, StrangeCodesAreErrorsToo) {
  for (const uint32_t code : {0U, 17U, 1000U, std::numeric_limits<uint32_t>::max()}) {
    Error error;
    error.set_code(code);
    error.set_message("m");
    error.set_field("f");
    const absl::Status status = FromError(error);
    EXPECT_EQ(status.code(), absl::StatusCode::kUnknown) << code;
    EXPECT_EQ(status.message(), "m");
    EXPECT_EQ(ErrorField(status), "f");
  }
}

TEST(StatusCodeTest, MessageOfAnotherImplementationIsKeptAsItIs) {
  Error error;
  error.set_code(5);
  error.set_message("no such session");
  error.set_field("session");
  EXPECT_EQ(FromError(error).message(), "no such session");
  EXPECT_EQ(ErrorField(FromError(error)), "session");
}

TEST(StatusCodeTest, TextThatIsNotUtf8StillArrives) {
  const std::string good = "\x7f \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 \xf4\x8f\xbf\xbf";
  EXPECT_EQ(Travel(absl::InternalError(good)).message(), good);
  EXPECT_EQ(Travel(absl::InternalError("a\xff\x80z")).message(), "a??z");
  EXPECT_EQ(Travel(absl::InternalError("\xc3")).message(), "?");
  EXPECT_EQ(Travel(absl::InternalError("\xc0\xaf")).message(), "??") << "overlong";
  EXPECT_EQ(Travel(absl::InternalError("\xe0\x80\xaf")).message(), "???") << "overlong";
  EXPECT_EQ(Travel(absl::InternalError("\xed\xa0\x80")).message(), "???") << "surrogate";
  EXPECT_EQ(Travel(absl::InternalError("\xf4\x90\x80\x80")).message(), "????") << "too large";
  const absl::Status field = FieldError(absl::StatusCode::kNotFound, "n\xfe", "x");
  EXPECT_EQ(ErrorField(Travel(field)), "n?");
}

TEST(StatusCodeTest, LongTextsAreCutBetweenCharacters) {
  const std::string euro = "\xe2\x82\xac";
  std::string text;
  while (text.size() <= kErrorMessageBytesMax) text += euro;
  const absl::Status travelled = Travel(absl::InternalError(text));
  EXPECT_EQ(travelled.message().size(), kErrorMessageBytesMax / euro.size() * euro.size());
  const std::string field(kErrorFieldBytesMax + 1, 'f');
  EXPECT_EQ(ErrorField(Travel(FieldError(absl::StatusCode::kInternal, field, ""))).size(),
            kErrorFieldBytesMax);
}

}  // namespace
}  // namespace kvseek::proto
