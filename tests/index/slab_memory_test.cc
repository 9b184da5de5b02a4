#include "index/slab_memory.h"

#include <gtest/gtest.h>
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
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

/// Where the system has been asked to put a slot; false: it does not tell.
bool AskedFor(const Slot& slot, int& mode, unsigned long& nodes) {  // NOLINT(google-runtime-int)
  std::array<unsigned long, 16> mask{};                             // NOLINT(google-runtime-int)
  if (syscall(SYS_get_mempolicy, &mode, mask.data(), 1025, slot.get(), MPOL_F_ADDR) != 0) {
    return false;
  }
  nodes = mask[0];
  return true;
}

TEST(SlabMemory, SlabsLieOnTheirNode) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "each slot is an allocation of its own here";
#endif
  constexpr size_t kBytes = 690'000;
  const size_t before = SlabBytes();
  {
    int mode = -1;
    unsigned long nodes = 0;  // NOLINT(google-runtime-int)
    const Slot anywhere = MakeSlot(kBytes);
    if (!AskedFor(anywhere, mode, nodes)) GTEST_SKIP() << "no get_mempolicy here";
    EXPECT_EQ(mode, MPOL_DEFAULT);
    if (!PlaceSlabs({0})) {
      PlaceSlabs({});
      GTEST_SKIP() << "no mbind here";
    }
    KeepSlabs(before + 4 * kSlabBytes);
    ASSERT_TRUE(AddSpareSlab(0));  // of a size that is not there yet
    const Slot spare = MakeSlot(kBytes + 100);
    const Slot beyond = MakeSlot(kBytes, 1);  // of no node that was named
    PlaceSlabs({5, 0});                       // of the system's 0, whatever its number here
    const Slot placed = MakeSlot(kBytes + 200, 1);
    for (const Slot* slot : {&spare, &placed}) {
      std::memset(slot->get(), 1, kBytes);
      ASSERT_TRUE(AskedFor(*slot, mode, nodes));
      EXPECT_EQ(mode, MPOL_PREFERRED);
      EXPECT_EQ(nodes, 1U);
      int lies_on = -1;
      ASSERT_EQ(
          syscall(SYS_get_mempolicy, &lies_on, nullptr, 0, slot->get(), MPOL_F_NODE | MPOL_F_ADDR),
          0);
      EXPECT_EQ(lies_on, 0);
    }
    ASSERT_TRUE(AskedFor(beyond, mode, nodes));
    EXPECT_EQ(mode, MPOL_DEFAULT);
    EXPECT_EQ(SlabBytes(0) + SlabBytes(1), SlabBytes());
    EXPECT_EQ(SlabBytes(1), 2 * kSlabBytes);
  }
  KeepSlabs(0);
  PlaceSlabs({});
  EXPECT_EQ(SlabBytes(), before);
  EXPECT_EQ(SlabBytes(1), 0U);
}

TEST(SlabMemory, ANodeThatIsNotThereIsToldOfAndDoesNoHarm) {
  EXPECT_FALSE(PlaceSlabs({1023}));
  EXPECT_FALSE(PlaceSlabs({-1}));
  EXPECT_FALSE(PlaceSlabs({1 << 20}));
  const Slot slot = MakeSlot(695'000);
  std::memset(slot.get(), 1, 695'000);
  EXPECT_TRUE(PlaceSlabs({}));
}

TEST(SlabMemory, SpareSlabsServeTheirNodeAndMakeRoomForOthers) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "each slot is an allocation of its own here";
#endif
  const size_t before = SlabBytes();
  const size_t on_one = SlabBytes(1);
  KeepSlabs(before + 3 * kSlabBytes);
  for (const int node : {0, 1, 1}) ASSERT_TRUE(AddSpareSlab(node));
  {
    const Slot first = MakeSlot(685'000, 1);  // has its node's spare slab
    EXPECT_EQ(SlabBytes(), before + 3 * kSlabBytes);
    EXPECT_EQ(SlabBytes(1), on_one + 2 * kSlabBytes);
    const Slot second = MakeSlot(686'000, 0);
    const Slot third = MakeSlot(687'000, 0);  // has a new one, and node 1's spare one goes
    EXPECT_EQ(SlabBytes(), before + 3 * kSlabBytes);
    EXPECT_EQ(SlabBytes(1), on_one + kSlabBytes);
  }
  EXPECT_EQ(SlabBytes(), before + 3 * kSlabBytes);
  KeepSlabs(0);
  EXPECT_EQ(SlabBytes(), before);
  EXPECT_EQ(SlabBytes(1), on_one);
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
