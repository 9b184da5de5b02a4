// Moving rows in and out of a pool of pages, against plain loops.
#include "kernels/cuda/kv_pages.h"

#include <numeric>
#include <string>

#include "tests/kernels/cuda/cuda_fixture.h"

namespace kvseek::kernels::cuda {
namespace {

constexpr uint16_t kPoison = 0xffff;

struct Layout {
  int pages;
  int kv_heads;
  int page_tokens;
  int key_dim;
  int value_dim;

  size_t Rows() const { return static_cast<size_t>(pages) * kv_heads * page_tokens; }
  size_t Row(int slot, int head) const {
    return (static_cast<size_t>(slot / page_tokens) * kv_heads + head) * page_tokens +
           slot % page_tokens;
  }
};

class KvPagesTest : public CudaTest {
 protected:
  std::vector<uint16_t> RandomElements(size_t count) {
    std::vector<uint16_t> elements(count);
    for (uint16_t& element : elements) element = static_cast<uint16_t>(random_());
    return elements;
  }

  // Different slots, of which some are negative.
  std::vector<int32_t> RandomSlots(const Layout& layout, int count) {
    std::vector<int32_t> slots(static_cast<size_t>(layout.pages) * layout.page_tokens);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), random_);
    slots.resize(count);
    for (int32_t& slot : slots) {
      if (Below(6) == 0) slot = -1 - Below(100);
    }
    return slots;
  }

  void CheckScatter(const Layout& layout, int count, int token_stride, Place place) {
    const auto keys = RandomElements(static_cast<size_t>(count) * token_stride * layout.key_dim);
    const auto values =
        RandomElements(static_cast<size_t>(count) * token_stride * layout.value_dim);
    const auto slots = RandomSlots(layout, count);
    const DeviceArray<uint16_t> key_source(keys, place);
    const DeviceArray<uint16_t> value_source(values, place);
    const DeviceArray<int32_t> slot_source(slots, place);
    const DeviceArray<uint16_t> pool_keys(layout.Rows() * layout.key_dim);
    const DeviceArray<uint16_t> pool_values(layout.Rows() * layout.value_dim);
    const PagePool pool{pool_keys.get(), pool_values.get(), layout.kv_heads, layout.page_tokens,
                        layout.key_dim,  layout.value_dim,  DType::kFp16};
    EXPECT_CUDA(ScatterRows(key_source.get(), value_source.get(), slot_source.get(), count,
                            token_stride, pool, stream_));
    EXPECT_CUDA(cudaStreamSynchronize(stream_));
    std::vector<uint16_t> expected_keys(layout.Rows() * layout.key_dim, kPoison);
    std::vector<uint16_t> expected_values(layout.Rows() * layout.value_dim, kPoison);
    for (int i = 0; i < count; ++i) {
      if (slots[i] < 0) continue;
      for (int head = 0; head < layout.kv_heads; ++head) {
        const size_t from = static_cast<size_t>(i) * token_stride + head;
        const size_t to = layout.Row(slots[i], head);
        std::copy_n(keys.begin() + from * layout.key_dim, layout.key_dim,
                    expected_keys.begin() + to * layout.key_dim);
        std::copy_n(values.begin() + from * layout.value_dim, layout.value_dim,
                    expected_values.begin() + to * layout.value_dim);
      }
    }
    EXPECT_EQ(pool_keys.Download(), expected_keys);
    EXPECT_EQ(pool_values.Download(), expected_values);
  }

  void CheckPack(const Layout& layout, int count, int first_head, int heads, Place place) {
    const auto keys = RandomElements(layout.Rows() * layout.key_dim);
    const auto values = RandomElements(layout.Rows() * layout.value_dim);
    const auto slots = RandomSlots(layout, count);
    const DeviceArray<uint16_t> pool_keys(keys);
    const DeviceArray<uint16_t> pool_values(values);
    const DeviceArray<int32_t> slot_source(slots);
    const size_t rows = static_cast<size_t>(count) * heads;
    const DeviceArray<uint16_t> key_target(rows * layout.key_dim, place);
    const DeviceArray<uint16_t> value_target(rows * layout.value_dim, place);
    const PagePool pool{pool_keys.get(), pool_values.get(), layout.kv_heads, layout.page_tokens,
                        layout.key_dim,  layout.value_dim,  DType::kBf16};
    EXPECT_CUDA(PackRows(pool, slot_source.get(), count, first_head, heads, key_target.get(),
                         value_target.get(), stream_));
    EXPECT_CUDA(cudaStreamSynchronize(stream_));
    std::vector<uint16_t> expected_keys(rows * layout.key_dim, kPoison);
    std::vector<uint16_t> expected_values(rows * layout.value_dim, kPoison);
    for (int i = 0; i < count; ++i) {
      if (slots[i] < 0) continue;
      for (int head = 0; head < heads; ++head) {
        const size_t from = layout.Row(slots[i], first_head + head);
        const size_t to = static_cast<size_t>(i) * heads + head;
        std::copy_n(keys.begin() + from * layout.key_dim, layout.key_dim,
                    expected_keys.begin() + to * layout.key_dim);
        std::copy_n(values.begin() + from * layout.value_dim, layout.value_dim,
                    expected_values.begin() + to * layout.value_dim);
      }
    }
    EXPECT_EQ(key_target.Download(), expected_keys);
    EXPECT_EQ(value_target.Download(), expected_values);
  }
};

const Layout kLayouts[] = {
    {40, 3, 16, 128, 128}, {300, 1, 1, 64, 64}, {9, 2, 37, 8, 256}, {5, 8, 64, 80, 96}};

TEST_F(KvPagesTest, ScatterRows) {
  for (const Layout& layout : kLayouts) {
    for (const Place place : {Place::kDevice, Place::kPinnedHost}) {
      for (const int count : {0, 1, 7, 190}) {
        SCOPED_TRACE(std::to_string(count) + " into pages of " +
                     std::to_string(layout.page_tokens));
        CheckScatter(layout, count, layout.kv_heads, place);
        CheckScatter(layout, count, layout.kv_heads + 2, place);
      }
    }
  }
}

TEST_F(KvPagesTest, PackRows) {
  for (const Layout& layout : kLayouts) {
    for (const Place place : {Place::kDevice, Place::kPinnedHost}) {
      for (const int count : {0, 1, 7, 190}) {
        SCOPED_TRACE(std::to_string(count) + " from pages of " +
                     std::to_string(layout.page_tokens));
        CheckPack(layout, count, 0, layout.kv_heads, place);
        CheckPack(layout, count, layout.kv_heads - 1, 1, place);
        CheckPack(layout, count, layout.kv_heads / 2, (layout.kv_heads + 1) / 2, place);
      }
    }
  }
}

TEST_F(KvPagesTest, PackStrided) {
  struct Strides {
    int64_t token, head;
  };
  constexpr int kTokens = 61;
  constexpr int kHeads = 5;
  constexpr int kDim = 72;
  const auto source = RandomElements(size_t{400} * 1000);
  const DeviceArray<uint16_t> rows(source);
  // Tokens first, as in a fused projection's output, and heads first.
  for (const Strides& strides : {Strides{1000, 80}, Strides{72, 5000}, Strides{360, 72}}) {
    for (const Place place : {Place::kDevice, Place::kPinnedHost}) {
      const DeviceArray<uint16_t> out(size_t{kTokens} * kHeads * kDim, place);
      EXPECT_CUDA(PackStrided(rows.get() + 16, strides.token, strides.head, kTokens, kHeads, kDim,
                              out.get(), stream_));
      EXPECT_CUDA(cudaStreamSynchronize(stream_));
      std::vector<uint16_t> expected;
      for (int token = 0; token < kTokens; ++token) {
        for (int head = 0; head < kHeads; ++head) {
          const auto from = source.begin() + 16 + token * strides.token + head * strides.head;
          expected.insert(expected.end(), from, from + kDim);
        }
      }
      EXPECT_EQ(out.Download(), expected);
    }
  }
}

// Needs no GPU.
TEST(KvPagesArgumentsTest, Refused) {
  alignas(16) float memory[8] = {};
  auto* half = reinterpret_cast<char*>(memory) + 2;
  const auto* slots = reinterpret_cast<const int32_t*>(memory);
  const auto refused = cudaErrorInvalidValue;
  const PagePool good{memory, memory, 2, 16, 64, 64, DType::kBf16};
  PagePool bad = good;
  bad.value_dim = 60;

  EXPECT_EQ(ScatterRows(memory, memory, slots, -1, 2, good, nullptr), refused);
  EXPECT_EQ(ScatterRows(memory, memory, slots, 1, 1, good, nullptr), refused);
  EXPECT_EQ(ScatterRows(memory, half, slots, 1, 2, good, nullptr), refused);
  EXPECT_EQ(ScatterRows(nullptr, memory, slots, 1, 2, good, nullptr), refused);
  EXPECT_EQ(ScatterRows(memory, memory, nullptr, 1, 2, good, nullptr), refused);
  EXPECT_EQ(ScatterRows(memory, memory, slots, 1, 2, bad, nullptr), refused);
  EXPECT_EQ(ScatterRows(nullptr, nullptr, nullptr, 0, 2, good, nullptr), cudaSuccess);

  EXPECT_EQ(PackRows(good, slots, -1, 0, 2, memory, memory, nullptr), refused);
  EXPECT_EQ(PackRows(good, slots, 1, -1, 2, memory, memory, nullptr), refused);
  EXPECT_EQ(PackRows(good, slots, 1, 1, 2, memory, memory, nullptr), refused);
  EXPECT_EQ(PackRows(good, nullptr, 1, 0, 2, memory, memory, nullptr), refused);
  EXPECT_EQ(PackRows(good, slots, 1, 0, 2, half, memory, nullptr), refused);
  EXPECT_EQ(PackRows(bad, slots, 1, 0, 2, memory, memory, nullptr), refused);
  EXPECT_EQ(PackRows(good, nullptr, 0, 0, 2, nullptr, nullptr, nullptr), cudaSuccess);

  EXPECT_EQ(PackStrided(memory, 12, 8, 1, 1, 8, memory, nullptr), refused);
  EXPECT_EQ(PackStrided(memory, 8, 12, 1, 1, 8, memory, nullptr), refused);
  EXPECT_EQ(PackStrided(memory, 8, 8, -1, 1, 8, memory, nullptr), refused);
  EXPECT_EQ(PackStrided(memory, 8, 8, 1, 1, 12, memory, nullptr), refused);
  EXPECT_EQ(PackStrided(half, 8, 8, 1, 1, 8, memory, nullptr), refused);
  EXPECT_EQ(PackStrided(memory, 8, 8, 1, 1, 8, nullptr, nullptr), refused);
  EXPECT_EQ(PackStrided(nullptr, 8, 8, 0, 1, 8, nullptr, nullptr), cudaSuccess);
}

}  // namespace
}  // namespace kvseek::kernels::cuda
