// What `kvseek bench` does: fills a daemon's sessions with synthetic keys, then sends searches at
// random times of a given rate and counts each latency from when its request should have left (open
// loop: a slow daemon is not asked less); or one after the other over each connection, as decoders
// do. A request is one layer of one session, or of all sessions of its connection (a batch).
#ifndef KVSEEK_CLI_BENCH_H_
#define KVSEEK_CLI_BENCH_H_

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/progress.h"
#include "client/kv_client.h"
#include "index/key_index.h"

namespace kvseek::cli {

struct BenchOptions {
  ModelShape shape;
  uint32_t sessions = 2;
  uint32_t tokens = 16384;
  uint32_t scan_bits = 2;
  bool topk = false;  ///< TopK with rows and state; otherwise Attend
  uint32_t k = 256;
  SearchOptions search;
  /// Indexes that the sessions are opened with, from queries sampled with the tokens. Requests are
  /// then sent twice: while the daemon builds, and when it has built all.
  std::vector<IndexKind> build;
  /// A request carries all sessions of its connection; otherwise one.
  bool batch = false;
  /// Requests a second; one is a layer, one query token of each of its sessions, all heads. 0: over
  /// each connection one after the other, layer by layer.
  double rate = 100.0;
  /// Without a rate: who waits for an answer looks for it (KvClient::Poll) instead of sleeping.
  bool poll = false;
  double duration_s = 5.0;
  double warmup_s = 0.5;  ///< requests of that time are sent and not counted
  /// Afterwards, exact searches one after the other for so long, to compare with; 0: none. Attend
  /// only.
  double exact_s = 1.0;
  int deadline_ms = 1000;
  uint64_t seed = 1;
};

/// Requests whose intended time lies in the counted part.
struct BenchResult {
  uint64_t offered = 0;
  uint64_t answered = 0;
  uint64_t sessions_answered = 0;          ///< in them
  std::map<std::string, uint64_t> errors;  ///< by code
  double seconds = 0.0;                    ///< until the last answer, at least the duration
  double fill_seconds = 0.0;
  std::vector<double> micros;           ///< of answers
  std::vector<double> micros_building;  ///< of those that came while indexes were built
  uint64_t built_meanwhile = 0;         ///< indexes (of a layer's KV head) published then
  double build_seconds = 0.0;           ///< from the end of the filling until all were there
  std::vector<double> daemon_micros;    ///< of these, the daemon's own time
  uint64_t bytes_sent = 0;
  uint64_t bytes_received = 0;
  uint64_t keys_scanned = 0;
  uint64_t bytes_touched = 0;
  uint64_t sent = 0;  ///< requests of the warm-up, too
  /// Time of the daemon's workers while they were under way, whoever else asked included.
  std::array<double, index::kSearchPhases> phase_micros{};
  std::vector<double> exact_daemon_micros;  ///< of exact searches of the same layers
};

/// Bytes that the daemon needs for the sessions.
uint64_t BenchMemoryBytes(const BenchOptions& options);

/// Spreads sessions over `clients`, each a connection; no more clients than sessions where all of
/// them ask (a batch, or no rate). Closes the sessions afterwards. Fails if filling fails; failed
/// searches are counted.
absl::StatusOr<BenchResult> RunBench(const std::vector<std::unique_ptr<KvClient>>& clients,
                                     const BenchOptions& options, Progress& progress);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_BENCH_H_
