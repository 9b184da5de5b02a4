#include "kernels/cpu/ladder_codes.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/rotation.h"
#include "tests/kernels/ladder_reference.h"
#include "tests/kernels/reference.h"
#include "tests/kernels/simd_level_fixture.h"

namespace kvseek::kernels {
namespace {

using LadderCodesTest = SimdLevelTest;

INSTANTIATE_TEST_SUITE_P(Levels, LadderCodesTest, testing::ValuesIn(SupportedSimdLevels()),
                         LevelName);

/// Keys whose levels are far from every boundary.
std::vector<float> GoldenResiduals() {
  std::vector<float> residuals;
  for (int key = 0; key < 64; ++key) {
    for (int i = 0; i < 64; ++i) {
      const int level = (i * 37 + i / 32 * 5 + key * 11) % 16;
      residuals.push_back(static_cast<float>(level) - 7.5F);
    }
  }
  return residuals;
}

std::vector<uint8_t> KeyBytes(const std::vector<uint8_t>& block, int rows, int key) {
  std::vector<uint8_t> bytes;
  for (int row = 0; row < rows; ++row) bytes.push_back(block[static_cast<size_t>(row * 64 + key)]);
  return bytes;
}

// The layout is stored in snapshots: these bytes never change.
TEST_P(LadderCodesTest, GoldenScanBlock) {
  const std::vector<float> residuals = GoldenResiduals();
  std::vector<uint8_t> block(static_cast<size_t>(ScanBlockBytes(11, 2)));
  ASSERT_EQ(block.size(), 20U * 64U);
  EncodeScanBlocks(residuals.data(), 1, 64, 2, block.data());
  EXPECT_THAT(KeyBytes(block, 18, 0),
              testing::ElementsAre(0xec, 0x8d, 0x49, 0x93, 0x1a, 0x5b, 0x36, 0x26, 0x4, 0x9a, 0x6b,
                                   0xe4, 0x4a, 0xb5, 0x16, 0x2d, 0x15, 0x2));
  EXPECT_THAT(KeyBytes(block, 18, 63),
              testing::ElementsAre(0x76, 0xe6, 0xa4, 0x49, 0xad, 0xd, 0x1b, 0x13, 0x2, 0xed, 0x95,
                                   0x52, 0x25, 0x58, 0xab, 0x36, 0xa, 0x9));
  EXPECT_EQ(block[18 * 64 + 2 * 63], 0x9a);
  EXPECT_EQ(block[18 * 64 + 2 * 63 + 1], 0x40);
  EncodeScanBlocks(residuals.data(), 1, 64, 1, block.data());
  EXPECT_THAT(KeyBytes(block, 9, 5),
              testing::ElementsAre(0x12, 0x76, 0xa6, 0x6d, 0xe5, 0x2c, 0x9, 0x1b, 0x3));
  EXPECT_EQ(block[9 * 64 + 2 * 5], 0xaa);
  EXPECT_EQ(block[9 * 64 + 2 * 5 + 1], 0x40);
}

TEST_P(LadderCodesTest, GoldenFineRecord) {
  const std::vector<float> residuals = GoldenResiduals();
  std::vector<uint16_t> values;
  for (const float v : {-1.0F, 0.0F, 1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 14.0F}) {
    values.push_back(FloatToBf16(v));
  }
  std::vector<uint8_t> record(64, 0xee);
  ASSERT_EQ(FineRecordBytes(64, 8), 64);
  FineFactors factors;
  EncodeFine(residuals.data() + 3 * 64, values.data(), DType::kBf16, 1, 64, 8, record.data(),
             &factors);
  EXPECT_THAT(std::vector<uint8_t>(record.begin(), record.begin() + 32),
              testing::ElementsAre(0x73, 0xa7, 0x3a, 0x63, 0x96, 0xc9, 0x5c, 0x85, 0xc8, 0x5c, 0x85,
                                   0xb8, 0x4b, 0x74, 0xa7, 0x3a, 0x73, 0xa7, 0x3a, 0x63, 0x96, 0xc9,
                                   0x5c, 0x85, 0xc8, 0x5c, 0x85, 0xb8, 0x4b, 0x74, 0xa7, 0x3a));
  EXPECT_THAT(std::vector<uint8_t>(record.begin() + 32, record.begin() + 36),
              testing::ElementsAre(0x40, 0x51, 0x62, 0xf3));
  EXPECT_THAT(std::vector<uint8_t>(record.begin() + 36, record.end()), testing::Each(0));
  EXPECT_NEAR(factors.gain, 4.7398122F, 1e-5F);
  EXPECT_EQ(factors.lo, FloatToBf16(-1.0F));
  EXPECT_EQ(factors.step, FloatToBf16(1.0F));
}

TEST_P(LadderCodesTest, ScanBlocksMatchTheReference) {
  for (const int dim : {64, 128, 256, 512}) {
    for (const int planes : {1, 2}) {
      SCOPED_TRACE(std::to_string(dim) + " dimensions, planes " + std::to_string(planes));
      const int blocks = 3;
      const int symbols = Symbols(dim);
      std::vector<float> residuals =
          reference::RandomFloats(7, static_cast<size_t>(blocks * 64 * dim), 3.0F);
      std::fill_n(residuals.begin() + 5 * dim, dim,
                  0.0F);                                     // key 5 has no residual
      residuals[static_cast<size_t>(9 * dim + 1)] = 800.0F;  // key 9 has one large dimension
      std::vector<uint8_t> codes(static_cast<size_t>(blocks * ScanBlockBytes(symbols, planes)));
      const float noise = EncodeScanBlocks(residuals.data(), blocks, dim, planes, codes.data());
      double noise_sum = 0.0;
      for (int key = 0; key < blocks * 64; ++key) {
        const uint8_t* block = codes.data() + key / 64 * ScanBlockBytes(symbols, planes);
        const auto expected = reference::ScanCode(residuals.data() + key * dim, dim, planes);
        const auto stored = reference::StoredScanPoint(block, dim, planes, key % 64);
        for (size_t i = 0; i < stored.size(); ++i) {
          if (expected.doubtful[i]) continue;
          ASSERT_NEAR(stored[i], expected.point[i], 1e-9) << key << ' ' << i;
        }
        ASSERT_NEAR(reference::StoredGain(block, symbols, planes, key % 64), expected.gain,
                    expected.gain / 250.0)
            << key;
        const int last = reference::StoredSymbol(block, symbols, 0, symbols - 1, key % 64);
        ASSERT_LT(last, 1 << (dim - 6 * (symbols - 1))) << "bits past the last dimension";
        noise_sum += expected.noise;
      }
      EXPECT_NEAR(noise, noise_sum / (blocks * 64 - 1), 1e-4);
    }
  }
}

TEST_P(LadderCodesTest, FineRecordsMatchTheReference) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (const int dim : {64, 128, 512}) {
      for (const int value_dim : {8, 24, 40, 80, 128, 512}) {
        SCOPED_TRACE(std::to_string(dim) + " and " + std::to_string(value_dim));
        const int count = 37;
        std::vector<float> residuals =
            reference::RandomFloats(8, static_cast<size_t>(count * dim), 0.1F);
        std::vector<uint16_t> values =
            reference::RandomElements(9, static_cast<size_t>(count * value_dim), 2.0F, dtype);
        std::fill_n(values.begin() + 4 * value_dim, value_dim, reference::Round(-2.5F, dtype));
        std::fill_n(values.begin() + 6 * value_dim, value_dim, reference::Round(0.0F, dtype));
        std::fill_n(residuals.begin() + 8 * dim, dim, 0.0F);
        const int record_bytes = FineRecordBytes(dim, value_dim);
        std::vector<uint8_t> records(static_cast<size_t>(count * record_bytes), 0xee);
        std::vector<FineFactors> factors(static_cast<size_t>(count));
        EncodeFine(residuals.data(), values.data(), dtype, count, dim, value_dim, records.data(),
                   factors.data());
        std::vector<float> decoded(static_cast<size_t>(value_dim));
        for (int t = 0; t < count; ++t) {
          const uint8_t* record = records.data() + t * record_bytes;
          const FineFactors& f = factors[static_cast<size_t>(t)];
          const auto expected = reference::FineCode(residuals.data() + t * dim, dim);
          const auto stored = reference::StoredFinePoint(record, dim);
          for (size_t i = 0; i < stored.size(); ++i) {
            if (expected.doubtful[i]) continue;
            ASSERT_NEAR(stored[i], expected.point[i], 1e-6) << t << ' ' << i;
          }
          ASSERT_NEAR(static_cast<double>(f.gain), expected.gain, expected.gain * 1e-4) << t;
          DecodeFineValue(record, FineValueOffset(dim), f, value_dim, decoded.data());
          const float step = Bf16ToFloat(f.step);
          if (t == 4 || t == 6) {
            EXPECT_EQ(step, 0.0F) << "a constant row";
          }
          for (int i = 0; i < value_dim; ++i) {
            const float value =
                LoadElement(values.data(), dtype, static_cast<size_t>(t * value_dim + i));
            ASSERT_NEAR(decoded[static_cast<size_t>(i)], value, 0.5001F * step) << t << ' ' << i;
            ASSERT_LE(Bf16ToFloat(f.lo), value);
          }
          for (int i = dim / 2 + value_dim / 2; i < record_bytes; ++i) ASSERT_EQ(record[i], 0);
        }
        EXPECT_EQ(factors[8].gain, 0.0F);
      }
    }
  }
}

// The largest keys that are accepted, and the smallest: everything stays finite.
TEST_P(LadderCodesTest, ExtremesStayFinite) {
  const int dim = 512;
  for (const float magnitude : {2.0F * 65504.0F * std::sqrt(512.0F), 1e-12F, 1e-20F, 1e-40F}) {
    std::vector<float> residuals(static_cast<size_t>(64 * dim));
    for (size_t i = 0; i < residuals.size(); ++i)
      residuals[i] = i % 3 == 0 ? magnitude : -magnitude;
    std::fill_n(residuals.begin() + dim, dim, 0.0F);
    residuals[static_cast<size_t>(dim)] = magnitude;  // all of key 1 in one dimension
    std::vector<uint8_t> codes(static_cast<size_t>(ScanBlockBytes(Symbols(dim), 2)));
    std::vector<uint16_t> values(64 * 8);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = FloatToBf16(i % 2 == 0 ? 65280.0F : -65280.0F);
    std::vector<uint8_t> records(static_cast<size_t>(64 * FineRecordBytes(dim, 8)));
    std::vector<FineFactors> factors(64);
    for (const int planes : {1, 2}) {
      EXPECT_TRUE(std::isfinite(EncodeScanBlocks(residuals.data(), 1, dim, planes, codes.data())));
      for (int key = 0; key < 64; ++key) {
        const double gain = reference::StoredGain(codes.data(), Symbols(dim), planes, key);
        EXPECT_TRUE(std::isfinite(gain)) << magnitude;
        EXPECT_EQ(gain > 0.0, magnitude > 1e-15F) << magnitude;
      }
    }
    EXPECT_TRUE(std::isfinite(EncodeFine(residuals.data(), values.data(), DType::kBf16, 64, dim, 8,
                                         records.data(), factors.data())));
    for (const FineFactors& f : factors) {
      EXPECT_TRUE(std::isfinite(f.gain));
      EXPECT_TRUE(std::isfinite(Bf16ToFloat(f.step)));
    }
  }
}

TEST_P(LadderCodesTest, MeansAndResiduals) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (const int dim : {8, 40, 80, 128}) {
      const int count = 192;
      const auto rows = reference::RandomElements(3, static_cast<size_t>(count * dim), 2.0F, dtype);
      const auto row = [&](int t, int i) {
        return LoadElement(rows.data(), dtype, static_cast<size_t>(t * dim + i));
      };
      std::vector<float> mean(static_cast<size_t>(dim));
      MeanRow(rows.data(), dtype, 131, dim, mean.data());
      std::vector<uint16_t> block_means(static_cast<size_t>(3 * dim));
      BlockMeans(rows.data(), dtype, 3, dim, block_means.data());
      for (int i = 0; i < dim; ++i) {
        double sum = 0.0;
        double block_sum = 0.0;
        for (int t = 0; t < 131; ++t) sum += static_cast<double>(row(t, i));
        for (int t = 64; t < 128; ++t) block_sum += static_cast<double>(row(t, i));
        ASSERT_NEAR(static_cast<double>(mean[static_cast<size_t>(i)]), sum / 131.0, 1e-5);
        ASSERT_NEAR(static_cast<double>(Bf16ToFloat(block_means[static_cast<size_t>(dim + i)])),
                    block_sum / 64.0, std::abs(block_sum / 64.0) / 250.0 + 1e-5);
      }
      const int padded = PaddedDim(dim);
      std::vector<float> residuals(static_cast<size_t>(19 * padded));
      RotateResiduals(rows.data(), dtype, 19, dim, mean.data(), residuals.data());
      std::vector<float> difference(static_cast<size_t>(dim));
      std::vector<float> rotated(static_cast<size_t>(padded));
      for (int t = 0; t < 19; ++t) {
        for (int i = 0; i < dim; ++i) {
          difference[static_cast<size_t>(i)] = row(t, i) - mean[static_cast<size_t>(i)];
        }
        Rotate(difference.data(), 1, dim, rotated.data());
        for (int i = 0; i < padded; ++i) {
          ASSERT_NEAR(residuals[static_cast<size_t>(t * padded + i)],
                      rotated[static_cast<size_t>(i)], 1e-5F);
        }
      }
    }
  }
}

/// All that is encoded of two segments' worth of rows.
struct Encoded {
  std::vector<float> centre;
  std::vector<float> residuals;
  std::vector<uint8_t> scan[2];  // 1 and 2 planes
  std::vector<uint8_t> records;
  std::vector<FineFactors> factors;
  std::vector<uint16_t> means;
  std::vector<float> noise = std::vector<float>(3);  // scan with 1 and 2 planes, fine
};

Encoded Encode(const std::vector<uint16_t>& keys, const std::vector<uint16_t>& values, DType dtype,
               int count, int key_dim, int value_dim) {
  const int padded = PaddedDim(key_dim);
  const int blocks = count / kScanBlock;
  const auto rows = static_cast<size_t>(count);
  Encoded out;
  out.centre.resize(static_cast<size_t>(key_dim));
  MeanRow(keys.data(), dtype, count, key_dim, out.centre.data());
  out.residuals.resize(rows * static_cast<size_t>(padded));
  RotateResiduals(keys.data(), dtype, count, key_dim, out.centre.data(), out.residuals.data());
  for (int planes = 1; planes <= 2; ++planes) {
    out.scan[planes - 1].resize(
        static_cast<size_t>(blocks * ScanBlockBytes(Symbols(padded), planes)));
    out.noise[planes - 1] =
        EncodeScanBlocks(out.residuals.data(), blocks, padded, planes, out.scan[planes - 1].data());
  }
  out.records.resize(rows * static_cast<size_t>(FineRecordBytes(padded, value_dim)));
  out.factors.resize(rows);
  out.noise[2] = EncodeFine(out.residuals.data(), values.data(), dtype, count, padded, value_dim,
                            out.records.data(), out.factors.data());
  out.means.resize(static_cast<size_t>(blocks * value_dim));
  BlockMeans(values.data(), dtype, blocks, value_dim, out.means.data());
  return out;
}

template <class T>
bool SameBytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Codes that one machine wrote serve on another, and beside those that a GPU wrote.
TEST_P(LadderCodesTest, SameBitsAsEveryOtherLevel) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (const int dim : {64, 80, 128, 256, 512}) {
      SCOPED_TRACE(std::to_string(dim) + ' ' + DTypeName(dtype));
      const int count = 512;
      const auto keys = reference::HardRows(31, count, dim, dtype);
      const auto values = reference::HardRows(32, count, dim - 8, dtype);
      const Encoded here = Encode(keys, values, dtype, count, dim, dim - 8);
      ASSERT_TRUE(ForceSimdLevel("scalar"));
      const Encoded scalar = Encode(keys, values, dtype, count, dim, dim - 8);
      ASSERT_TRUE(ForceSimdLevel(GetParam()));
      EXPECT_TRUE(SameBytes(here.centre, scalar.centre));
      EXPECT_TRUE(SameBytes(here.residuals, scalar.residuals));
      EXPECT_TRUE(SameBytes(here.scan[0], scalar.scan[0]));
      EXPECT_TRUE(SameBytes(here.scan[1], scalar.scan[1]));
      EXPECT_TRUE(SameBytes(here.records, scalar.records));
      EXPECT_TRUE(SameBytes(here.factors, scalar.factors));
      EXPECT_TRUE(SameBytes(here.means, scalar.means));
      EXPECT_TRUE(SameBytes(here.noise, scalar.noise));
    }
  }
}

/// Error of the estimates of <r, q> by stored codes, in units of the stated noise.
struct NoiseReport {
  double mean = 0.0;
  double deviation = 0.0;
};

/// bits 1, 2 or 4. residuals (64 * blocks, dim); queries (count, dim), both rotated.
NoiseReport MeasureNoise(const std::vector<float>& residuals, int dim, int bits,
                         const std::vector<float>& queries) {
  const int keys = static_cast<int>(residuals.size()) / dim;
  const int symbols = Symbols(dim);
  std::vector<uint8_t> codes(static_cast<size_t>(keys / 64 * ScanBlockBytes(symbols, 2)));
  std::vector<uint8_t> records(static_cast<size_t>(keys * FineRecordBytes(dim, 8)));
  std::vector<FineFactors> factors(static_cast<size_t>(keys));
  const std::vector<uint16_t> values(static_cast<size_t>(keys * 8));
  const float noise = bits == 4
                          ? EncodeFine(residuals.data(), values.data(), DType::kBf16, keys, dim, 8,
                                       records.data(), factors.data())
                          : EncodeScanBlocks(residuals.data(), keys / 64, dim, bits, codes.data());
  double sum = 0.0;
  double sum2 = 0.0;
  double count = 0.0;
  for (int key = 0; key < keys; ++key) {
    const uint8_t* block = codes.data() + key / 64 * ScanBlockBytes(symbols, bits);
    const std::vector<double> x =
        bits == 4 ? reference::StoredFinePoint(records.data() + key * FineRecordBytes(dim, 8), dim)
                  : reference::StoredScanPoint(block, dim, bits, key % 64);
    const double gain = bits == 4 ? static_cast<double>(factors[static_cast<size_t>(key)].gain)
                                  : reference::StoredGain(block, symbols, bits, key % 64);
    for (size_t q = 0; q < queries.size(); q += static_cast<size_t>(dim)) {
      double exact = 0.0;
      double estimate = 0.0;
      double norm2 = 0.0;
      for (int i = 0; i < dim; ++i) {
        const auto query = static_cast<double>(queries[q + static_cast<size_t>(i)]);
        exact += static_cast<double>(residuals[static_cast<size_t>(key * dim + i)]) * query;
        estimate += gain * x[static_cast<size_t>(i)] * query;
        norm2 += query * query;
      }
      const double error =
          (estimate - exact) / (static_cast<double>(noise) * gain * std::sqrt(norm2));
      sum += error;
      sum2 += error * error;
      ++count;
    }
  }
  return {sum / count, std::sqrt(sum2 / count)};
}

TEST_P(LadderCodesTest, EstimatesOfRandomKeysAreUnbiased) {
  const int dim = 128;
  const auto residuals = reference::RandomFloats(21, 1024 * 128, 1.0F);
  const auto queries = reference::RandomFloats(22, 32 * 128, 1.0F);
  for (const int bits : {1, 2, 4}) {
    const NoiseReport report = MeasureNoise(residuals, dim, bits, queries);
    EXPECT_NEAR(report.mean, 0.0, 0.03) << bits;
    EXPECT_NEAR(report.deviation, 1.0, 0.1) << bits;
  }
}

TEST_P(LadderCodesTest, EstimatesOfRealKeysAreUnbiased) {
  const int dim = 128;
  for (const std::string head : {"layer15.kv1", "layer20.kv0"}) {
    const auto keys =
        reference::LoadTensor(KVSEEK_SOURCE_DIR, "code8." + head + ".safetensors", "k");
    const auto decode =
        reference::LoadTensor(KVSEEK_SOURCE_DIR, "code8.queries.safetensors", head + ".q_decode");
    std::vector<float> queries;
    for (size_t i = 0; i < decode.data.size(); ++i) {
      if (i / 128 % 96 == 5) queries.push_back(Bf16ToFloat(decode.data[i]));
    }
    std::vector<float> rotated(queries.size());
    Rotate(queries.data(), static_cast<int>(queries.size()) / dim, dim, rotated.data());
    const uint16_t* rows = keys.data.data() + 2048 * dim;
    std::vector<float> centre(static_cast<size_t>(dim));
    std::vector<float> residuals(static_cast<size_t>(1024 * dim));
    MeanRow(rows, DType::kBf16, 1024, dim, centre.data());
    RotateResiduals(rows, DType::kBf16, 1024, dim, centre.data(), residuals.data());
    for (const int bits : {1, 2, 4}) {
      const NoiseReport report = MeasureNoise(residuals, dim, bits, rotated);
      EXPECT_NEAR(report.mean, 0.0, 0.1) << head << ' ' << bits;
      EXPECT_NEAR(report.deviation, 1.0, 0.1) << head << ' ' << bits;
    }
  }
}

}  // namespace
}  // namespace kvseek::kernels
