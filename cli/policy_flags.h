// Flags of `kvseek eval` for what stands above any index: budgets by mass, beta and threshold,
// voting, reuse.
#ifndef KVSEEK_CLI_POLICY_FLAGS_H_
#define KVSEEK_CLI_POLICY_FLAGS_H_

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/status.h"
#include "cli/daemon_search.h"
#include "cli/library_search.h"
#include "client/kv_client.h"
#include "index/key_index.h"
#include "index/reuse.h"

namespace kvseek::cli {

struct PolicyFlags {
  static constexpr char kCalibrated[] = "calibrated:";

  float mass = 0.0F;
  float beta = 0.0F;
  std::string threshold = "0";  ///< nats, or kCalibrated and a number of keys
  std::string vote = "sum";
  int reuse = 0;  ///< search at least every so many steps; 0: steps are on their own
  index::ReuseOptions reuse_options;

  void AddOptions(CLI::App& command);
  /// The keys that a threshold is calibrated for; 0: it is given, or none is.
  int CalibratedKeys() const;
  /// Whether something is set that a daemon cannot be asked for.
  bool HereOnly() const {
    const index::ReuseOptions usual;
    return reuse_options.samples != usual.samples || reuse_options.tolerance != usual.tolerance;
  }
  void Apply(index::SearchOptions& options) const;
  /// Sets the threshold from the trace's prefill queries, if that is asked for.
  absl::Status Calibrate(const HeadTrace& trace, const StoredHead& head,
                         const index::KeyIndex& index, index::SearchOptions& options) const;
  SearchFunction Search(const HeadTrace& trace, const StoredHead& head,
                        const index::KeyIndex& index, PieceRunner& runner) const;
  /// The same, of a daemon.
  SearchFunction Search(DaemonHead& head, IndexKind index) const;
  /// Adds what is not as it is by default, but for the threshold.
  void Describe(nlohmann::ordered_json& settings) const;
  /// Adds the threshold of `options`, if there is one.
  void DescribeThreshold(const index::SearchOptions& options,
                         nlohmann::ordered_json& settings) const;
  /// What these added, for a table.
  static std::string Text(const nlohmann::ordered_json& settings);
};

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_POLICY_FLAGS_H_
