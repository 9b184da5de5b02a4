#include "client/decoder/prefill.h"

#include <algorithm>
#include <utility>

namespace kvseek::client {
namespace {

// Every so many tokens' queries go along; of a long prompt no more than a daemon keeps.
constexpr uint64_t kQueryStride = 32;
constexpr uint64_t kQueryTokensMax = 1024;

bool LearnsFromQueries(IndexKind kind) { return kind >= IndexKind::kCluster; }

/// Rows from token `token` and KV head `head` on.
const uint16_t* RowAt(const void* rows, int64_t token_stride, int64_t head_stride, uint64_t token,
                      uint64_t head) {
  return static_cast<const uint16_t*>(rows) + static_cast<int64_t>(token) * token_stride +
         static_cast<int64_t>(head) * head_stride;
}

}  // namespace

Prefill::Prefill(const DecoderOptions& options, const ZoneShape& zone,
                 std::vector<DaemonShare> shares, std::vector<kernels::cuda::PagePool> pools,
                 LocalCopy& local)
    : options_(options),
      zone_(zone),
      shares_(std::move(shares)),
      pools_(std::move(pools)),
      local_(local) {}

absl::Status Prefill::Allocate(size_t& device_bytes, size_t& pinned_bytes) {
  const ModelShape& shape = options_.shape;
  const size_t chunk_rows = static_cast<size_t>(options_.prefill_chunk_tokens) * shape.kv_heads;
  const size_t zone_tokens = static_cast<size_t>(zone_.PagesMax()) * zone_.page_tokens;
  const std::vector<IndexKind>& build = options_.open.build;
  const bool learns = std::any_of(build.begin(), build.end(), LearnsFromQueries);
  const size_t query_tokens = learns ? options_.prefill_chunk_tokens / kQueryStride + 1 : 0;
  absl::Status status = stream_.Create();
  if (status.ok()) status = ready_.Create(cudaEventDisableTiming);
  for (Chunk& chunk : chunks_) {
    if (status.ok()) {
      status = chunk.rows.Allocate(chunk_rows * (shape.key_dim + shape.value_dim), pinned_bytes);
    }
    if (status.ok()) {
      status =
          chunk.query_rows.Allocate(query_tokens * shape.query_heads * shape.key_dim, pinned_bytes);
    }
    chunk.queries.rows = chunk.query_rows.get();
    chunk.queries.head_elements = static_cast<size_t>(shape.Group()) * shape.key_dim;
    chunk.appends = std::make_unique<Appends>(shares_.size());
  }
  const size_t zone_rows = zone_tokens * shape.kv_heads;
  if (status.ok()) status = zone_keys_.Allocate(zone_rows * shape.key_dim, device_bytes);
  if (status.ok()) status = zone_values_.Allocate(zone_rows * shape.value_dim, device_bytes);
  if (status.ok()) status = zone_slots_.Allocate(zone_tokens, pinned_bytes);
  return status;
}

PrefillTensors Prefill::Complete(const PrefillTensors& tensors) const {
  const ModelShape& shape = options_.shape;
  PrefillTensors complete = tensors;
  const auto fill = [&](int64_t& token_stride, int64_t& head_stride, uint32_t dim) {
    if (head_stride == 0) head_stride = dim;
    if (token_stride == 0) token_stride = static_cast<int64_t>(shape.kv_heads) * dim;
  };
  fill(complete.key_token_stride, complete.key_head_stride, shape.key_dim);
  fill(complete.value_token_stride, complete.value_head_stride, shape.value_dim);
  if (complete.query_token_stride == 0) {
    complete.query_token_stride = static_cast<int64_t>(shape.query_heads) * shape.key_dim;
  }
  return complete;
}

/// Tokens [first, first + tokens) of the tensors, by share.
absl::Status Prefill::Pack(Chunk& chunk, const PrefillTensors& tensors, uint64_t first,
                           uint64_t tokens) {
  const ModelShape& shape = options_.shape;
  const ChunkLayout layout{shape.key_dim, shape.value_dim, tokens};
  for (const DaemonShare& share : shares_) {
    cudaError_t error = kernels::cuda::PackStrided(
        RowAt(tensors.keys, tensors.key_token_stride, tensors.key_head_stride, first,
              share.first_head),
        tensors.key_token_stride, tensors.key_head_stride, static_cast<int>(tokens),
        static_cast<int>(share.heads), static_cast<int>(shape.key_dim),
        chunk.rows.get() + layout.Keys(share), stream_.get());
    if (error == cudaSuccess) {
      error = kernels::cuda::PackStrided(RowAt(tensors.values, tensors.value_token_stride,
                                               tensors.value_head_stride, first, share.first_head),
                                         tensors.value_token_stride, tensors.value_head_stride,
                                         static_cast<int>(tokens), static_cast<int>(share.heads),
                                         static_cast<int>(shape.value_dim),
                                         chunk.rows.get() + layout.Values(share), stream_.get());
    }
    if (error != cudaSuccess) return CudaStatus(error, "PackStrided");
  }
  bytes_packed_ += tokens * shape.kv_heads * (shape.key_dim + shape.value_dim) * sizeof(uint16_t);
  return CudaStatus(cudaStreamSynchronize(stream_.get()), "packing a prompt");
}

absl::Status Prefill::PackQueries(Chunk& chunk, const PrefillTensors& tensors, uint64_t start,
                                  uint64_t first, uint64_t tokens, uint64_t stride) {
  std::vector<uint64_t>& positions = chunk.queries.positions;
  positions.clear();
  if (tensors.queries == nullptr || chunk.query_rows.count() == 0) return absl::OkStatus();
  const uint64_t sampled = (first + stride - 1) / stride * stride;
  for (uint64_t t = sampled; t < first + tokens; t += stride) positions.push_back(start + t);
  if (positions.empty()) return absl::OkStatus();
  const auto token_elements = static_cast<size_t>(tensors.query_token_stride);
  for (const DaemonShare& share : shares_) {
    const SampledQueries own = chunk.queries.Of(share);
    const size_t head_elements = chunk.queries.head_elements;
    const size_t width = share.heads * head_elements * sizeof(uint16_t);
    const auto* const from = static_cast<const uint16_t*>(tensors.queries) +
                             sampled * token_elements + share.first_head * head_elements;
    auto* const to = chunk.query_rows.get() + (own.rows.data() - chunk.query_rows.get());
    const cudaError_t error =
        cudaMemcpy2DAsync(to, width, from, stride * token_elements * sizeof(uint16_t), width,
                          positions.size(), cudaMemcpyDefault, stream_.get());
    if (error != cudaSuccess) return CudaStatus(error, "copying queries");
    bytes_packed_ += own.rows.size() * sizeof(uint16_t);
  }
  return absl::OkStatus();
}

absl::Status Prefill::Finish(Chunk& chunk) {
  absl::Status status;
  for (const absl::Status& appended : chunk.appends->Wait()) status.Update(appended);
  return status;
}

/// Positions [begin, end), all of them in the zone, through contiguous rows into their pages.
absl::Status Prefill::KeepInZone(const SteadyZone& zone, uint32_t layer, uint64_t start,
                                 uint64_t begin, uint64_t end, const PrefillTensors& tensors) {
  if (begin >= end) return absl::OkStatus();
  const ModelShape& shape = options_.shape;
  const int tokens = static_cast<int>(end - begin);
  for (uint64_t p = begin; p < end; ++p) zone_slots_.get()[p - begin] = zone.Slot(p);
  cudaError_t error = kernels::cuda::PackStrided(
      RowAt(tensors.keys, tensors.key_token_stride, tensors.key_head_stride, begin - start, 0),
      tensors.key_token_stride, tensors.key_head_stride, tokens, static_cast<int>(shape.kv_heads),
      static_cast<int>(shape.key_dim), zone_keys_.get(), stream_.get());
  if (error == cudaSuccess) {
    error = kernels::cuda::PackStrided(RowAt(tensors.values, tensors.value_token_stride,
                                             tensors.value_head_stride, begin - start, 0),
                                       tensors.value_token_stride, tensors.value_head_stride,
                                       tokens, static_cast<int>(shape.kv_heads),
                                       static_cast<int>(shape.value_dim), zone_values_.get(),
                                       stream_.get());
  }
  if (error == cudaSuccess) {
    error = kernels::cuda::ScatterRows(zone_keys_.get(), zone_values_.get(), zone_slots_.get(),
                                       tokens, shape.kv_heads, pools_[layer], stream_.get());
  }
  // The slots are the next call's too.
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream_.get());
  return CudaStatus(error, "keeping the steady zone");
}

void Prefill::WriteLocal(FarStore& store, uint32_t layer, uint64_t start, uint64_t tokens,
                         const uint16_t* rows) {
  if (!local_.exists()) return;
  const ModelShape& shape = options_.shape;
  const ChunkLayout layout{shape.key_dim, shape.value_dim, tokens};
  const std::vector<int32_t> slots = local_.Slots(store.local_pages, start, tokens);
  for (const DaemonShare& share : shares_) {
    local_.Write(layer, slots, share.first_head, share.heads, rows + layout.Keys(share),
                 rows + layout.Values(share));
  }
}

absl::Status Prefill::SendLayer(const SteadyZone& zone, FarStore& store, uint32_t layer,
                                uint64_t start, uint64_t tokens, const PrefillTensors& given,
                                cudaStream_t stream) {
  const PrefillTensors tensors = Complete(given);
  cudaError_t error = cudaEventRecord(ready_.get(), stream);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(stream_.get(), ready_.get(), 0);
  if (error != cudaSuccess) return CudaStatus(error, "event");

  const uint64_t end = start + tokens;
  absl::Status status =
      KeepInZone(zone, layer, start, start, std::min(end, zone.far_begin()), tensors);
  if (status.ok()) {
    status = KeepInZone(zone, layer, start, std::max(start, zone.far_end()), end, tensors);
  }

  const ModelShape& shape = options_.shape;
  const CallOptions call{.deadline = options_.append_deadline};
  const uint64_t chunk_max = options_.prefill_chunk_tokens;
  const uint64_t query_stride =
      std::max(kQueryStride, (tokens + kQueryTokensMax - 1) / kQueryTokensMax);
  for (uint64_t first = 0, i = 0; first < tokens && status.ok(); first += chunk_max, ++i) {
    Chunk& chunk = chunks_[i % chunks_.size()];
    const uint64_t count = std::min(chunk_max, tokens - first);
    status = Finish(chunk);  // what was in it before
    if (status.ok()) {
      status = PackQueries(chunk, tensors, start, first, count, query_stride);
    }
    if (status.ok()) status = Pack(chunk, tensors, first, count);
    if (!status.ok()) break;
    const ChunkLayout layout{shape.key_dim, shape.value_dim, count};
    chunk.appends->Start(shares_, store, layer, start + first, layout, chunk.rows.get(), call,
                         chunk.queries);
    WriteLocal(store, layer, start + first, count, chunk.rows.get());
  }
  // In the order in which they were sent, so that the first error is the reason of those behind it.
  const size_t last = (tokens + chunk_max - 1) / chunk_max;
  for (size_t i = last; i < last + chunks_.size(); ++i) {
    status.Update(Finish(chunks_[i % chunks_.size()]));
  }
  // Even after an error: the tensors are the engine's again.
  status.Update(CudaStatus(cudaStreamSynchronize(stream_.get()), "packing a prompt"));
  return status;
}

}  // namespace kvseek::client
