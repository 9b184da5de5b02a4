// How good an index's answers are: output error, recall, what was read, how honest the report is,
// and time.
//
// One answer is compared per decode step of a trace; the whole group of query heads is one answer.
// Nothing is printed here, and nothing is fitted to the queries.
#ifndef KVSEEK_CLI_EVALUATION_H_
#define KVSEEK_CLI_EVALUATION_H_

#include <functional>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/reference.h"
#include "cli/trace.h"
#include "index/key_index.h"

namespace kvseek::cli {

/// Answers Attend for one step of a trace over all of its keys: an index in this process, or a
/// daemon.
using SearchFunction = std::function<absl::StatusOr<index::SearchResult>(
    int step, const index::SearchOptions& options)>;

/// Over all steps and query heads of one head.
struct Evaluation {
  /// ||o - o*|| / ||o*|| of each query head and step against full attention in double precision.
  double error_mean = 0.0;
  double error_p90 = 0.0;
  double error_max = 0.0;
  /// Share of each query head's true top 100 among the keys read at 4 bits or better (oracle: among
  /// its top k).
  double recall_at_100 = 0.0;
  /// Of the group in one step, mean. The oracle counts the rows it attends to only.
  double keys_scanned = 0.0;
  double bytes_read = 0.0;
  /// Keys of the group read at 4 bits or better in one step (oracle: those it attends to).
  double keys_read_mean = 0.0;
  double keys_read_min = 0.0;
  double keys_read_p10 = 0.0;
  double keys_read_p90 = 0.0;
  double keys_read_max = 0.0;
  double searches_skipped = 0.0;  ///< share of steps answered from an earlier step's selection
  /// Softmax mass of keys not read at 4 bits or better: mean of the reports, and the truth.
  std::optional<double> missed_estimated;  ///< none for the oracle
  double missed_true = 0.0;
  /// With an audit: share of (step, head) whose true missed mass lies in [low, high], and the
  /// interval's median width relative to the estimate.
  std::optional<double> interval_cover;
  std::optional<double> interval_width;
  /// Time of one step's answer without listing and audit; none for the oracle.
  std::optional<double> micros_mean;
  std::optional<double> micros_p50;
  std::optional<double> micros_p99;
};

/// Relative L2 distance of two vectors of `dim` elements; the plain distance where `truth` is zero.
double OutputError(const float* out, const double* truth, int dim);

/// Runs every step of the reference twice: for time, with the options as they are but no audit, and
/// for accuracy, with the keys read listed. Fails where the search fails or answers with something
/// that is no answer.
absl::StatusOr<Evaluation> EvaluateSearch(const HeadTrace& trace, const Reference& reference,
                                          const SearchFunction& search,
                                          const index::SearchOptions& options);

/// The same figures for reference.oracles[which].
Evaluation EvaluateOracle(const HeadTrace& trace, const Reference& reference, size_t which);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_EVALUATION_H_
