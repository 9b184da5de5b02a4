#include "index/rest_audit.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace kvseek::index {
namespace {

constexpr double kNormal95 = 1.96;
// What a sample does not see of a mean but its logarithmic interval still covers.
constexpr double kUnseenAllowed = 0.15;
constexpr double kFreedomMin = 0.05;
constexpr double kExponentMax = 80.0;

/// Share of a lognormal mean (of logarithmic deviation `noise`) that lies beyond the largest of
/// `count` draws.
double UnseenShare(double count, double noise) {
  const double log_count = std::log(std::max(count, 3.0));
  const double largest = std::sqrt(2.0 * log_count - std::log(4.0 * std::numbers::pi * log_count));
  return 0.5 * std::erfc((largest - noise) / std::numbers::sqrt2);
}

}  // namespace

RestRatio EstimateRatio(absl::Span<const float> ratios, double noise, int own) {
  const auto count = static_cast<double>(ratios.size());
  double sum = 0.0;
  double sum_of_squares = 0.0;
  for (const float ratio : ratios) {
    sum += ratio;
    sum_of_squares += double{ratio} * ratio;
  }
  const double mean = sum / count;
  double squares = 0.0;
  for (const float ratio : ratios) squares += (ratio - mean) * (ratio - mean);
  if (ratios.size() < 2 || !(mean > 0.0)) return {static_cast<float>(mean), 0.0F, kUnbounded};
  const double relative_error = std::sqrt(squares / (count - 1.0) / count) / mean;
  // Kish's effective size, and nearly Student's quantile of it.
  const double freedom = std::max(sum * sum / sum_of_squares - 1.0, kFreedomMin);
  const double factor =
      std::exp(std::min(kNormal95 * (1.0 + 1.25 / freedom) * relative_error, kExponentMax));
  const double unseen =
      std::max(0.0, (UnseenShare(own, noise) - kUnseenAllowed) / (1.0 - kUnseenAllowed));
  const double high = mean * factor / std::max(1.0 - unseen, 1e-20);
  return {static_cast<float>(mean), static_cast<float>(mean / factor),
          static_cast<float>(std::min<double>(high, kUnbounded))};
}

// splitmix64.
double UniformHash(uint64_t seed, uint64_t a, uint64_t b) {
  uint64_t x = seed ^ (a * 0x9e3779b97f4a7c15ULL) ^ (b * 0xd1b54a32d192ed03ULL);
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  x ^= x >> 31;
  return static_cast<double>(x >> 11) * 0x1p-53;
}

}  // namespace kvseek::index
