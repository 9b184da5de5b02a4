// What the daemons answered about one layer, laid out in pinned memory for the step's kernels:
// states among those of all heads, lists of rows in the cache, and the rows that it does not hold
// yet. Not thread-safe; not to be changed while a kernel reads it.
#ifndef KVSEEK_CLIENT_DECODER_FAR_ANSWERS_H_
#define KVSEEK_CLIENT_DECODER_FAR_ANSWERS_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "client/decoder/decoder_options.h"
#include "client/decoder/far_attention.h"
#include "client/decoder/gpu_memory.h"
#include "client/decoder/step_sequence.h"

namespace kvseek::client {

class FarAnswers {
 public:
  /// `cache_rows`: in the cache of a (sequence, KV head); `rows_max`: that a daemon returns for a
  /// KV head, 0: no rows are asked for.
  FarAnswers(const ModelShape& shape, uint32_t cache_rows, size_t rows_max)
      : shape_(shape), cache_rows_(cache_rows), rows_max_(rows_max) {}

  /// Once: room for `tokens` query tokens, those of all sequences. The total grows by what is
  /// taken.
  absl::Status Allocate(size_t tokens, size_t& pinned_bytes);

  /// Begins a layer of a step with `tokens` query tokens of each of `batch` sequences: nothing has
  /// been answered.
  void Clear(size_t batch, uint32_t tokens);
  /// A reply's states. Counts bytes_to_device. REQUIRES: reply.answer.ok(), also below.
  void PlaceState(const FarReply& reply, DecoderStats& stats);
  /// A reply's rows; they go into the books of the sequences' caches. Counts rows_asked,
  /// rows_cached and bytes_to_device.
  void PlaceRows(uint32_t layer, const FarReply& reply, absl::Span<const StepSequence> batch,
                 DecoderStats& stats);
  /// Takes out what was placed for one sequence of the batch.
  void Drop(size_t b);

  size_t rows_max() const { return rows_max_; }
  /// (batch, tokens, query_heads, value_dim) and (batch, tokens, query_heads); -infinity: no state.
  float* rest_out() const { return rest_out_.get(); }
  float* rest_lse() const { return rest_lse_.get(); }
  /// Counts (batch, tokens, kv_heads), then for each a list of rows_max places in the layer's
  /// cache.
  const int32_t* row_lists() const { return row_lists_.get(); }
  /// (arrivals, key_dim), (arrivals, value_dim), and their places in the layer's cache.
  const uint16_t* arrived_keys() const { return arrived_keys_.get(); }
  const uint16_t* arrived_values() const { return arrived_values_.get(); }
  const int32_t* arrived_slots() const { return arrived_slots_.get(); }
  size_t arrivals() const { return arrivals_; }

 private:
  void PlaceHeadRows(uint32_t layer, const FarReply& reply, absl::Span<const StepSequence> batch,
                     size_t item, size_t head, DecoderStats& stats);

  const ModelShape shape_;
  const uint32_t cache_rows_;
  const size_t rows_max_;
  size_t batch_ = 0;
  uint32_t tokens_ = 0;
  PinnedArray<float> rest_out_, rest_lse_;
  PinnedArray<uint16_t> arrived_keys_, arrived_values_;
  PinnedArray<int32_t> arrived_slots_;
  PinnedArray<int32_t> row_lists_;
  uint32_t arrivals_ = 0;
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_FAR_ANSWERS_H_
