#include "tests/kernels/reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>

namespace kvseek::reference {
namespace {

using kernels::DType;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double Element(const void* data, DType dtype, size_t index) {
  return static_cast<double>(kernels::LoadElement(data, dtype, index));
}

uint64_t SplitMix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

double Difference(double expected, double actual) {
  if (expected == actual) return 0;
  const double difference = std::fabs(expected - actual);
  return std::isnan(difference) ? kInfinity : difference;
}

}  // namespace

std::vector<float> RandomFloats(uint32_t seed, size_t count, float deviation) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0F, deviation);
  std::vector<float> values(count);
  std::generate(values.begin(), values.end(), [&] { return normal(generator); });
  return values;
}

uint16_t Round(float value, DType dtype) {
  return dtype == DType::kBf16 ? kernels::FloatToBf16(value) : kernels::FloatToFp16(value);
}

std::vector<uint16_t> RandomElements(uint32_t seed, size_t count, float deviation, DType dtype) {
  const std::vector<float> floats = RandomFloats(seed, count, deviation);
  std::vector<uint16_t> elements(count);
  std::transform(floats.begin(), floats.end(), elements.begin(),
                 [dtype](float value) { return Round(value, dtype); });
  return elements;
}

std::vector<double> Scores(const float* queries, int group, const void* rows, DType dtype,
                           int count, int dim) {
  const auto columns = static_cast<size_t>(dim);
  std::vector<double> scores;
  for (size_t h = 0; h < static_cast<size_t>(group); ++h) {
    for (size_t t = 0; t < static_cast<size_t>(count); ++t) {
      double score = 0;
      for (size_t i = 0; i < columns; ++i) {
        score +=
            static_cast<double>(queries[h * columns + i]) * Element(rows, dtype, t * columns + i);
      }
      scores.push_back(score);
    }
  }
  return scores;
}

Attention Attend(const std::vector<double>& scores, int group, const uint16_t* values, DType dtype,
                 int count, int value_dim) {
  const auto columns = static_cast<size_t>(value_dim);
  const auto rows = static_cast<size_t>(count);
  Attention result;
  for (size_t h = 0; h < static_cast<size_t>(group); ++h) {
    double largest = -kInfinity;
    for (size_t t = 0; t < rows; ++t) largest = std::max(largest, scores[h * rows + t]);
    std::vector<double> out(columns, 0.0);
    double sum = 0;
    for (size_t t = 0; t < rows && largest > -kInfinity; ++t) {
      const double weight = std::exp(scores[h * rows + t] - largest);
      sum += weight;
      for (size_t i = 0; i < columns; ++i) {
        out[i] += weight * Element(values, dtype, t * columns + i);
      }
    }
    for (double& x : out) x = sum > 0 ? x / sum : 0;
    result.out.insert(result.out.end(), out.begin(), out.end());
    result.lse.push_back(sum > 0 ? largest + std::log(sum) : -kInfinity);
  }
  return result;
}

std::vector<double> WeightedRows(const float* weights, int group, const uint16_t* rows, DType dtype,
                                 int count, int dim) {
  const auto columns = static_cast<size_t>(dim);
  std::vector<double> sums(static_cast<size_t>(group) * columns, 0.0);
  for (size_t h = 0; h < static_cast<size_t>(group); ++h) {
    for (size_t t = 0; t < static_cast<size_t>(count); ++t) {
      const double weight = weights[h * static_cast<size_t>(count) + t];
      for (size_t i = 0; i < columns; ++i) {
        sums[h * columns + i] += weight * Element(rows, dtype, t * columns + i);
      }
    }
  }
  return sums;
}

std::vector<double> Rotate(const float* in, int dim) {
  size_t padded = 64;
  while (padded < static_cast<size_t>(dim)) padded *= 2;
  std::vector<double> x(padded, 0.0);
  std::copy_n(in, dim, x.begin());
  for (uint64_t round = 0; round < 2; ++round) {
    for (size_t i = 0; i < padded; ++i) {
      if (SplitMix64((uint64_t{padded} << 32) | (round << 16) | i) >> 63 != 0) x[i] = -x[i];
    }
    std::vector<double> y(padded, 0.0);
    for (size_t i = 0; i < padded; ++i) {
      for (size_t j = 0; j < padded; ++j) y[i] += std::popcount(i & j) % 2 == 0 ? x[j] : -x[j];
      y[i] /= std::sqrt(static_cast<double>(padded));
    }
    x = y;
  }
  return x;
}

AttentionError Compare(const Attention& expected, const float* out, const float* lse) {
  AttentionError error;
  const size_t columns = expected.lse.empty() ? 0 : expected.out.size() / expected.lse.size();
  for (size_t h = 0; h < expected.lse.size(); ++h) {
    double largest = 0;
    double difference = 0;
    for (size_t i = h * columns; i < (h + 1) * columns; ++i) {
      largest = std::max(largest, std::fabs(expected.out[i]));
      difference = std::max(difference, Difference(expected.out[i], static_cast<double>(out[i])));
    }
    if (difference > 0) difference /= std::max(largest, 1e-30);
    error.out = std::max(error.out, difference);
    error.lse = std::max(error.lse, Difference(expected.lse[h], static_cast<double>(lse[h])));
  }
  return error;
}

AttentionError Compare(const Attention& expected, const kernels::GroupState& state) {
  const auto heads = static_cast<size_t>(state.group);
  std::vector<float> out(heads * static_cast<size_t>(state.value_dim));
  std::vector<float> lse(heads);
  kernels::FinishState(state, out.data(), lse.data());
  return Compare(expected, out.data(), lse.data());
}

}  // namespace kvseek::reference
