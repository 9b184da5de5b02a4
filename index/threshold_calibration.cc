#include "index/threshold_calibration.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvseek::index {
namespace {

// Shares below e^-60 are nothing to fp32 sums.
constexpr float kLowest = -60.0F;
constexpr double kCloseEnough = 0.002;  // of the wanted number

/// Late query tokens of `input`.
std::vector<SearchQuery> PickQueries(const BuildInput& input) {
  const auto first =
      static_cast<int64_t>(kCalibrationSince * static_cast<double>(input.view.Tokens()));
  const size_t row =
      static_cast<size_t>(input.group) * static_cast<size_t>(input.view.shape.key_dim);
  std::vector<SearchQuery> late;
  for (size_t i = 0; i < input.query_positions.size(); ++i) {
    const int64_t position = input.query_positions[i];
    if (position < first) continue;
    late.push_back({input.queries.data() + i * row, input.group, 0, position + 1});
  }
  const size_t count = std::min(late.size(), size_t{kCalibrationQueriesMax});
  std::vector<SearchQuery> picked;
  for (size_t i = 0; i < count; ++i) picked.push_back(late[i * late.size() / count]);
  return picked;
}

}  // namespace

CalibratedThreshold CalibrateThreshold(const KeyIndex& index, const BuildInput& input,
                                       const SearchOptions& options, double wanted,
                                       Scratch& scratch) {
  const std::vector<SearchQuery> queries = PickQueries(input);
  CalibratedThreshold found;
  found.queries = static_cast<int>(queries.size());
  if (queries.empty()) return found;
  SearchOptions asked = options;
  asked.k = -1;
  asked.audit_samples = 0;
  const auto mean_at = [&](float threshold) {
    asked.threshold = threshold;
    double sum = 0.0;
    for (const SearchQuery& query : queries) {
      sum +=
          static_cast<double>(index.Search(input.view, query, asked, scratch).report.keys_chosen);
    }
    return sum / static_cast<double>(queries.size());
  };
  found.keys = mean_at(0.0F);
  if (found.keys <= wanted) return found;
  float low = kLowest;
  float high = kHighestThreshold;
  for (int step = 0; step < kCalibrationStepsMax; ++step) {
    found.threshold = (low + high) / 2.0F;
    found.keys = mean_at(found.threshold);
    if (std::abs(found.keys - wanted) <= kCloseEnough * wanted) break;
    (found.keys > wanted ? low : high) = found.threshold;
  }
  return found;
}

}  // namespace kvseek::index
