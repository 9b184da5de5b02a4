// A sequence's tokens outside of the GPU: the sessions on the daemons that hold them and, where
// the decoder keeps one, the exact copy in pinned host memory.
#ifndef KVSEEK_CLIENT_DECODER_FAR_STORE_H_
#define KVSEEK_CLIENT_DECODER_FAR_STORE_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "client/decoder/far_attention.h"
#include "client/decoder/gpu_memory.h"
#include "client/decoder/steady_zone.h"
#include "client/kv_client.h"
#include "kernels/cuda/kv_pages.h"

namespace kvseek::client {

/// Pinned memory for the exact copy of all sequences, in pages that kernels read over the bus.
class LocalCopy {
 public:
  /// Room for `tokens` tokens of every layer, rounded up to whole pages; 0: none.
  absl::Status Allocate(const ModelShape& shape, uint64_t tokens, uint32_t page_tokens,
                        size_t& pinned_bytes);
  bool exists() const { return !pools_.empty(); }
  const kernels::cuda::PagePool& pool(uint32_t layer) const { return pools_[layer]; }

  /// Makes `pages` long enough for `tokens` tokens. False, with nothing taken, if pages ran out.
  bool Grow(std::vector<int32_t>& pages, uint64_t tokens);
  /// Keeps the pages of the first `tokens` tokens.
  void Shrink(std::vector<int32_t>& pages, uint64_t tokens);
  /// The places (page * page_tokens + place in the page) of `count` tokens from position `start`
  /// on.
  std::vector<int32_t> Slots(const std::vector<int32_t>& pages, uint64_t start,
                             uint64_t count) const;
  /// Copies rows of KV heads [first_head, first_head + heads) to their places: keys (slots, heads,
  /// key_dim), values likewise. Any thread, for places that no other writes to.
  void Write(uint32_t layer, absl::Span<const int32_t> slots, uint32_t first_head, uint32_t heads,
             const uint16_t* keys, const uint16_t* values);

 private:
  uint32_t page_tokens_ = 0;
  std::vector<PinnedArray<uint16_t>> memory_;
  std::vector<kernels::cuda::PagePool> pools_;  ///< (layers)
  PageAllocator free_{0};
};

/// One sequence outside of the GPU. The atomic members are written by the uploader's thread too,
/// the others by the decoder's alone; blocks under way hold a reference.
struct FarStore {
  std::vector<Session> sessions;           ///< one a daemon
  std::vector<std::atomic<uint8_t>> lost;  ///< one a daemon: it no longer has the session
  std::atomic<uint64_t> held{0};           ///< tokens that every daemon that is not lost holds
  std::atomic<int> blocks_under_way{0};
  std::vector<int32_t> local_pages;  ///< of LocalCopy, in the order of positions

  explicit FarStore(size_t daemons) : sessions(daemons), lost(daemons) {}
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_FAR_STORE_H_
