#include "tests/kernels/ladder_reference.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>

namespace kvseek::reference {
namespace {

/// Code on a grid of steps (i + 0.5) * step, i clipped to [lowest, highest].
Code GridCode(const float* residual, int padded_dim, double step, int lowest, int highest) {
  double norm2 = 0.0;
  for (int i = 0; i < padded_dim; ++i) {
    norm2 += static_cast<double>(residual[i]) * static_cast<double>(residual[i]);
  }
  const double to_unit = norm2 > 0.0 ? std::sqrt(padded_dim / norm2) : 0.0;
  Code code;
  double dot = 0.0;
  double code_norm2 = 0.0;
  for (int i = 0; i < padded_dim; ++i) {
    const double steps = static_cast<double>(residual[i]) * to_unit / step;
    const double level =
        std::clamp(std::floor(steps), static_cast<double>(lowest), static_cast<double>(highest));
    const double x = (level + 0.5) * step;
    code.point.push_back(x);
    code.doubtful.push_back(std::abs(steps - std::round(steps)) < 1e-5 && residual[i] != 0.0F);
    dot += x * static_cast<double>(residual[i]);
    code_norm2 += x * x;
  }
  if (norm2 == 0.0) return code;
  code.gain = norm2 / dot;
  code.noise = std::sqrt(std::max(0.0, code_norm2 - dot * dot / norm2) / (padded_dim - 1));
  return code;
}

}  // namespace

Code ScanCode(const float* residual, int padded_dim, int planes) {
  // Signs are the grid of step 2 with the levels -1 and +1; the gain undoes any step.
  return planes == 1
             ? GridCode(residual, padded_dim, 2.0, -1, 0)
             : GridCode(residual, padded_dim, static_cast<double>(kernels::kTwoBitStep), -2, 1);
}

Code FineCode(const float* residual, int padded_dim) {
  return GridCode(residual, padded_dim, static_cast<double>(kernels::kFourBitStep), -8, 7);
}

int StoredSymbol(const uint8_t* block, int symbols, int plane, int g, int key) {
  const uint8_t* rows = block + static_cast<ptrdiff_t>(plane) * kernels::PlaneRows(symbols) * 64;
  const int quads = symbols / 4;
  const auto byte = [&](int row) { return static_cast<int>(rows[row * 64 + key]); };
  if (g >= 4 * quads) return byte(3 * quads + (g - 4 * quads)) % 64;
  const int first = g / 4 * 3;
  if (g % 4 != 3) return byte(first + g % 4) % 64;
  return byte(first) / 64 + byte(first + 1) / 64 * 4 + byte(first + 2) / 64 * 16;
}

std::vector<double> StoredScanPoint(const uint8_t* block, int padded_dim, int planes, int key) {
  const int symbols = kernels::Symbols(padded_dim);
  std::vector<double> point;
  for (int i = 0; i < padded_dim; ++i) {
    const auto sign = [&](int plane) {
      return (StoredSymbol(block, symbols, plane, i / 6, key) >> (i % 6) & 1) != 0 ? 1.0 : -1.0;
    };
    point.push_back(planes == 1
                        ? sign(0)
                        : static_cast<double>(kernels::kTwoBitStep) * (sign(0) + sign(1) / 2.0));
  }
  return point;
}

std::vector<double> StoredFinePoint(const uint8_t* record, int padded_dim) {
  std::vector<double> point(static_cast<size_t>(padded_dim));
  for (size_t i = 0; i < point.size(); ++i) {
    const size_t half = point.size() / 2;
    const int nibble = i < half ? record[i] % 16 : record[i - half] / 16;
    point[i] = static_cast<double>(kernels::kFourBitStep) * (nibble - 7.5);
  }
  return point;
}

std::vector<uint16_t> HardRows(uint32_t seed, int count, int dim, kernels::DType dtype) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.3F, 1.0F);
  const auto round = [dtype](float x) {
    return dtype == kernels::DType::kBf16 ? kernels::FloatToBf16(x) : kernels::FloatToFp16(x);
  };
  std::vector<uint16_t> rows;
  rows.reserve(static_cast<size_t>(count) * static_cast<size_t>(dim));
  for (int t = 0; t < count; ++t) {
    const int kind = t == 0 ? 0 : static_cast<int>(random() % 16);
    for (int i = 0; i < dim; ++i) {
      const float x = normal(random);
      const uint16_t sign = random() % 2 == 0 ? 0 : 0x8000U;
      switch (kind) {
        case 1:
          rows.push_back(rows[rows.size() - static_cast<size_t>(dim)]);
          break;
        case 2:
          rows.push_back(sign);
          break;
        case 3:
          rows.push_back(static_cast<uint16_t>(sign | random() % 0x80U));
          break;
        case 4:
          rows.push_back(i % 3 == 0 ? sign : round(std::abs(x)));
          break;
        case 5:
          rows.push_back(i % 3 == 0 ? sign : round(-std::abs(x)));
          break;
        default:
          rows.push_back(round(random() % 64 == 0 ? 10.0F * x : x));
      }
    }
  }
  return rows;
}

double StoredGain(const uint8_t* block, int symbols, int planes, int key) {
  uint16_t bits;
  std::memcpy(&bits, block + kernels::ScanGainOffset(symbols, planes) + 2 * key, sizeof(bits));
  return static_cast<double>(kernels::Bf16ToFloat(bits));
}

std::vector<int16_t> ScanSums(const uint8_t* codes, int blocks, int symbols, int planes,
                              const int8_t* tables, int heads) {
  std::vector<int16_t> sums;
  for (int h = 0; h < heads; ++h) {
    for (int key = 0; key < blocks * 64; ++key) {
      const uint8_t* block =
          codes + static_cast<ptrdiff_t>(key / 64) * kernels::ScanBlockBytes(symbols, planes);
      int plane_sums[2] = {};
      for (int plane = 0; plane < planes; ++plane) {
        for (int g = 0; g < symbols; ++g) {
          const int symbol = StoredSymbol(block, symbols, plane, g, key % 64);
          plane_sums[plane] += tables[(h * symbols + g) * 64 + symbol];
        }
      }
      sums.push_back(
          static_cast<int16_t>(planes == 1 ? plane_sums[0] : 2 * plane_sums[0] + plane_sums[1]));
    }
  }
  return sums;
}

double Estimate(const kernels::ScanHead& head, double gain, int sum) {
  return static_cast<double>(head.centre) + static_cast<double>(head.slope) * gain * sum;
}

double Weight(const kernels::ScanHead& head, double gain, double estimate) {
  const double noise = static_cast<double>(head.noise) * gain;
  return std::exp(
      std::min(80.0, estimate - noise * noise / 2.0 - static_cast<double>(head.reference)));
}

Tensor LoadTensor(const std::string& source_dir, const std::string& file, const std::string& name) {
  std::ifstream stream(source_dir + "/tests/data/" + file, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(stream)), {});
  uint64_t header_bytes = 0;
  if (bytes.size() < sizeof(header_bytes)) throw std::runtime_error("cannot read " + file);
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  const std::string header = bytes.substr(sizeof(header_bytes), header_bytes);
  const size_t entry = header.find("\"" + name + "\":{\"dtype\":\"BF16\"");
  if (entry == std::string::npos) throw std::runtime_error("no bf16 " + name + " in " + file);
  const auto numbers_after = [&](const std::string& key) {
    std::vector<size_t> numbers;
    const char* at = header.c_str() + header.find(key, entry) + key.size();
    for (char* end = nullptr; *at != ']'; at = *end == ',' ? end + 1 : end) {
      numbers.push_back(std::strtoull(at, &end, 10));
      if (end == at) throw std::runtime_error("bad header in " + file);
    }
    return numbers;
  };
  Tensor tensor;
  tensor.shape = numbers_after("\"shape\":[");
  const std::vector<size_t> range = numbers_after("\"data_offsets\":[");
  tensor.data.resize((range.at(1) - range.at(0)) / sizeof(uint16_t));
  std::memcpy(tensor.data.data(), bytes.data() + sizeof(header_bytes) + header_bytes + range[0],
              tensor.data.size() * sizeof(uint16_t));
  return tensor;
}

}  // namespace kvseek::reference
