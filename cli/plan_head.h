// What `kvseek plan` does with one head: planned from prefill queries, tested on decode queries.
//
// Prefill queries stand for audited traffic. A query at position p sees what a decoder's request
// would: the stored keys [0, p + 1 - recent), its newest ones being in the decoder's steady zone.
// Only queries from the last part of the prefix are used, since what a budget is worth depends on
// the number of keys. Indexes are trained on the other prefill queries. Decode queries see all
// stored keys; nothing is fitted to them.
#ifndef KVSEEK_CLI_PLAN_HEAD_H_
#define KVSEEK_CLI_PLAN_HEAD_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/trace.h"
#include "index/built_index.h"
#include "index/planner.h"
#include "index/search_audit.h"

namespace kvseek::cli {

struct PlanSettings {
  index::PlannerOptions planner;
  std::vector<std::string> indexes = {"ladder", "landmark", "cluster", "graph"};  ///< beside exact
  std::vector<int> scan_bits = {1, 2};
  int exact_rows = 64;      ///< of ladder
  int candidates_min = 64;  ///< smallest budget
  int audits = 192;         ///< prefill queries, evenly spread
  double since = 0.75;      ///< share of the prefix whose queries are left out
  int64_t sink = 16;        ///< tokens of the steady zone
  int64_t recent = 256;
  double far_mass_max = 0.05;  ///< of a streaming head
  int steps = 64;              ///< decode steps, evenly spread
};

/// One setting, and how it did over some queries.
struct PlanFigures {
  std::string index;
  int scan_bits = 0;   ///< ladder; else 0
  int candidates = 0;  ///< 0: exact
  double bytes = 0.0;
  double error = 0.0;  ///< mean over queries and heads, as the next two
  double recall = 0.0;
  double missed_estimated = 0.0;
  double missed_true = 0.0;
};

/// A head planned for sessions of one number of scan bits.
struct HeadChoice {
  int scan_bits = 0;
  index::PlanEstimate audited;  ///< from audits
  PlanFigures tested;           ///< on decode queries
  int audits = 0;
  int trials = 0;  ///< searches beside the exact ones
};

class PlannedTrace {
 public:
  /// Stores the head and builds its indexes. failed_precondition without prefill queries in the
  /// last part, or without a full segment where an index needs one. The arguments must outlive it.
  static absl::StatusOr<std::unique_ptr<PlannedTrace>> Make(const HeadTrace& trace,
                                                            const PlanSettings& settings);

  /// REQUIRES: scan_bits is among the settings'.
  HeadChoice Plan(int scan_bits);
  /// The setting that meets the target on decode queries at the least bytes: all budgets of all
  /// indexes and scan bits are tried on them, except larger ones than such as already cost more.
  PlanFigures BestFixed();
  /// Softmax mass between sink and recent window, mean over the audited queries, of the query head
  /// that has most.
  double FarMass();

 private:
  struct Query {
    size_t sample;  ///< of the trace's prefill queries
    int64_t end;
  };
  struct Stored {
    int scan_bits;
    std::unique_ptr<const StoredHead> head;
  };

  PlannedTrace(const HeadTrace& trace, const PlanSettings& settings)
      : trace_(trace), settings_(settings) {}
  absl::Status Build();
  absl::Status BuildIndexes();
  const float* PrefillQueries(size_t sample) const {
    return trace_.prefill_queries.data() +
           sample * static_cast<size_t>(trace_.group) * static_cast<size_t>(trace_.key_dim);
  }
  index::SearchQuery MakeQuery(const float* queries, int64_t begin, int64_t end) const {
    return {queries, trace_.group, begin, end};
  }
  const index::KeyIndex& FindIndex(const std::string& name) const;
  index::KvView View(int scan_bits) const;
  index::SearchResult Search(const std::string& index, int scan_bits, int candidates,
                             const index::SearchQuery& query);
  /// Over all decode steps.
  PlanFigures Test(const std::string& index, int scan_bits, int candidates);
  /// Replaces `best` by a setting of the curve that meets the target at fewer bytes.
  void SearchCurve(const std::string& index, int scan_bits, PlanFigures& best);

  const HeadTrace& trace_;
  const PlanSettings& settings_;
  std::vector<int> budgets_;
  std::vector<Stored> stored_;  ///< one for each of scan_bits
  std::vector<std::pair<std::string, std::shared_ptr<const index::BuiltIndex>>> built_;
  std::vector<Query> audited_;
  std::vector<int> steps_;
  std::vector<std::unique_ptr<const index::SearchAudit>> tests_;  ///< (steps)
  index::Scratch scratch_;
};

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_PLAN_HEAD_H_
