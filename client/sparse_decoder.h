// The decoder's side of a step: what an inference engine calls once per layer and step.
//
// The GPU keeps each sequence's steady zone (sink and recent tokens) in pages; daemons keep all
// older tokens. A step's attention over everything is put together from both:
//
//   auto decoder = kvseek::SparseDecoder::Create(options, {{.address = "unix:/run/kvseek.sock"}});
//   auto sequence = (*decoder)->Open();
//   (*decoder)->BeginPrefill(*sequence, prompt_tokens);
//   for each layer: (*decoder)->PrefillLayer(*sequence, layer, {keys, values, ...}, stream);
//   for each step:
//     (*decoder)->BeginStep({*sequence, ...}, /*query_tokens=*/1, stream);
//     for each layer: (*decoder)->Attend(layer, queries, keys, values, out, stream);
//     // and, where speculated tokens were refused: Truncate(*sequence, tokens)
//
// Attend appends the step's keys and values to the steady zone, attends to it on the GPU, and
// meanwhile asks the daemons, for each KV head in one of three ways (HeadMode). Tokens go to the
// daemons in blocks, by a thread and a stream of their own, long before they leave the steady zone.
//
// A daemon that does not answer in time, or answers with an error, is a miss: its heads take what
// Fallback says, the miss is counted, and the step goes on. Nothing waits past layer_deadline.
//
// KV heads are spread over the daemons in equal runs. Of tensor-parallel ranks each has a
// SparseDecoder of its own, whose shape has the rank's heads.
//
// Units: tokens, bytes, microseconds where a name says so. Tensors are row-major and contiguous
// device memory in shape.dtype, 16-byte aligned. A call uses the current device; all calls of a
// decoder must have the same, and those that take a stream the same stream. Thread safety: one
// thread at a time. Errors: invalid_argument naming the parameter, not_found for a sequence that is
// not open, resource_exhausted for a bound of DecoderOptions, failed_precondition for calls out of
// order, internal for a CUDA error; and what a daemon answered, where Fallback is kError.
#ifndef KVSEEK_CLIENT_SPARSE_DECODER_H_
#define KVSEEK_CLIENT_SPARSE_DECODER_H_

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/decoder/head_modes.h"
#include "client/kv_client.h"

namespace kvseek {

/// What takes a daemon's place in a step that it missed.
enum class Fallback : uint8_t {
  kSteadyZone,  ///< nothing: those heads attend to the steady zone alone
  kLocalCopy,   ///< exact attention to a copy in pinned host memory, over the bus
  kError,       ///< Attend returns the daemon's error; Truncate takes the step's tokens back
};

struct DecoderOptions {
  ModelShape shape{};             ///< of this rank; dims at most 256, group at most 64
  uint32_t sequences_max = 16;    ///< open at once
  uint32_t query_tokens_max = 1;  ///< of a step, 1..64 (speculative decoding needs more than one)

  // The steady zone. Multiples of kPageTokens.
  uint32_t sink_tokens = 16;
  uint32_t recent_tokens = 512;  ///< at least block_tokens + query_tokens_max
  uint32_t block_tokens = 64;    ///< tokens go to the daemons in blocks of so many

  /// (layers, kv_heads), or empty: kAuto for all. See `kvseek plan` for finding streaming heads.
  std::vector<HeadMode> head_modes{};
  uint32_t rows = 256;        ///< kRows: keys of each KV head that a daemon returns; 0: never kRows
  uint32_t cache_rows = 512;  ///< kRows: rows that stay in HBM for each (sequence, layer, KV head);
                              ///< at least rows * query_tokens_max
  SearchOptions search{};     ///< of every request

  std::chrono::microseconds layer_deadline{50000};   ///< of one layer's answers
  std::chrono::milliseconds append_deadline{10000};  ///< of one block's way to a daemon
  Fallback fallback = Fallback::kSteadyZone;
  uint64_t local_tokens_max = 0;  ///< kLocalCopy: tokens of all sequences that pinned memory holds
  uint32_t prefill_chunk_tokens = 2048;  ///< of one Append while a prompt is sent
  OpenOptions open{};                    ///< of the sessions on the daemons
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

using SequenceId = uint32_t;

class SparseDecoder {
 public:
  /// Connects to every daemon, and allocates all memory that it will ever use. The number of
  /// daemons divides shape.kv_heads. With a `spin` longer than an answer takes, neither the
  /// client's thread nor the caller's has to be woken up for it.
  static absl::StatusOr<std::unique_ptr<SparseDecoder>> Create(
      const DecoderOptions& options, const std::vector<ClientOptions>& daemons);
  /// Waits for blocks under way, and closes the sessions.
  ~SparseDecoder();
  SparseDecoder(const SparseDecoder&) = delete;
  SparseDecoder& operator=(const SparseDecoder&) = delete;

  /// An empty sequence, with a session on every daemon.
  absl::StatusOr<SequenceId> Open();
  absl::Status Close(SequenceId sequence);
  /// Tokens held, those of a step under way included.
  absl::StatusOr<uint64_t> Tokens(SequenceId sequence) const;

  /// The next `tokens` tokens of a sequence, to be given layer by layer: every layer once, in any
  /// order. A prompt may come in several such turns.
  absl::Status BeginPrefill(SequenceId sequence, uint64_t tokens);
  /// Sends one layer to the daemons and keeps what belongs to the steady zone. The tensors may be
  /// written again once it returns: a GPU needs room for one layer's only. `stream` is where they
  /// were written.
  absl::Status PrefillLayer(SequenceId sequence, uint32_t layer, const PrefillTensors& tensors,
                            cudaStream_t stream);

  /// Starts a step of `query_tokens` new tokens for each of `batch` (distinct, 1..sequences_max).
  absl::Status BeginStep(absl::Span<const SequenceId> batch, uint32_t query_tokens,
                         cudaStream_t stream);
  /// One layer of the step, in any order, each once. Shapes, in the batch's order: queries (batch,
  /// query_tokens, query_heads, key_dim) unscaled, keys (batch, query_tokens, kv_heads, key_dim),
  /// values likewise, out (batch, query_tokens, query_heads, value_dim). A query token sees all
  /// tokens up to itself. `out` is ready when the stream is; the call itself waits for the answers.
  absl::Status Attend(uint32_t layer, const void* queries, const void* keys, const void* values,
                      void* out, cudaStream_t stream);

  /// Keeps the first `tokens` tokens of a sequence: drops speculated tokens that were refused.
  absl::Status Truncate(SequenceId sequence, uint64_t tokens);
  /// Waits until the daemons hold all whole blocks of all sequences, or `timeout` has passed
  /// (deadline_exceeded).
  absl::Status Flush(std::chrono::milliseconds timeout);

  DecoderStats stats() const;
  /// Of all that Create allocated.
  uint64_t device_bytes() const;
  uint64_t pinned_bytes() const;

 private:
  class Impl;
  explicit SparseDecoder(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvseek

#endif  // KVSEEK_CLIENT_SPARSE_DECODER_H_
