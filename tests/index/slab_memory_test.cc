#include "index/slab_memory.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <set>
#include <thread>
#include <vector>

namespace kvseek::index {
namespace {

TEST(SlabMemory, SlotsAreAlignedApartAndWritable) {
  const size_t before = SlabBytes();
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{65}, size_t{700'001}, size_t{8} << 20,
                             (size_t{8} << 20) + 1, size_t{40} << 20}) {
    std::vector<Slot> slots;
    for (int i = 0; i < 5; ++i) {
      slots.push_back(MakeSlot(bytes));
      EXPECT_EQ(reinterpret_cast<uintptr_t>(slots.back().get()) % 64, 0U);
      std::memset(slots.back().get(), i, bytes);
    }
    for (int i = 0; i < 5; ++i) {
      for (size_t at = 0; at < bytes; at += 4099) {
        ASSERT_EQ(slots[static_cast<size_t>(i)][at], static_cast<std::byte>(i)) << bytes;
      }
    }
  }
  EXPECT_EQ(SlabBytes(), before) << "empty slabs go back";
}

TEST(SlabMemory, ManySlotsShareASlabAndItGoesBackWithTheLast) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "each slot is an allocation of its own here";
#endif
  const size_t before = SlabBytes();
  std::vector<Slot> slots;
  for (int i = 0; i < 40; ++i) slots.push_back(MakeSlot(700'000));
  const size_t one = SlabBytes() - before;
  EXPECT_GE(one, size_t{40} * 700'000);
  EXPECT_LT(one, size_t{60} * 700'000);
  for (int i = 0; i < 40; ++i) slots.push_back(MakeSlot(700'000));
  EXPECT_EQ(SlabBytes() - before, 2 * one);
  // Freed places are used again before new slabs are.
  slots.erase(slots.begin() + 10, slots.begin() + 30);
  for (int i = 0; i < 20; ++i) slots.push_back(MakeSlot(700'000));
  EXPECT_EQ(SlabBytes() - before, 2 * one);
  slots.clear();
  EXPECT_EQ(SlabBytes(), before);
}

TEST(SlabMemory, SlotsTakenInARowBeginInPagesOfTheirOwn) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "each slot is an allocation of its own here";
#endif
  constexpr size_t kPages = kSlabBytes >> 21;
  std::vector<Slot> slots;
  std::set<uintptr_t> pages;
  for (size_t i = 0; i < kPages; ++i) {
    slots.push_back(MakeSlot(701'000));  // nobody else's size
    pages.insert(reinterpret_cast<uintptr_t>(slots.back().get()) >> 21);
  }
  EXPECT_EQ(pages.size(), kPages);
}

TEST(SlabMemory, SpareSlabsStayAndServeAnySize) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "each slot is an allocation of its own here";
#endif
  const size_t before = SlabBytes();
  EXPECT_FALSE(AddSpareSlab()) << "none may stay";
  KeepSlabs(before + 3 * kSlabBytes + kSlabBytes / 2);
  int added = 0;
  while (AddSpareSlab()) ++added;
  EXPECT_EQ(added, 3);
  EXPECT_EQ(SlabBytes(), before + 3 * kSlabBytes);
  for (const size_t bytes : {size_t{5} << 20, size_t{600'000}}) {
    std::vector<Slot> slots;
    while (slots.size() * bytes < 3 * kSlabBytes / 2) slots.push_back(MakeSlot(bytes));
    for (const Slot& slot : slots) std::memset(slot.get(), 1, bytes);
    EXPECT_EQ(SlabBytes(), before + 3 * kSlabBytes) << bytes;
  }
  {  // more than may stay: it goes when it is empty
    std::vector<Slot> slots;
    for (int i = 0; i < 5 * 4; ++i) slots.push_back(MakeSlot(size_t{8} << 20));
    EXPECT_EQ(SlabBytes(), before + 5 * kSlabBytes);
  }
  EXPECT_EQ(SlabBytes(), before + 3 * kSlabBytes);
  KeepSlabs(before + kSlabBytes);
  EXPECT_EQ(SlabBytes(), before + kSlabBytes);
  KeepSlabs(0);
  EXPECT_EQ(SlabBytes(), before);
}

TEST(SlabMemory, ThreadsTakeAndGiveAtOnce) {
  const size_t before = SlabBytes();
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      std::mt19937 random(t);
      std::vector<Slot> slots;
      for (int i = 0; i < 2000; ++i) {
        if (slots.size() < 8 || (slots.size() < 60 && random() % 2 == 0)) {
          const size_t bytes = random() % 2 == 0 ? 300'000 : 700'000;
          slots.push_back(MakeSlot(bytes));
          std::memset(slots.back().get(), static_cast<int>(t), 128);
        } else {
          const size_t at = random() % slots.size();
          ASSERT_EQ(slots[at][127], static_cast<std::byte>(t));
          std::swap(slots[at], slots.back());
          slots.pop_back();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(SlabBytes(), before);
}

}  // namespace
}  // namespace kvseek::index
