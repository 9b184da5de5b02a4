// What `kvseek demo` does: two recorded heads become one layer of one session of a running daemon,
// and every decode step is answered in several ways, each compared with full attention in double
// precision.
#ifndef KVSEEK_CLI_DEMO_H_
#define KVSEEK_CLI_DEMO_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/progress.h"
#include "client/kv_client.h"

namespace kvseek::cli {

struct DemoOptions {
  std::string data;  ///< directory of the code8.* traces
  int steps = 128;   ///< of the trace's, evenly spread
  uint32_t candidates = 1024;
  uint32_t exact_rows = 64;
  uint32_t k = 256;  ///< rows of each KV head that TopK returns
};

/// One way of answering, over all steps; a step is one layer with both KV heads.
struct DemoRow {
  std::string name;
  double error_mean = 0.0;  ///< relative output error, over steps and query heads
  double error_p90 = 0.0;
  double error_max = 0.0;
  double keys_scanned = 0.0;  ///< a step, both KV heads, as are the next four
  double keys_fine = 0.0;     ///< read at 4 bits
  double keys_exact = 0.0;    ///< exact rows read
  double bytes_read = 0.0;
  double bytes_wire = 0.0;  ///< of the request's and the answer's frame
  double micros_p50 = 0.0;  ///< of a step, as the decoder sees it
  double micros_p99 = 0.0;
};

/// Error against bytes read for one budget.
struct DemoBudget {
  int64_t budget = 0;  ///< candidates, or k of the oracle
  double bytes_read = 0.0;
  double error_mean = 0.0;
};

struct DemoResult {
  int64_t tokens = 0;
  int steps = 0;
  double append_tokens_per_second = 0.0;
  std::vector<DemoRow> rows;
  std::vector<DemoBudget> ladder;  ///< Attend with 128 to 4096 candidates
  std::vector<DemoBudget> oracle;  ///< the true top k and nothing else, as many
};

absl::StatusOr<DemoResult> RunDemo(KvClient& client, const DemoOptions& options,
                                   Progress& progress);

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_DEMO_H_
