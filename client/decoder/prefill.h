// Sends a prompt's keys and values to the daemons, layer by layer and chunk by chunk, and puts the
// steady zone's tokens into their pages.
//
// A chunk is packed out of the engine's tensors into pinned memory by a stream of its own; while
// the daemons take one chunk the next is packed. The caller's thread does the waiting. Queries of
// about 1 token in 32 go with the chunks, where the engine gives them and the daemons build indexes
// that learn from them. Not thread-safe.
#ifndef KVSEEK_CLIENT_DECODER_PREFILL_H_
#define KVSEEK_CLIENT_DECODER_PREFILL_H_

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "client/decoder/block_uploader.h"
#include "client/decoder/decoder_options.h"
#include "client/decoder/far_attention.h"
#include "client/decoder/far_store.h"
#include "client/decoder/gpu_memory.h"
#include "client/decoder/steady_zone.h"
#include "kernels/cuda/kv_pages.h"

namespace kvseek::client {

class Prefill {
 public:
  /// `local` must outlive it.
  Prefill(const DecoderOptions& options, const ZoneShape& zone, std::vector<DaemonShare> shares,
          std::vector<kernels::cuda::PagePool> pools, LocalCopy& local);

  /// Once, before all else.
  absl::Status Allocate(size_t& device_bytes, size_t& pinned_bytes);

  /// Tokens [start, start + tokens) of one layer. The zone has places for those that belong there;
  /// the store's local pages cover all. Returns when the daemons hold them and the tensors may be
  /// written again.
  absl::Status SendLayer(const SteadyZone& zone, FarStore& store, uint32_t layer, uint64_t start,
                         uint64_t tokens, const PrefillTensors& tensors, cudaStream_t stream);

  uint64_t bytes_packed() const { return bytes_packed_; }

 private:
  /// Rows on their way.
  struct Chunk {
    PinnedArray<uint16_t> rows;
    PinnedArray<uint16_t> query_rows;  ///< none: no index learns from queries
    ChunkQueries queries;
    std::unique_ptr<Appends> appends;
  };
  /// With the strides filled in.
  PrefillTensors Complete(const PrefillTensors& tensors) const;
  /// Until the daemons hold what the chunk's rows were; the first error.
  absl::Status Finish(Chunk& chunk);
  absl::Status Pack(Chunk& chunk, const PrefillTensors& tensors, uint64_t first, uint64_t tokens);
  /// Starts to copy the queries of every `stride`th token of the tensors that is in the chunk.
  absl::Status PackQueries(Chunk& chunk, const PrefillTensors& tensors, uint64_t start,
                           uint64_t first, uint64_t tokens, uint64_t stride);
  absl::Status KeepInZone(const SteadyZone& zone, uint32_t layer, uint64_t start, uint64_t begin,
                          uint64_t end, const PrefillTensors& tensors);
  void WriteLocal(FarStore& store, uint32_t layer, uint64_t start, uint64_t tokens,
                  const uint16_t* rows);

  const DecoderOptions options_;
  const ZoneShape zone_;
  const std::vector<DaemonShare> shares_;
  const std::vector<kernels::cuda::PagePool> pools_;
  LocalCopy& local_;
  GpuStream stream_;
  GpuEvent ready_;
  std::array<Chunk, 2> chunks_;
  DeviceArray<uint16_t> zone_keys_, zone_values_;  ///< rows on their way into the pages
  PinnedArray<int32_t> zone_slots_;
  uint64_t bytes_packed_ = 0;
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_PREFILL_H_
