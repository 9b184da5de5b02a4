#include "client/decoder/block_uploader.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <utility>

namespace kvseek::client {
namespace {

constexpr std::chrono::milliseconds kRetryPause{50};

}  // namespace

void Appends::Start(const std::vector<DaemonShare>& shares, const FarStore& store, uint32_t layer,
                    uint64_t start, const ChunkLayout& layout, const uint16_t* chunk,
                    const CallOptions& call, const ChunkQueries& queries) {
  for (size_t d = 0; d < shares.size(); ++d) {
    if (store.lost[d].load() != 0) continue;
    const DaemonShare& share = shares[d];
    {
      const std::lock_guard lock(mutex_);
      ++under_way_;
    }
    const uint16_t* const keys = chunk + layout.Keys(share);
    const uint16_t* const values = chunk + layout.Values(share);
    share.tokens->AppendAsync(
        store.sessions[d], layer, start, static_cast<uint32_t>(layout.tokens),
        {keys, layout.tokens * share.heads * layout.key_dim},
        {values, layout.tokens * share.heads * layout.value_dim}, call,
        [this, d](const absl::StatusOr<uint64_t>& held) {
          const std::lock_guard lock(mutex_);
          if (!held.ok()) statuses_[d].Update(held.status());
          if (--under_way_ == 0) changed_.notify_all();
        },
        queries.Of(share));
  }
}

std::vector<absl::Status> Appends::Wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return under_way_ == 0; });
  return std::exchange(statuses_, std::vector<absl::Status>(statuses_.size()));
}

BlockUploader::BlockUploader(Options options, LocalCopy& local)
    : options_(std::move(options)), local_(local) {}

BlockUploader::~BlockUploader() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

absl::Status BlockUploader::Start(size_t& pinned_bytes) {
  const ModelShape& shape = options_.shape;
  layer_elements_ = static_cast<size_t>(options_.block_tokens) * shape.kv_heads *
                    (shape.key_dim + shape.value_dim);
  absl::Status status = staging_.Allocate(layer_elements_ * shape.layers, pinned_bytes);
  if (status.ok()) status = slots_.Allocate(options_.block_tokens, pinned_bytes);
  if (status.ok()) status = stream_.Create();
  if (!status.ok()) return status;
  int device = 0;
  cudaGetDevice(&device);
  thread_ = std::thread([this, device] {
    pthread_setname_np(pthread_self(), "kvseek-upload");
    cudaSetDevice(device);
    Run();
  });
  return absl::OkStatus();
}

absl::Status BlockUploader::Enqueue(std::vector<Block> blocks, cudaStream_t stream) {
  if (blocks.empty()) return absl::OkStatus();
  Batch batch;
  absl::Status status = batch.ready.Create(cudaEventDisableTiming);
  if (status.ok()) status = CudaStatus(cudaEventRecord(batch.ready.get(), stream), "event");
  if (!status.ok()) return status;
  for (const Block& block : blocks) block.store->blocks_under_way.fetch_add(1);
  batch.blocks = std::move(blocks);
  const std::lock_guard lock(mutex_);
  queue_.push_back(std::move(batch));
  changed_.notify_all();
  return absl::OkStatus();
}

bool BlockUploader::Drain(const FarStore* store, std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, timeout, [&] {
    return store != nullptr ? store->blocks_under_way.load() == 0 : queue_.empty();
  });
}

uint64_t BlockUploader::blocks_sent() const {
  const std::lock_guard lock(mutex_);
  return blocks_sent_;
}

uint64_t BlockUploader::bytes_packed() const {
  const std::lock_guard lock(mutex_);
  return bytes_packed_;
}

uint64_t BlockUploader::sessions_lost() const {
  const std::lock_guard lock(mutex_);
  return sessions_lost_;
}

void BlockUploader::MarkLost(FarStore& store, size_t daemon) {
  if (store.lost[daemon].exchange(1) != 0) return;
  const std::lock_guard lock(mutex_);
  ++sessions_lost_;
}

void BlockUploader::Run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    Batch& batch = queue_.front();  // stays: an empty queue means that all is sent
    lock.unlock();
    cudaStreamWaitEvent(stream_.get(), batch.ready.get(), 0);
    for (const Block& block : batch.blocks) {
      Send(block);
      const std::lock_guard counted(mutex_);
      block.store->blocks_under_way.fetch_sub(1);
      ++blocks_sent_;
      changed_.notify_all();
    }
    lock.lock();
    queue_.pop_front();
    changed_.notify_all();
  }
}

void BlockUploader::Send(const Block& block) {
  const absl::Status packed = Pack(block);
  if (!packed.ok()) {  // without its rows there is nothing to send, now or later
    for (size_t d = 0; d < options_.shares.size(); ++d) MarkLost(*block.store, d);
    return;
  }
  if (!block.local_slots.empty()) WriteLocal(block);
  AppendAll(block);
  block.store->held.store(block.start + block.slots.size());
}

absl::Status BlockUploader::Pack(const Block& block) {
  const ModelShape& shape = options_.shape;
  const ChunkLayout layout{shape.key_dim, shape.value_dim, block.slots.size()};
  std::copy(block.slots.begin(), block.slots.end(), slots_.get());
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    uint16_t* const chunk = staging_.get() + layer * layer_elements_;
    for (const DaemonShare& share : options_.shares) {
      const cudaError_t error = kernels::cuda::PackRows(
          options_.pools[layer], slots_.get(), static_cast<int>(block.slots.size()),
          static_cast<int>(share.first_head), static_cast<int>(share.heads),
          chunk + layout.Keys(share), chunk + layout.Values(share), stream_.get());
      if (error != cudaSuccess) return CudaStatus(error, "PackRows");
    }
  }
  {
    const std::lock_guard lock(mutex_);
    bytes_packed_ += block.slots.size() * shape.layers * shape.kv_heads *
                     (shape.key_dim + shape.value_dim) * sizeof(uint16_t);
  }
  return CudaStatus(cudaStreamSynchronize(stream_.get()), "packing a block");
}

void BlockUploader::WriteLocal(const Block& block) {
  const ModelShape& shape = options_.shape;
  const ChunkLayout layout{shape.key_dim, shape.value_dim, block.slots.size()};
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    const uint16_t* const chunk = staging_.get() + layer * layer_elements_;
    for (const DaemonShare& share : options_.shares) {
      local_.Write(layer, block.local_slots, share.first_head, share.heads,
                   chunk + layout.Keys(share), chunk + layout.Values(share));
    }
  }
}

/// Repeats what did not reach a daemon, which is safe: a daemon skips what it holds.
void BlockUploader::AppendAll(const Block& block) {
  const ModelShape& shape = options_.shape;
  const ChunkLayout layout{shape.key_dim, shape.value_dim, block.slots.size()};
  const auto give_up = std::chrono::steady_clock::now() + options_.patience;
  for (;;) {
    Appends appends(options_.shares.size());
    for (uint32_t layer = 0; layer < shape.layers; ++layer) {
      appends.Start(options_.shares, *block.store, layer, block.start, layout,
                    staging_.get() + layer * layer_elements_, options_.call);
    }
    const std::vector<absl::Status> statuses = appends.Wait();
    const bool late = std::chrono::steady_clock::now() >= give_up;
    bool again = false;
    for (size_t d = 0; d < statuses.size(); ++d) {
      if (statuses[d].ok()) continue;
      if (late || IsLost(statuses[d])) {
        MarkLost(*block.store, d);
      } else {
        again = true;
      }
    }
    if (!again) return;
    std::unique_lock lock(mutex_);
    if (changed_.wait_for(lock, kRetryPause, [this] { return stopping_; })) return;
  }
}

}  // namespace kvseek::client
