// Where the time of a search goes: one that is run unit by unit, as the daemon's workers do.
#ifndef KVSEEK_BENCH_SEARCH_STEPS_H_
#define KVSEEK_BENCH_SEARCH_STEPS_H_

#include <cstddef>
#include <string>
#include <vector>

#include "index/key_index.h"

namespace kvseek::bench {

/// One step of a ladder search, over all searches that were run.
struct StepTime {
  std::string name;
  double units = 0.0;         ///< of one search, mean
  double unit_us = 0.0;       ///< of one unit; median over searches of their mean
  double unit_us_best = 0.0;  ///< the least mean that a search had
  double longest_us = 0.0;    ///< of a search's longest unit; median over searches
};

/// Times of the units of ladder searches that read exact rows. Not thread-safe.
class SearchSteps {
 public:
  /// Plans, runs and finishes a search in the calling thread.
  index::SearchResult Search(const index::KeyIndex& index, const index::KvView& view,
                             const index::SearchQuery& query, const index::SearchOptions& options,
                             index::Scratch& scratch);
  /// In the order in which they are run; empty before the first search.
  std::vector<StepTime> Times() const;

 private:
  struct Step {
    double units = 0.0;             ///< sum over searches
    std::vector<double> unit_us{};  ///< of each search, mean
    std::vector<double> longest_us{};
  };
  /// `units` that took `micros` together, the longest of them `longest`.
  void Add(size_t step, double micros, double longest, int units);

  std::vector<Step> steps_;
};

}  // namespace kvseek::bench

#endif  // KVSEEK_BENCH_SEARCH_STEPS_H_
