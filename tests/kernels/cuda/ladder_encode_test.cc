// The GPU's codes against those of index::Segment: every byte. Needs a GPU, but for the checks of
// arguments.
#include "kernels/cuda/ladder_encode.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "index/segment.h"
#include "kernels/cpu/rotation.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/ladder_reference.h"

namespace kvseek::kernels::cuda {
namespace {

static_assert(kSegmentKeys == index::kSegmentTokens);

constexpr int kBlocks = kSegmentKeys / kScanBlock;

/// (heads, tokens, dim) hard rows. Segment 0 of head 0 has equal rows; in the last segment rows
/// come in pairs v, -v, so that its centre is 0, and a quarter of them are zeros of both signs:
/// keys without a residual, none with one and some with one.
std::vector<uint16_t> Rows(uint32_t seed, int heads, int tokens, int dim, DType dtype) {
  std::vector<uint16_t> rows = reference::HardRows(seed, heads * tokens, dim, dtype);
  const auto d = static_cast<size_t>(dim);
  std::fill_n(rows.begin(), kSegmentKeys * d, dtype == DType::kBf16 ? FloatToBf16(-1.5F) : 0xbe00U);
  for (size_t t = rows.size() / d - kSegmentKeys; t < rows.size() / d; t += 2) {
    for (size_t i = 0; i < d; ++i) {
      if (t / 2 % 4 == 1) rows[t * d + i] = i % 2 == 0 ? 0 : 0x8000U;
      rows[(t + 1) * d + i] = rows[t * d + i] ^ 0x8000U;
    }
  }
  return rows;
}

struct Shape {
  int key_dim;
  int value_dim;
  DType dtype;
  int scan_bits;
  bool by_token;  // a prefill tensor (tokens, heads, dim), else (heads, tokens, dim)
};

template <typename T>
void ExpectSame(const char* name, const std::vector<T>& actual, size_t at, const T* expected,
                size_t count) {
  ASSERT_LE((at + 1) * count, actual.size()) << name;
  const auto* a = reinterpret_cast<const uint8_t*>(actual.data() + at * count);
  const auto* b = reinterpret_cast<const uint8_t*>(expected);
  for (size_t i = 0; i < count * sizeof(T); ++i) {
    ASSERT_EQ(int{a[i]}, int{b[i]})
        << name << ", segment " << at << ", byte " << i << " of " << count * sizeof(T);
  }
}

class LadderEncodeTest : public CudaTest {
 protected:
  /// (heads, tokens, dim) as the tensor that the GPU reads.
  static std::vector<uint16_t> Tensor(const std::vector<uint16_t>& rows, int heads, int tokens,
                                      int dim, bool by_token) {
    if (!by_token) return rows;
    std::vector<uint16_t> tensor(rows.size());
    for (int h = 0; h < heads; ++h) {
      for (int t = 0; t < tokens; ++t) {
        std::memcpy(tensor.data() + (t * heads + h) * dim, rows.data() + (h * tokens + t) * dim,
                    static_cast<size_t>(dim) * sizeof(uint16_t));
      }
    }
    return tensor;
  }

  void Check(const Shape& shape, int heads, int segments) {
    SCOPED_TRACE("key_dim " + std::to_string(shape.key_dim) + ", value_dim " +
                 std::to_string(shape.value_dim) + ", " + DTypeName(shape.dtype) + ", scan_bits " +
                 std::to_string(shape.scan_bits) + (shape.by_token ? ", by token" : ""));
    const int tokens = segments * kSegmentKeys;
    const auto seed = static_cast<uint32_t>(random_());
    const auto keys = Rows(seed, heads, tokens, shape.key_dim, shape.dtype);
    const auto values = Rows(seed + 1, heads, tokens, shape.value_dim, shape.dtype);
    const DeviceArray<uint16_t> device_keys(
        Tensor(keys, heads, tokens, shape.key_dim, shape.by_token));
    const DeviceArray<uint16_t> device_values(
        Tensor(values, heads, tokens, shape.value_dim, shape.by_token));
    const auto stride = [&](int dim, bool of_tokens) {
      return int64_t{dim} * (shape.by_token ? (of_tokens ? heads : 1) : (of_tokens ? 1 : tokens));
    };
    const LadderRows rows{.keys = device_keys.get(),
                          .values = device_values.get(),
                          .heads = heads,
                          .segments = segments,
                          .key_dim = shape.key_dim,
                          .value_dim = shape.value_dim,
                          .dtype = shape.dtype,
                          .key_token_stride = stride(shape.key_dim, true),
                          .key_head_stride = stride(shape.key_dim, false),
                          .value_token_stride = stride(shape.value_dim, true),
                          .value_head_stride = stride(shape.value_dim, false),
                          .scan_bits = shape.scan_bits};
    const int padded = PaddedDim(shape.key_dim);
    const auto all = static_cast<size_t>(heads * segments);
    const auto key_dim = static_cast<size_t>(shape.key_dim);
    const auto scan_bytes =
        static_cast<size_t>(kBlocks * ScanBlockBytes(Symbols(padded), shape.scan_bits));
    const auto fine_bytes =
        static_cast<size_t>(kSegmentKeys * FineRecordBytes(padded, shape.value_dim));
    const auto mean_count = static_cast<size_t>(kBlocks * shape.value_dim);
    const DeviceArray<float> centres(all * key_dim);
    const DeviceArray<uint8_t> scan_blocks(all * scan_bytes);
    const DeviceArray<float> scan_noise(all);
    const DeviceArray<uint8_t> fine_records(all * fine_bytes);
    const DeviceArray<FineFactors> fine_factors(all * kSegmentKeys);
    const DeviceArray<uint16_t> block_means(all * mean_count);
    const DeviceArray<uint8_t> scratch(EncodeLadderScratchBytes(rows));
    const LadderCodes codes{.centres = centres.get(),
                            .scan_blocks = scan_blocks.get(),
                            .scan_noise = scan_noise.get(),
                            .fine_records = fine_records.get(),
                            .fine_factors = fine_factors.get(),
                            .block_means = block_means.get()};
    ASSERT_CUDA(EncodeLadder(rows, codes, scratch.get(), stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));

    const auto host_centres = centres.Download();
    const auto host_scan = scan_blocks.Download();
    const auto host_noise = scan_noise.Download();
    const auto host_records = fine_records.Download();
    const auto host_factors = fine_factors.Download();
    const auto host_means = block_means.Download();
    const index::KvShape kv{.key_dim = shape.key_dim,
                            .value_dim = shape.value_dim,
                            .dtype = shape.dtype,
                            .softmax_scale = 1.0F,
                            .scan_bits = shape.scan_bits};
    for (size_t s = 0; s < all; ++s) {
      const auto segment = index::Segment::Build(
          kv, keys.data() + s * kSegmentKeys * key_dim,
          values.data() + s * kSegmentKeys * static_cast<size_t>(shape.value_dim));
      const float noise = segment->scan_noise();
      ExpectSame("centre", host_centres, s, segment->centre(), key_dim);
      ExpectSame("scan_blocks", host_scan, s, segment->scan_blocks(), scan_bytes);
      ExpectSame("scan_noise", host_noise, s, &noise, 1);
      ExpectSame("fine_records", host_records, s, segment->fine_records(), fine_bytes);
      ExpectSame("fine_factors", host_factors, s, segment->fine_factors(), kSegmentKeys);
      ExpectSame("block_means", host_means, s, segment->block_means(), mean_count);
    }
  }
};

TEST_F(LadderEncodeTest, SameBytesAsASegment) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (const int scan_bits : {1, 2}) {
      for (const int dim : {64, 80, 128, 256}) Check({dim, dim, dtype, scan_bits, true}, 3, 2);
    }
  }
}

TEST_F(LadderEncodeTest, SameBytesAtUnequalDims) {
  const int dims[][2] = {{8, 8}, {40, 24}, {64, 256}, {120, 248}, {192, 128}, {256, 8}};
  for (const auto& [key_dim, value_dim] : dims) {
    Check({key_dim, value_dim, DType::kBf16, 2, Below(2) == 0}, 1, 3);
    Check({key_dim, value_dim, DType::kFp16, 1, Below(2) == 0}, 2, 1);
  }
}

TEST_F(LadderEncodeTest, ManySegments) { Check({128, 128, DType::kBf16, 2, true}, 8, 5); }

// ---- Arguments ----------------------------------------------------------------------------------

class LadderEncodeArgumentsTest : public testing::Test {
 protected:
  /// Never reaches the device.
  template <typename Change>
  cudaError_t Encode(Change change) {
    LadderRows rows{.keys = memory_,
                    .values = memory_,
                    .heads = 1,
                    .segments = 1,
                    .key_dim = 64,
                    .value_dim = 64,
                    .key_token_stride = 64,
                    .value_token_stride = 64};
    LadderCodes codes{.centres = reinterpret_cast<float*>(memory_),
                      .scan_blocks = memory_,
                      .scan_noise = reinterpret_cast<float*>(memory_),
                      .fine_records = memory_,
                      .fine_factors = reinterpret_cast<FineFactors*>(memory_),
                      .block_means = reinterpret_cast<uint16_t*>(memory_)};
    void* scratch = memory_;
    change(rows, codes, scratch);
    return EncodeLadder(rows, codes, scratch, nullptr);
  }

  alignas(16) uint8_t memory_[64] = {};
};

TEST_F(LadderEncodeArgumentsTest, Refuses) {
  using Rows = LadderRows&;
  using Codes = LadderCodes&;
  const auto refused = cudaErrorInvalidValue;
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.heads = -1; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.heads = kMaxEncodeHeads + 1; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.segments = -1; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.segments = kMaxEncodeSegments + 1; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.key_dim = 0; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.key_dim = 260; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.value_dim = 264; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.dtype = DType::kFp32; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.scan_bits = 3; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.key_token_stride = 68; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.value_head_stride = 4; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.keys = nullptr; }), refused);
  EXPECT_EQ(Encode([this](Rows r, Codes, void*&) { r.values = memory_ + 2; }), refused);
  EXPECT_EQ(Encode([](Rows, Codes c, void*&) { c.centres = nullptr; }), refused);
  EXPECT_EQ(Encode([](Rows, Codes c, void*&) { c.fine_records = nullptr; }), refused);
  EXPECT_EQ(Encode([](Rows, Codes, void*& scratch) { scratch = nullptr; }), refused);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.segments = 0; }), cudaSuccess);
  EXPECT_EQ(Encode([](Rows r, Codes, void*&) { r.heads = 0; }), cudaSuccess);
}

}  // namespace
}  // namespace kvseek::kernels::cuda
