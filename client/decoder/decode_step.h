// One decode step on the GPU, layer by layer: the memory that it needs and the order of its parts.
//
// For each layer, on the caller's stream and thread:
//
//   stream  queries to host |     | new rows into pages, steady zone | waits | rows, merge
//   thread                  | ask | launch all that, wait for the daemons .. | permit
//
// With a doorbell there is no thread: the stream rings, attends to the steady zone, waits and
// merges. With rows to come, what the stream does with them is launched when they are there. Owns
// the pools of pages (steady zone and row cache) of all layers. Not thread-safe.
#ifndef KVSEEK_CLIENT_DECODER_DECODE_STEP_H_
#define KVSEEK_CLIENT_DECODER_DECODE_STEP_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "client/decoder/decoder_options.h"
#include "client/decoder/doorbell_path.h"
#include "client/decoder/far_answers.h"
#include "client/decoder/far_attention.h"
#include "client/decoder/far_store.h"
#include "client/decoder/gpu_memory.h"
#include "client/decoder/head_modes.h"
#include "client/decoder/steady_zone.h"
#include "client/decoder/step_sequence.h"
#include "kernels/cuda/attention.h"

namespace kvseek::client {

class DecodeStep {
 public:
  /// `spin`: how long an answer is looked for before the thread sleeps. `local` must outlive it.
  DecodeStep(const DecoderOptions& options, const ZoneShape& zone, std::vector<DaemonShare> shares,
             std::chrono::microseconds spin, LocalCopy& local);

  /// Once, before all else. The totals grow by what is taken.
  absl::Status Allocate(size_t& device_bytes, size_t& pinned_bytes);
  const std::vector<kernels::cuda::PagePool>& pools() const { return pools_; }
  const std::vector<DaemonShare>& shares() const { return far_.shares(); }

  /// The zones hold the step's new tokens already, as their last ones.
  absl::Status Begin(std::vector<StepSequence> batch, uint32_t tokens, cudaStream_t stream);
  /// See SparseDecoder::Attend.
  absl::Status Attend(uint32_t layer, const void* queries, const void* keys, const void* values,
                      void* out, cudaStream_t stream);

  /// Sums of what Attend counts, and of what kernels do; the other members are zero.
  DecoderStats stats() const;
  /// See SparseDecoder.
  uint64_t DaemonNanoseconds(uint32_t layer) const;

 private:
  absl::Status AttendByDoorbell(uint32_t layer, const void* queries, const void* keys,
                                const void* values, void* out, cudaStream_t stream);

  /// Parts of one layer's attention that are there to be merged.
  struct Parts {
    bool rest = false;   ///< states of daemons
    bool rows = false;   ///< rows of daemons
    bool local = false;  ///< some sequence takes the local copy
  };

  size_t Heads() const { return batch_.size() * tokens_ * options_.shape.query_heads; }
  absl::Status LoadKernels();
  absl::Status WriteTables(cudaStream_t stream);
  void FindFar();
  absl::Status AskDaemons(uint32_t layer, const void* queries, const std::vector<HeadMode>& modes,
                          cudaStream_t stream);
  absl::Status WaitForQueries(size_t bytes, cudaStream_t stream);
  absl::Status AttendSteadyZone(uint32_t layer, const void* queries, const void* keys,
                                const void* values, cudaStream_t stream);
  absl::Status MergeAhead(uint32_t layer, const void* queries, void* out, cudaStream_t stream);
  absl::Status TakeReplies(uint32_t layer, Parts& parts);
  void CountMiss(const absl::Status& status);
  void FallBack(Parts& parts);
  void ListLocal(size_t b);
  absl::Status FinishLayer(uint32_t layer, const Parts& parts, const void* queries, void* out,
                           cudaStream_t stream);
  absl::Status AttendRows(uint32_t layer, const void* queries, cudaStream_t stream);
  absl::Status AttendLocal(uint32_t layer, const void* queries, cudaStream_t stream);
  kernels::cuda::PageQueries Queries(const void* queries, uint32_t tokens, bool causal) const;

  const DecoderOptions options_;
  const ZoneShape zone_;
  LocalCopy& local_;
  FarAttention far_;
  std::unique_ptr<DoorbellPath> doorbell_;  ///< FarPath::kDoorbell only
  ModeChooser modes_;
  FarAnswers answers_;                     ///< of this layer
  const std::vector<uint32_t> head_rows_;  ///< (layers, kv_heads)
  DecoderStats stats_;

  std::vector<StepSequence> batch_;
  uint32_t tokens_ = 0;
  std::vector<FarSequence> far_sequences_;  ///< (batch)
  std::vector<std::vector<uint8_t>> lost_;  ///< (batch, daemons), as the step knows it
  bool any_far_ = false;
  std::vector<uint8_t> missed_;    ///< (batch), of this layer
  std::vector<int64_t> local_at_;  ///< (batch): where its pages are in local_pages_, or -1
  size_t local_listed_ = 0;

  // Pools: (layers).
  std::vector<DeviceArray<uint16_t>> pool_memory_;
  std::vector<kernels::cuda::PagePool> pools_;
  std::vector<kernels::cuda::PagePool> cache_pools_;

  // What the step's kernels read: slots of the new tokens, pages and counts of the steady zone.
  PinnedArray<int32_t> tables_;
  DeviceArray<int32_t> device_tables_;
  size_t counts_at_ = 0;  ///< offsets in the tables
  size_t pages_at_ = 0;
  GpuEvent tables_copied_;

  PinnedArray<uint16_t> queries_;
  PinnedArray<uint32_t> queries_flags_;
  uint32_t queries_number_ = 0;  ///< of the last that were published

  PinnedArray<uint32_t> rest_permit_;      ///< lets the merge that was launched ahead go on
  uint32_t rest_number_ = 0;               ///< of the last that waits for it
  DeviceArray<int32_t> device_row_lists_;  ///< answers_.row_lists()
  PinnedArray<int32_t> local_pages_;       ///< of the sequences that fell back in this step
  PinnedArray<int32_t> local_counts_;      ///< (batch): rows there that this layer attends to

  // States on the GPU: steady zone, rows, local copy.
  DeviceArray<float> steady_out_, steady_lse_, rows_out_, rows_lse_, local_out_, local_lse_;
  DeviceArray<uint8_t> workspace_;

  // For the choice between rows and state: (layers).
  struct Timing {
    GpuEvent begin;
    GpuEvent end;
    double host_us = 0.0;
    bool valid = false;
  };
  std::vector<Timing> timings_;
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_DECODE_STEP_H_
