#include "cli/synthetic.h"

#include <array>
#include <cmath>
#include <cstddef>
#include <random>

#include "absl/types/span.h"
#include "kernels/cpu/rotation.h"
#include "kernels/dtype.h"

namespace kvseek::cli {
namespace {

constexpr size_t kTableNormals = size_t{1} << 20;
constexpr size_t kDimMax = 512;
constexpr uint64_t kDriftTokens = 1024;
constexpr float kSpectrumDecay = 0.75F;  // standard deviation of dimension i ~ (i + 1)^-decay
constexpr float kResidualNorm = 12.0F;   // of a key of 128 dimensions, as in the recorded heads
constexpr float kMeanNorm = 24.0F;
constexpr float kDriftShare = 0.4F;   // of the residual's size
constexpr float kScoreSpread = 3.0F;  // standard deviation of a query's scores, natural log
constexpr float kSinkScore = 3.0F;  // what the sink's direction adds to scores, in such deviations

/// SplitMix64's finaliser over the parts.
uint64_t Hash(std::initializer_list<uint64_t> parts) {
  uint64_t hash = 0x9e3779b97f4a7c15U;
  for (const uint64_t part : parts) {
    hash += part + 0x9e3779b97f4a7c15U;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9U;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebU;
    hash ^= hash >> 31;
  }
  return hash;
}

enum Purpose : uint64_t { kKey, kValue, kDrift, kMean, kQuery };

}  // namespace

SyntheticModel::SyntheticModel(const ModelShape& shape, uint64_t seed)
    : shape_(shape),
      seed_(seed),
      padded_(kernels::PaddedDim(static_cast<int>(shape.key_dim))),
      spectrum_(shape.key_dim),
      normals_(kTableNormals + kDimMax) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  for (float& value : normals_) value = normal(random);
  double energy = 0.0;
  for (size_t i = 0; i < spectrum_.size(); ++i) {
    spectrum_[i] = std::pow(static_cast<float>(i + 1), -kSpectrumDecay);
    energy += double{spectrum_[i]} * double{spectrum_[i]};
  }
  const double norm = double{kResidualNorm} * std::sqrt(static_cast<double>(shape.key_dim) / 128.0);
  for (float& value : spectrum_) value *= static_cast<float>(norm / std::sqrt(energy));
}

const float* SyntheticModel::Normals(uint64_t hash) const {
  return normals_.data() + hash % kTableNormals;
}

void SyntheticModel::Residual(uint64_t hash, float* row) const {
  const float* normals = Normals(hash);
  for (size_t i = 0; i < spectrum_.size(); ++i) row[i] = spectrum_[i] * normals[i];
}

void SyntheticModel::MeanKey(uint32_t layer, uint32_t head, float* row) const {
  const float* normals = Normals(Hash({seed_, kMean, layer, head}));
  const float size = kMeanNorm / std::sqrt(128.0F);
  for (size_t i = 0; i < spectrum_.size(); ++i) row[i] = size * normals[i];
}

void SyntheticModel::Fill(uint64_t session, uint32_t layer, uint64_t start, uint32_t tokens,
                          std::vector<uint16_t>& keys, std::vector<uint16_t>& values) const {
  const size_t key_dim = shape_.key_dim;
  const size_t value_dim = shape_.value_dim;
  keys.resize(size_t{tokens} * shape_.kv_heads * key_dim);
  values.resize(size_t{tokens} * shape_.kv_heads * value_dim);
  std::array<float, kDimMax> mean{};
  std::array<float, kDimMax> drift{};
  std::array<float, kDimMax> row{};
  std::array<float, kDimMax> rotated{};
  for (uint32_t head = 0; head < shape_.kv_heads; ++head) {
    MeanKey(layer, head, mean.data());
    for (uint32_t i = 0; i < tokens; ++i) {
      const uint64_t token = start + i;
      if (i == 0 || token % kDriftTokens == 0) {
        Residual(Hash({seed_, kDrift, session, layer, head, token / kDriftTokens}), drift.data());
      }
      Residual(Hash({seed_, kKey, session, layer, head, token}), row.data());
      // The sink lies where all queries of the head point: along its mean.
      const float sink = token == 0 ? kSinkScore : 1.0F;
      for (size_t d = 0; d < key_dim; ++d) row[d] += sink * mean[d] + kDriftShare * drift[d];
      kernels::Rotate(row.data(), 1, static_cast<int>(key_dim), rotated.data());
      const size_t at = size_t{i} * shape_.kv_heads + head;
      for (size_t d = 0; d < key_dim; ++d) {
        keys[at * key_dim + d] = kernels::FloatToBf16(rotated[d]);
      }
      const float* value = Normals(Hash({seed_, kValue, session, layer, head, token}));
      for (size_t d = 0; d < value_dim; ++d) {
        values[at * value_dim + d] = kernels::FloatToBf16(value[d]);
      }
    }
  }
}

std::vector<float> SyntheticModel::Queries(uint32_t layer, uint64_t step) const {
  const size_t dim = shape_.key_dim;
  std::vector<float> queries(shape_.query_heads * dim);
  std::array<float, kDimMax> mean{};
  std::array<float, kDimMax> row{};
  std::array<float, kDimMax> rotated{};
  const double scale = shape_.softmax_scale > 0.0F ? double{shape_.softmax_scale}
                                                   : 1.0 / std::sqrt(static_cast<double>(dim));
  for (uint32_t head = 0; head < shape_.query_heads; ++head) {
    MeanKey(layer, head / shape_.Group(), mean.data());
    const float* normals = Normals(Hash({seed_, kQuery, layer, head, step}));
    double variance = 0.0;
    double mean_energy = 0.0;
    for (size_t d = 0; d < dim; ++d) {
      variance += std::pow(double{spectrum_[d]} * double{normals[d]}, 2);
      mean_energy += double{mean[d]} * double{mean[d]};
    }
    const double size = double{kScoreSpread} / (scale * std::sqrt(variance));
    const double along = double{kScoreSpread} / (scale * mean_energy);
    for (size_t d = 0; d < dim; ++d) {
      row[d] = static_cast<float>(size * double{normals[d]} + along * double{mean[d]});
    }
    kernels::Rotate(row.data(), 1, static_cast<int>(dim), rotated.data());
    for (size_t d = 0; d < dim; ++d) queries[head * dim + d] = rotated[d];
  }
  return queries;
}

}  // namespace kvseek::cli
