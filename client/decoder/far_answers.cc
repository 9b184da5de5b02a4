#include "client/decoder/far_answers.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace kvseek::client {
namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();

}  // namespace

absl::Status FarAnswers::Allocate(size_t tokens, size_t& pinned_bytes) {
  const size_t heads = tokens * shape_.query_heads;
  const size_t kv_heads = tokens * shape_.kv_heads;
  const size_t rows = kv_heads * rows_max_;
  absl::Status status;
  const auto take = [&](auto& array, size_t count) {
    if (status.ok()) status = array.Allocate(count, pinned_bytes);
  };
  take(rest_out_, heads * shape_.value_dim);
  take(rest_lse_, heads);
  if (rows_max_ == 0) return status;
  take(arrived_keys_, rows * shape_.key_dim);
  take(arrived_values_, rows * shape_.value_dim);
  take(arrived_slots_, rows);
  take(row_lists_, kv_heads + rows);
  return status;
}

void FarAnswers::Clear(size_t batch, uint32_t tokens) {
  batch_ = batch;
  tokens_ = tokens;
  arrivals_ = 0;
  std::fill_n(rest_lse_.get(), batch * tokens * shape_.query_heads, kEmpty);
  if (rows_max_ > 0) std::fill_n(row_lists_.get(), batch * tokens * shape_.kv_heads, 0);
}

void FarAnswers::Drop(size_t b) {
  const size_t heads = size_t{tokens_} * shape_.query_heads;
  const size_t lists = size_t{tokens_} * shape_.kv_heads;
  std::fill_n(rest_lse_.get() + b * heads, heads, kEmpty);
  if (rows_max_ > 0) std::fill_n(row_lists_.get() + b * lists, lists, 0);
}

/// States of the heads asked for, (tokens, heads, group, value_dim), to their places among all.
void FarAnswers::PlaceState(const FarReply& reply, DecoderStats& stats) {
  const size_t group = shape_.Group();
  const size_t heads = reply.heads.size();
  for (size_t i = 0; i < reply.batch.size(); ++i) {
    const ItemResult& item = reply.answer->items[i];
    for (size_t t = 0; t < tokens_; ++t) {
      for (size_t h = 0; h < heads; ++h) {
        const size_t from = (t * heads + h) * group;
        const size_t to =
            ((reply.batch[i] * tokens_ + t) * shape_.kv_heads + reply.heads[h]) * group;
        std::copy_n(item.lse.data() + from, group, rest_lse_.get() + to);
        std::copy_n(item.out.data() + from * shape_.value_dim, group * shape_.value_dim,
                    rest_out_.get() + to * shape_.value_dim);
      }
    }
    stats.bytes_to_device += (item.out.size() + item.lse.size()) * sizeof(float);
  }
}

void FarAnswers::PlaceRows(uint32_t layer, const FarReply& reply,
                           absl::Span<const StepSequence> batch, DecoderStats& stats) {
  for (size_t i = 0; i < reply.batch.size(); ++i) {
    for (size_t h = 0; h < reply.heads.size(); ++h) PlaceHeadRows(layer, reply, batch, i, h, stats);
  }
}

/// One KV head's rows of all query tokens: into the cache's books, and those that are new into
/// pinned memory.
void FarAnswers::PlaceHeadRows(uint32_t layer, const FarReply& reply,
                               absl::Span<const StepSequence> batch, size_t item, size_t head,
                               DecoderStats& stats) {
  const size_t b = reply.batch[item];
  const uint32_t kv_head = reply.heads[head];
  const std::vector<Selection>& selections = reply.answer->items[item].selections;
  std::vector<absl::Span<const int64_t>> positions;
  size_t asked = 0;
  for (size_t t = 0; t < tokens_; ++t) {
    positions.emplace_back(selections[t * reply.heads.size() + head].positions);
    asked += positions.back().size();
  }
  std::vector<int32_t> slots(asked);
  RowCache& cache = (*batch[b].caches)[layer * shape_.kv_heads + kv_head];
  const auto arrivals = cache.Admit(positions, slots.data());

  const auto first_row =
      static_cast<int32_t>((batch[b].place * shape_.kv_heads + kv_head) * cache_rows_);
  int32_t* const counts = row_lists_.get();
  int32_t* const lists = counts + batch_ * tokens_ * shape_.kv_heads;
  auto slot = slots.begin();
  for (size_t t = 0; t < tokens_; ++t) {
    const size_t list = (b * tokens_ + t) * shape_.kv_heads + kv_head;
    counts[list] = static_cast<int32_t>(positions[t].size());
    for (size_t i = 0; i < positions[t].size(); ++i) {
      lists[list * rows_max_ + i] = first_row + *slot++;
    }
  }
  size_t t = 0;
  size_t rows_before = 0;
  for (const RowCache::Arrival& arrival : arrivals) {
    const Selection* selection = &selections[t * reply.heads.size() + head];
    while (arrival.row - rows_before >= selection->keys.size() / shape_.key_dim) {
      rows_before += selection->keys.size() / shape_.key_dim;
      selection = &selections[++t * reply.heads.size() + head];
    }
    const size_t row = arrival.row - rows_before;
    std::copy_n(selection->keys.data() + row * shape_.key_dim, shape_.key_dim,
                arrived_keys_.get() + arrivals_ * shape_.key_dim);
    std::copy_n(selection->values.data() + row * shape_.value_dim, shape_.value_dim,
                arrived_values_.get() + arrivals_ * shape_.value_dim);
    arrived_slots_.get()[arrivals_++] = first_row + arrival.slot;
  }
  stats.rows_asked += asked;
  stats.rows_cached += asked - std::min<size_t>(asked, arrivals.size());
  stats.bytes_to_device += arrivals.size() * (shape_.key_dim + shape_.value_dim) * sizeof(uint16_t);
}

}  // namespace kvseek::client
