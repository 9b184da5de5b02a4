#include "client/decoder/far_store.h"

#include <cstring>

namespace kvseek::client {

absl::Status LocalCopy::Allocate(const ModelShape& shape, uint64_t tokens, uint32_t page_tokens,
                                 size_t& pinned_bytes) {
  if (tokens == 0) return absl::OkStatus();
  page_tokens_ = page_tokens;
  const uint64_t pages = (tokens + page_tokens - 1) / page_tokens;
  const uint64_t rows = pages * page_tokens * shape.kv_heads;
  for (uint32_t layer = 0; layer < shape.layers; ++layer) {
    PinnedArray<uint16_t>& keys = memory_.emplace_back();
    absl::Status status = keys.Allocate(rows * shape.key_dim, pinned_bytes);
    uint16_t* const key_rows = keys.get();
    PinnedArray<uint16_t>& values = memory_.emplace_back();
    if (status.ok()) status = values.Allocate(rows * shape.value_dim, pinned_bytes);
    if (!status.ok()) return status;
    pools_.push_back({.keys = key_rows,
                      .values = values.get(),
                      .kv_heads = static_cast<int>(shape.kv_heads),
                      .page_tokens = static_cast<int>(page_tokens),
                      .key_dim = static_cast<int>(shape.key_dim),
                      .value_dim = static_cast<int>(shape.value_dim),
                      .dtype = shape.dtype});
  }
  free_ = PageAllocator(static_cast<int32_t>(pages));
  return absl::OkStatus();
}

bool LocalCopy::Grow(std::vector<int32_t>& pages, uint64_t tokens) {
  const uint64_t needed = (tokens + page_tokens_ - 1) / page_tokens_;
  if (needed > pages.size() + free_.available()) return false;
  while (pages.size() < needed) pages.push_back(free_.Take());
  return true;
}

void LocalCopy::Shrink(std::vector<int32_t>& pages, uint64_t tokens) {
  if (!exists()) return;
  const uint64_t needed = (tokens + page_tokens_ - 1) / page_tokens_;
  for (; pages.size() > needed; pages.pop_back()) free_.Give(pages.back());
}

std::vector<int32_t> LocalCopy::Slots(const std::vector<int32_t>& pages, uint64_t start,
                                      uint64_t count) const {
  std::vector<int32_t> slots;
  slots.reserve(count);
  for (uint64_t position = start; position < start + count; ++position) {
    const auto page = static_cast<uint64_t>(pages[position / page_tokens_]);
    slots.push_back(static_cast<int32_t>(page * page_tokens_ + position % page_tokens_));
  }
  return slots;
}

void LocalCopy::Write(uint32_t layer, absl::Span<const int32_t> slots, uint32_t first_head,
                      uint32_t heads, const uint16_t* keys, const uint16_t* values) {
  const kernels::cuda::PagePool& pool = pools_[layer];
  const auto put = [&](void* memory, const uint16_t* rows, int dim_elements) {
    const auto dim = static_cast<size_t>(dim_elements);
    const auto page_tokens = static_cast<size_t>(page_tokens_);
    auto* const to = static_cast<uint16_t*>(memory);
    for (const int32_t slot : slots) {
      const size_t page = static_cast<size_t>(slot) / page_tokens;
      const size_t place = static_cast<size_t>(slot) % page_tokens;
      for (size_t head = first_head; head < first_head + heads; ++head, rows += dim) {
        const size_t row = (page * static_cast<size_t>(pool.kv_heads) + head) * page_tokens + place;
        std::memcpy(to + row * dim, rows, dim * sizeof(uint16_t));
      }
    }
  };
  put(pool.keys, keys, pool.key_dim);
  put(pool.values, values, pool.value_dim);
}

}  // namespace kvseek::client
