// Sends tokens to the daemons off the decoder's critical path.
//
// Blocks of decoded tokens are packed out of the steady zone's pages by a stream, and appended by a
// thread, of the uploader's own: all layers of a block, then the block counts as held. Chunks of a
// prompt are packed from the engine's tensors and appended by the caller's thread (PrefillChunks).
// Both also fill the local copy, where there is one.
#ifndef KVSEEK_CLIENT_DECODER_BLOCK_UPLOADER_H_
#define KVSEEK_CLIENT_DECODER_BLOCK_UPLOADER_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "client/decoder/far_attention.h"
#include "client/decoder/far_store.h"
#include "client/decoder/gpu_memory.h"
#include "kernels/cuda/kv_pages.h"

namespace kvseek::client {

/// Where the rows of a packed chunk of `tokens` tokens stand: for each share its keys (tokens,
/// heads, key_dim), then its values.
struct ChunkLayout {
  uint32_t key_dim = 0;
  uint32_t value_dim = 0;
  uint64_t tokens = 0;

  size_t Keys(const DaemonShare& share) const {
    return tokens * share.first_head * (key_dim + value_dim);
  }
  size_t Values(const DaemonShare& share) const {
    return Keys(share) + tokens * share.heads * key_dim;
  }
};

/// Queries of some tokens of a chunk: for each share (positions, its query heads, key_dim).
struct ChunkQueries {
  std::vector<uint64_t> positions;  ///< ascending; none: no queries go along
  const uint16_t* rows = nullptr;
  size_t head_elements = 0;  ///< of one token's queries of one KV head

  SampledQueries Of(const DaemonShare& share) const {
    const size_t elements = positions.size() * head_elements;
    return {positions, {rows + elements * share.first_head, elements * share.heads}};
  }
};

/// Appends of one store that are under way together. One status a daemon.
class Appends {
 public:
  explicit Appends(size_t daemons) : statuses_(daemons) {}

  /// `chunk` and the rows of `queries` stay valid until Wait returns. Sessions that are lost are
  /// left out.
  void Start(const std::vector<DaemonShare>& shares, const FarStore& store, uint32_t layer,
             uint64_t start, const ChunkLayout& layout, const uint16_t* chunk,
             const CallOptions& call, const ChunkQueries& queries = {});
  /// Until all have been answered: at their deadlines at the latest. The first error of each
  /// daemon.
  std::vector<absl::Status> Wait();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int under_way_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<absl::Status> statuses_ ABSL_GUARDED_BY(mutex_);
};

/// Tokens [start, start + slots.size()) of a sequence, in the pages.
struct Block {
  std::shared_ptr<FarStore> store;
  uint64_t start = 0;
  std::vector<int32_t> slots;        ///< in the steady zone's pools
  std::vector<int32_t> local_slots;  ///< in the local copy; empty: there is none
};

class BlockUploader {
 public:
  struct Options {
    ModelShape shape;
    std::vector<DaemonShare> shares;
    std::vector<kernels::cuda::PagePool> pools;  ///< the steady zone's, one a layer
    uint32_t block_tokens = 64;
    CallOptions call;                           ///< deadline of one Append
    std::chrono::milliseconds patience{10000};  ///< with a daemon that cannot be reached
  };

  /// `local` must outlive the uploader.
  BlockUploader(Options options, LocalCopy& local);
  ~BlockUploader();
  BlockUploader(const BlockUploader&) = delete;
  BlockUploader& operator=(const BlockUploader&) = delete;

  /// Allocates, and starts the thread. Once.
  absl::Status Start(size_t& pinned_bytes);
  /// Sends blocks in this order. Their rows are in the pages when what is on `stream` now is done.
  absl::Status Enqueue(std::vector<Block> blocks, cudaStream_t stream);
  /// Until no block of `store` (null: of any) is under way; false if that takes longer.
  bool Drain(const FarStore* store, std::chrono::milliseconds timeout);

  uint64_t blocks_sent() const;
  uint64_t bytes_packed() const;
  uint64_t sessions_lost() const;
  /// A daemon will not get what it would need to go on with a sequence.
  void MarkLost(FarStore& store, size_t daemon);

 private:
  struct Batch {
    std::vector<Block> blocks;
    GpuEvent ready;
  };

  void Run();
  void Send(const Block& block);
  absl::Status Pack(const Block& block);
  void AppendAll(const Block& block);
  void WriteLocal(const Block& block);

  const Options options_;
  LocalCopy& local_;
  size_t layer_elements_ = 0;
  GpuStream stream_;
  PinnedArray<uint16_t> staging_;  ///< (layers, one packed block)
  PinnedArray<int32_t> slots_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Batch> queue_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t blocks_sent_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t bytes_packed_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t sessions_lost_ ABSL_GUARDED_BY(mutex_) = 0;
  std::thread thread_;
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_BLOCK_UPLOADER_H_
