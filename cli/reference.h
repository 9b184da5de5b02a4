// Full attention in double precision over the stored rows of a trace: what every index is measured
// against; and the oracle, which knows each query head's true top k and attends to nothing else.
//
// Scores, weights and sums are doubles throughout. Thread-safe: free functions of their arguments.
#ifndef KVSEEK_CLI_REFERENCE_H_
#define KVSEEK_CLI_REFERENCE_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "cli/trace.h"

namespace kvseek::cli {

inline constexpr int kRecallKeys = 100;  ///< recall is measured on each head's true top 100

struct ReferenceOptions {
  std::vector<int64_t> oracle_ks = {};  ///< sizes of the oracle's selection, 1 or more each
  int threads = 2;                      ///< the result does not depend on it
};

/// Attention to the true top k of each query head, its softmax renormalised over them.
struct OracleAnswers {
  int64_t k = 0;
  std::vector<double> out;   ///< (steps, group, value_dim)
  std::vector<double> mass;  ///< (steps, group), share of the full softmax mass held by the top k
  std::vector<int64_t> keys_read;  ///< (steps), keys in the top k of at least one head of the group
};

struct Reference {
  std::vector<int> steps;              ///< which steps of the trace
  std::vector<double> out;             ///< (steps, group, value_dim)
  std::vector<double> lse;             ///< (steps, group), natural log
  int top = 0;                         ///< min(kRecallKeys, tokens)
  std::vector<int32_t> top_keys;       ///< (steps, group, top), by falling score
  std::vector<OracleAnswers> oracles;  ///< one for each of oracle_ks
};

/// Attends to all of the trace's keys at the given steps.
Reference ComputeReference(const HeadTrace& trace, absl::Span<const int> steps,
                           const ReferenceOptions& options);

/// Share of each query head's softmax mass that the keys at `positions` hold, (group). `lse` is the
/// reference's of that step, (group).
std::vector<double> MassOfKeys(const HeadTrace& trace, int step, const double* lse,
                               absl::Span<const int64_t> positions);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_REFERENCE_H_
