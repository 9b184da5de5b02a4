#include "service/payload.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace kvseek::service {
namespace {

void Drop(size_t bytes, size_t count) {
  std::vector<Payload> payloads;
  for (size_t i = 0; i < count; ++i) payloads.push_back(MakePayload(bytes));
}

TEST(PayloadTest, IsAlignedAndWritableToItsEnd) {
  for (const size_t bytes : {size_t{0}, size_t{1}, kKeptLeast - 1, kKeptLeast, kKeptLeast + 1,
                             size_t{1} << 20, kKeptMost, kKeptMost + 1}) {
    const Payload payload = MakePayload(bytes);
    EXPECT_EQ(payload.bytes, bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(payload.data.get()) % 64, 0U);
    std::memset(payload.data.get(), 1, bytes);
  }
}

TEST(PayloadTest, MemoryOfAboutTheSizeIsUsedAgain) {
  const uint8_t* first = nullptr;
  {
    const Payload payload = MakePayload(3'000'000);
    first = payload.data.get();
  }
  const size_t spare = SparePayloadBytes();
  const Payload other_size = MakePayload(1'000'000);
  EXPECT_NE(other_size.data.get(), first);
  const Payload again = MakePayload(4'000'000);
  EXPECT_EQ(again.data.get(), first);
  EXPECT_LT(SparePayloadBytes(), spare);
}

TEST(PayloadTest, WhatIsKeptIsBounded) {
  Drop(size_t{4} << 20, 2 * kSparePayloads / (size_t{4} << 20));
  EXPECT_EQ(SparePayloadBytes(), kSparePayloads);
  Drop(kKeptLeast - 1, 10);
  Drop(kKeptMost + 1, 2);
  EXPECT_EQ(SparePayloadBytes(), kSparePayloads);
}

TEST(PayloadTest, SizesThatAreNotUsedAnyMoreMakeRoom) {
  Drop(kKeptMost, kSparePayloads / kKeptMost);
  EXPECT_EQ(SparePayloadBytes(), kSparePayloads);
  const uint8_t* first = nullptr;
  {
    const Payload payload = MakePayload(kKeptLeast);
    first = payload.data.get();
  }
  EXPECT_LE(SparePayloadBytes(), kSparePayloads);
  EXPECT_EQ(MakePayload(kKeptLeast).data.get(), first);
}

}  // namespace
}  // namespace kvseek::service
