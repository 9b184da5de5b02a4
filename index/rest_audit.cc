#include "index/rest_audit.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace kvseek::index {
namespace {

constexpr float kUnbounded = 1e30F;
constexpr double kNormal95 = 1.96;
// What a sample does not see of a mean but its logarithmic interval still covers.
constexpr double kUnseenAllowed = 0.15;

/// Share of a lognormal mean (of logarithmic deviation `noise`) that lies beyond the largest of
/// `count` draws.
double UnseenShare(double count, double noise) {
  const double log_count = std::log(std::max(count, 3.0));
  const double largest = std::sqrt(2.0 * log_count - std::log(4.0 * std::numbers::pi * log_count));
  return 0.5 * std::erfc((largest - noise) / std::numbers::sqrt2);
}

}  // namespace

RestRatio EstimateRatio(absl::Span<const float> ratios, double noise) {
  const auto count = static_cast<double>(ratios.size());
  double sum = 0.0;
  for (const float ratio : ratios) sum += ratio;
  const double mean = sum / count;
  double squares = 0.0;
  for (const float ratio : ratios) squares += (ratio - mean) * (ratio - mean);
  if (ratios.size() < 2 || !(mean > 0.0)) return {static_cast<float>(mean), 0.0F, kUnbounded};
  const double relative_error = std::sqrt(squares / (count - 1.0) / count) / mean;
  // Student's quantile, nearly.
  const double factor = std::exp(kNormal95 * (1.0 + 1.25 / (count - 1.0)) * relative_error);
  const double unseen =
      std::max(0.0, (UnseenShare(count, noise) - kUnseenAllowed) / (1.0 - kUnseenAllowed));
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
