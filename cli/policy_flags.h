// Flags of `kvseek eval` for what stands above any index: budgets by mass and beta, voting, reuse.
#ifndef KVSEEK_CLI_POLICY_FLAGS_H_
#define KVSEEK_CLI_POLICY_FLAGS_H_

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/daemon_search.h"
#include "cli/library_search.h"
#include "client/kv_client.h"
#include "index/key_index.h"
#include "index/reuse.h"

namespace kvseek::cli {

struct PolicyFlags {
  float mass = 0.0F;
  float beta = 0.0F;
  std::string vote = "sum";
  int reuse = 0;  ///< search at least every so many steps; 0: steps are on their own
  index::ReuseOptions reuse_options;

  void AddOptions(CLI::App& command);
  /// Whether something is set that a daemon cannot be asked for.
  bool HereOnly() const {
    const index::ReuseOptions usual;
    return reuse_options.samples != usual.samples || reuse_options.tolerance != usual.tolerance;
  }
  void Apply(index::SearchOptions& options) const;
  SearchFunction Search(const HeadTrace& trace, const StoredHead& head,
                        const index::KeyIndex& index, PieceRunner& runner) const;
  /// The same, of a daemon.
  SearchFunction Search(DaemonHead& head, IndexKind index) const;
  /// Adds what is not as it is by default.
  void Describe(nlohmann::ordered_json& settings) const;
  /// What Describe added, for a table.
  static std::string Text(const nlohmann::ordered_json& settings);
};

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_POLICY_FLAGS_H_
