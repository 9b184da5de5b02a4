// What a SparseDecoder is told, and what it tells (client/sparse_decoder.h).
#ifndef KVSEEK_CLIENT_DECODER_DECODER_OPTIONS_H_
#define KVSEEK_CLIENT_DECODER_DECODER_OPTIONS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "client/head_plan.h"
#include "client/kv_client.h"

namespace kvseek {

/// What takes a daemon's place in a step that it missed.
enum class Fallback : uint8_t {
  kSteadyZone,  ///< nothing: those heads attend to the steady zone alone
  kLocalCopy,   ///< exact attention to a copy in pinned host memory, over the bus
  kError,       ///< Attend returns the daemon's error; Truncate takes the step's tokens back
};

/// How a layer's questions get to a daemon, and its answers back.
enum class FarPath : uint8_t {
  kRequests,  ///< the thread that calls Attend sends requests and waits for the answers
  /// Kernels ask, and wait, in memory shared with the daemon (client/doorbell.h): Attend only
  /// enqueues, and a CUDA graph may hold the layers of a step. One daemon on this host, rows 0, no
  /// head in kLocal, Fallback::kSteadyZone.
  kDoorbell,
};

struct DecoderOptions {
  ModelShape shape{};             ///< of this rank; dims at most 256, group at most 64
  uint32_t sequences_max = 16;    ///< open at once
  uint32_t query_tokens_max = 1;  ///< of a step, 1..64 (speculative decoding needs more than one)

  // The steady zone. Multiples of kPageTokens.
  uint32_t sink_tokens = 16;
  uint32_t recent_tokens = 512;  ///< at least block_tokens + query_tokens_max
  uint32_t block_tokens = 64;    ///< tokens go to the daemons in blocks of so many

  /// Mode and k of each KV head; index and candidates go to the daemons when a sequence is opened.
  /// Heads that it does not name are in kAuto. MeasureFarMass (kernels/cuda/query_statistics.h)
  /// finds streaming heads, PlanOfModes makes a plan of them.
  HeadPlan plan{};
  uint32_t rows = 256;        ///< kRows: keys of each KV head that a daemon returns, where the plan
                              ///< has no k; 0: never kRows
  uint32_t cache_rows = 512;  ///< kRows: rows that stay in HBM for each (sequence, layer, KV head);
                              ///< at least query_tokens_max times rows and times each k
  SearchOptions search{};     ///< of every request
  FarPath far_path = FarPath::kRequests;

  std::chrono::microseconds layer_deadline{50000};   ///< of one layer's answers
  std::chrono::milliseconds append_deadline{10000};  ///< of one block's way to a daemon
  Fallback fallback = Fallback::kSteadyZone;
  uint64_t local_tokens_max = 0;  ///< kLocalCopy: tokens of all sequences that pinned memory holds
  uint32_t prefill_chunk_tokens = 2048;  ///< of one Append while a prompt is sent
  OpenOptions open{};                    ///< of the sessions on the daemons; without a plan
};

inline constexpr uint32_t kPageTokens = 16;  ///< of a page of the steady zone

/// One layer's keys and values of the tokens of BeginPrefill: row (t, h) at keys + t * token_stride
/// + h * head_stride elements, values likewise. Strides are multiples of 8.
struct PrefillTensors {
  const void* keys = nullptr;
  const void* values = nullptr;
  int64_t key_token_stride = 0;  ///< 0: contiguous (tokens, kv_heads, key_dim)
  int64_t key_head_stride = 0;
  int64_t value_token_stride = 0;
  int64_t value_head_stride = 0;
  /// The tokens' queries after positional encoding, unscaled: token t's (query_heads, key_dim) at
  /// queries + t * query_token_stride. Where the daemons build indexes that learn from queries
  /// (open.build has kCluster, kGraph or kProduct), a sample of them goes along. Null: none does.
  const void* queries = nullptr;
  int64_t query_token_stride = 0;  ///< elements; 0: contiguous
};

/// Sums since Create. Times are of the host's clock.
struct DecoderStats {
  uint64_t layers = 0;        ///< calls of Attend
  uint64_t layers_asked = 0;  ///< of them, those that asked a daemon
  uint64_t requests = 0;      ///< Attend and TopK requests sent
  uint64_t misses = 0;        ///< requests without an answer in time, or not sent to a lost session
  uint64_t misses_deadline = 0;     ///< of them, by deadline
  uint64_t misses_unavailable = 0;  ///< of them, daemon not reachable
  uint64_t fallbacks = 0;           ///< layers in which at least one head took the fallback
  uint64_t rows_asked = 0;          ///< rows that kRows heads attended to
  uint64_t rows_cached = 0;         ///< of them, those that were in HBM already
  uint64_t bytes_to_host = 0;       ///< over the bus, queries and blocks
  uint64_t bytes_to_device = 0;     ///< over the bus, rows and states
  uint64_t blocks_sent = 0;         ///< blocks that all daemons hold
  uint64_t sequences_lost = 0;      ///< sessions that a daemon no longer has
  uint64_t queries_us = 0;          ///< from Attend's begin until the queries were in host memory
  uint64_t asking_us = 0;           ///< from then until all answers were there, or missed
  uint64_t daemon_us = 0;           ///< of that, the slowest daemon's own time in it, as it says
  uint64_t placing_us = 0;          ///< from then until the last kernel of the layer was launched
};

namespace client {

/// invalid_argument that names the field; `daemons` is how many there are.
absl::Status CheckOptions(const DecoderOptions& options, size_t daemons);

/// The most keys that a daemon returns for a KV head; 0: no head is ever in kRows.
uint32_t RowsMax(const DecoderOptions& options);

}  // namespace client
}  // namespace kvseek

#endif  // KVSEEK_CLIENT_DECODER_DECODER_OPTIONS_H_
