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
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/decoder/decoder_options.h"
#include "client/kv_client.h"

namespace kvseek {

using SequenceId = uint32_t;

class SparseDecoder {
 public:
  /// Connects to every daemon, and allocates all device and pinned memory that it
  /// will ever use. The number of
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
  /// Sends one layer to the daemons and keeps what belongs to the steady zone. Queries that come
  /// along are what the daemons' indexes learn from (PrefillTensors::queries). The tensors may be
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
  /// tokens up to itself. `out` is ready when the stream is; the call itself waits for the answers,
  /// but with FarPath::kDoorbell only enqueues. There a CUDA graph may hold the layers of a step:
  /// it is captured after a BeginStep, and may be launched after any later one of as many sequences
  /// and query tokens, in place of the calls of Attend, with the same tensors.
  absl::Status Attend(uint32_t layer, const void* queries, const void* keys, const void* values,
                      void* out, cudaStream_t stream);

  /// Keeps the first `tokens` tokens of a sequence: drops speculated tokens that were refused.
  absl::Status Truncate(SequenceId sequence, uint64_t tokens);
  /// Waits until the daemons hold all whole blocks of all sequences, or `timeout` has passed
  /// (deadline_exceeded).
  absl::Status Flush(std::chrono::milliseconds timeout);

  /// Counts calls: of layers that a graph launches anew only misses and fallbacks are counted.
  DecoderStats stats() const;
  /// FarPath::kDoorbell: the daemon's own time in its last answer about a layer, in nanoseconds.
  /// For when the stream is idle.
  uint64_t daemon_ns(uint32_t layer) const;
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
