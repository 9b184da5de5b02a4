// Order statistics of measured samples.
#ifndef KVSEEK_CLI_PERCENTILE_H_
#define KVSEEK_CLI_PERCENTILE_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <vector>

namespace kvseek::cli {

/// The smallest sample that at least `share` of all samples do not exceed (nearest rank); 0 if
/// there are none.
inline double Percentile(std::vector<double> samples, double share) {
  if (samples.empty()) return 0.0;
  const double rank = std::ceil(share * static_cast<double>(samples.size()));
  const auto at =
      static_cast<std::ptrdiff_t>(std::clamp(rank, 1.0, static_cast<double>(samples.size())) - 1.0);
  std::nth_element(samples.begin(), samples.begin() + at, samples.end());
  return samples[static_cast<size_t>(at)];
}

inline double Mean(const std::vector<double>& samples) {
  if (samples.empty()) return 0.0;
  return std::accumulate(samples.begin(), samples.end(), 0.0) / static_cast<double>(samples.size());
}

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_PERCENTILE_H_
