// Answers a trace's steps through a daemon: a session of one head, filled as a prefill would.
#ifndef KVSEEK_CLI_DAEMON_SEARCH_H_
#define KVSEEK_CLI_DAEMON_SEARCH_H_

#include <memory>

#include "absl/status/statusor.h"
#include "cli/build_index.h"
#include "cli/evaluation.h"
#include "cli/trace.h"
#include "client/kv_client.h"

namespace kvseek::cli {

/// Tokens of one append.
inline constexpr uint32_t kAppendTokens = 512;

/// A session that holds one head. Closes itself; the trace must outlive it. Not thread-safe.
class DaemonHead {
 public:
  /// For an index that the daemon builds, `build` says which; Open then waits until it is there. Of
  /// `settings`, what landmark takes counts: the others are the daemon's.
  static absl::StatusOr<std::unique_ptr<DaemonHead>> Open(KvClient& client, const HeadTrace& trace,
                                                          int scan_bits,
                                                          IndexKind build = IndexKind::kAuto,
                                                          const BuildSettings& settings = {});
  ~DaemonHead();
  DaemonHead(const DaemonHead&) = delete;
  DaemonHead& operator=(const DaemonHead&) = delete;

  /// A SearchFunction that asks for `index`; valid as long as this. With reuse_steps, steps that
  /// follow the one before them may be answered from its selection; any other begins anew.
  SearchFunction Search(IndexKind index, int reuse_steps = 0, int reuse_keep = 0);

 private:
  DaemonHead(KvClient& client, const HeadTrace& trace) : client_(client), trace_(trace) {}
  absl::Status WaitUntilBuilt();

  KvClient& client_;
  const HeadTrace& trace_;
  Session session_;
  bool open_ = false;
};

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_DAEMON_SEARCH_H_
