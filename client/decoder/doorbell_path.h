// The way of a step's questions that needs no thread of the client: kernels ring the daemon's
// doorbell (client/doorbell.h) and wait for its answers. Everything is enqueued on the step's
// stream, and all that a step has of its own is in device memory by then, so a CUDA graph may hold
// Ring and Await of all layers.
//
// One daemon, all KV heads in state mode. Owns the doorbell and its registration with the device.
// Not thread-safe.
#ifndef KVSEEK_CLIENT_DECODER_DOORBELL_PATH_H_
#define KVSEEK_CLIENT_DECODER_DOORBELL_PATH_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "client/decoder/decoder_options.h"
#include "client/decoder/far_attention.h"
#include "client/decoder/gpu_memory.h"
#include "client/doorbell.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/doorbell.h"

namespace kvseek::client {

class DoorbellPath {
 public:
  explicit DoorbellPath(const DecoderOptions& options) : options_(options) {}
  /// Waits for the device, which may still look at the memory.
  ~DoorbellPath();
  DoorbellPath(const DoorbellPath&) = delete;
  DoorbellPath& operator=(const DoorbellPath&) = delete;

  /// Once: opens a doorbell of `daemon` for the largest step, and loads the kernels. The totals
  /// grow by what is taken.
  absl::Status Open(const ClientOptions& daemon, size_t& device_bytes, size_t& pinned_bytes);

  /// What the next step asks about: enqueues a copy of it. The last one's must have been done.
  absl::Status BeginStep(absl::Span<const FarSequence> batch, uint32_t tokens, cudaStream_t stream);
  /// The layer's queries (batch, tokens, query_heads, key_dim), shape.dtype, device memory.
  absl::Status Ring(uint32_t layer, const void* queries, cudaStream_t stream);
  /// Waits for the answer and merges it with `local`, one state of all heads (batch, tokens,
  /// query_heads), to `out`, shape.dtype; without an answer that is all.
  absl::Status Await(uint32_t layer, const kernels::cuda::StateList& local, void* out,
                     cudaStream_t stream);

  /// The daemon's own time in its last answer about a layer.
  uint64_t DaemonNanoseconds(uint32_t layer) const;
  /// Adds what kernels have counted until now.
  void AddTo(DecoderStats& stats) const;

 private:
  absl::Status LoadKernels();
  uint64_t Heads() const { return uint64_t{items_} * tokens_ * options_.shape.query_heads; }

  const DecoderOptions options_;
  std::unique_ptr<Doorbell> doorbell_;
  bool registered_ = false;
  std::vector<kernels::cuda::DoorbellSlot> slots_;  ///< (layers)
  DeviceArray<kernels::cuda::DoorbellState> slot_states_;
  PinnedArray<uint8_t> next_step_;  ///< a DoorbellStep and the question behind it
  DeviceArray<uint8_t> step_;
  PinnedArray<kernels::cuda::DoorbellFaults> faults_;
  uint32_t items_ = 1;
  uint32_t tokens_ = 1;
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_DOORBELL_PATH_H_
