#include "client/decoder/decode_step.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <utility>

#include "kernels/cuda/publish.h"

namespace kvseek::client {
namespace {

using kernels::cuda::KvPages;
using kernels::cuda::PagePool;
using kernels::cuda::PageQueries;
using kernels::cuda::StateList;
using Clock = std::chrono::steady_clock;

int Int(size_t value) { return static_cast<int>(value); }

uint64_t Microseconds(Clock::duration time) {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(time).count());
}
uint64_t MicrosecondsSince(Clock::time_point begun) { return Microseconds(Clock::now() - begun); }

}  // namespace

DecodeStep::DecodeStep(const DecoderOptions& options, const ZoneShape& zone,
                       std::vector<DaemonShare> shares, std::chrono::microseconds spin,
                       LocalCopy& local)
    : options_(options),
      zone_(zone),
      local_(local),
      far_(options.shape, std::move(shares), spin),
      modes_(options.shape.layers, options.shape.kv_heads,
             *HeadModesOf(options.plan, options.shape.layers, options.shape.kv_heads),
             options.rows > 0),
      answers_(options.shape, options.cache_rows, RowsMax(options)),
      head_rows_(
          *HeadRowsOf(options.plan, options.shape.layers, options.shape.kv_heads, options.rows)) {}

absl::Status DecodeStep::Allocate(size_t& device_bytes, size_t& pinned_bytes) {
  const ModelShape& shape = options_.shape;
  const size_t batch = options_.sequences_max;
  const size_t tokens = batch * options_.query_tokens_max;
  const size_t heads = tokens * shape.query_heads;
  const size_t kv_heads = tokens * shape.kv_heads;
  const size_t rows = kv_heads * answers_.rows_max();
  const bool has_rows = options_.rows > 0;
  absl::Status status;
  const auto take = [&](auto& array, size_t count, size_t& total) {
    if (status.ok()) status = array.Allocate(count, total);
  };
  const auto make_pool = [&](size_t pool_rows, uint32_t pool_heads, uint32_t page_tokens) {
    DeviceArray<uint16_t> keys, values;
    take(keys, pool_rows * shape.key_dim, device_bytes);
    take(values, pool_rows * shape.value_dim, device_bytes);
    const PagePool pool{.keys = keys.get(),
                        .values = values.get(),
                        .kv_heads = Int(pool_heads),
                        .page_tokens = Int(page_tokens),
                        .key_dim = Int(shape.key_dim),
                        .value_dim = Int(shape.value_dim),
                        .dtype = shape.dtype};
    pool_memory_.push_back(std::move(keys));
    pool_memory_.push_back(std::move(values));
    return pool;
  };
  for (uint32_t layer = 0; layer < shape.layers && status.ok(); ++layer) {
    const size_t page_rows = static_cast<size_t>(zone_.page_tokens) * shape.kv_heads;
    pools_.push_back(
        make_pool(batch * zone_.PagesMax() * page_rows, shape.kv_heads, zone_.page_tokens));
    if (has_rows) {
      cache_pools_.push_back(make_pool(batch * shape.kv_heads * options_.cache_rows, 1, 1));
    }
    Timing& timing = timings_.emplace_back();
    if (status.ok()) status = timing.begin.Create(0);
    if (status.ok()) status = timing.end.Create(0);
  }
  counts_at_ = tokens;
  pages_at_ = counts_at_ + batch;
  take(tables_, pages_at_ + batch * zone_.PagesMax(), pinned_bytes);
  take(device_tables_, tables_.count(), device_bytes);
  take(queries_, heads * shape.key_dim, pinned_bytes);
  take(queries_flags_, kernels::cuda::kPublishFlags, pinned_bytes);
  if (status.ok()) status = answers_.Allocate(tokens, pinned_bytes);
  take(steady_out_, heads * shape.value_dim, device_bytes);
  take(steady_lse_, heads, device_bytes);
  if (has_rows) {
    take(device_row_lists_, kv_heads + rows, device_bytes);
    take(rows_out_, heads * shape.value_dim, device_bytes);
    take(rows_lse_, heads, device_bytes);
  }
  if (options_.fallback == Fallback::kLocalCopy) {
    take(local_pages_, options_.local_tokens_max / zone_.page_tokens + 1, pinned_bytes);
    take(local_counts_, batch, pinned_bytes);
    take(local_out_, heads * shape.value_dim, device_bytes);
    take(local_lse_, heads, device_bytes);
  }
  const int group = Int(shape.Group());
  const int value_dim = Int(shape.value_dim);
  take(workspace_,
       std::max(kernels::cuda::AttendWorkspaceBytes(
                    Int(batch * shape.kv_heads), Int(options_.query_tokens_max), group, value_dim),
                kernels::cuda::AttendWorkspaceBytes(Int(kv_heads), 1, group, value_dim)),
       device_bytes);
  take(rest_permit_, 1, pinned_bytes);
  if (status.ok()) status = tables_copied_.Create(cudaEventDisableTiming);
  if (status.ok()) status = LoadKernels();
  if (!status.ok() || options_.far_path != FarPath::kDoorbell) return status;
  doorbell_ = std::make_unique<DoorbellPath>(options_);
  return doorbell_->Open(far_.shares().front().options, device_bytes, pinned_bytes);
}

/// What MergeAhead launches: code that is loaded then may wait for the stream, which waits for the
/// permit.
absl::Status DecodeStep::LoadKernels() {
  const StateList empty{steady_out_.get(), steady_lse_.get(), 1};
  cudaError_t error = kernels::cuda::AwaitPermit(rest_permit_.get(), rest_number_, nullptr);
  if (error == cudaSuccess) {
    error = kernels::cuda::MergeStates(&empty, 1, 1, Int(options_.shape.value_dim),
                                       steady_out_.get(), options_.shape.dtype, nullptr, nullptr);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(nullptr);
  return CudaStatus(error, "loading kernels");
}

absl::Status DecodeStep::Begin(std::vector<StepSequence> batch, uint32_t tokens,
                               cudaStream_t stream) {
  batch_ = std::move(batch);
  tokens_ = tokens;
  far_.BeginStep();
  FindFar();
  missed_.assign(batch_.size(), 0);
  local_at_.assign(batch_.size(), -1);
  local_listed_ = 0;
  return WriteTables(stream);
}

void DecodeStep::FindFar() {
  far_sequences_.clear();
  lost_.clear();
  any_far_ = false;
  for (const StepSequence& sequence : batch_) {
    std::vector<uint8_t>& lost = lost_.emplace_back();
    for (const auto& one : sequence.store->lost) lost.push_back(one.load());
    FarSequence far;
    far.sessions = sequence.store->sessions;
    far.begin = sequence.zone->far_begin();
    far.end = sequence.zone->far_end();
    any_far_ = any_far_ || far.begin < far.end;
    far_sequences_.push_back(far);
  }
  for (size_t b = 0; b < batch_.size(); ++b) far_sequences_[b].lost = lost_[b];
}

absl::Status DecodeStep::WriteTables(cudaStream_t stream) {
  absl::Status free_again =
      CudaStatus(cudaEventSynchronize(tables_copied_.get()), "the last step's tables");
  if (!free_again.ok()) return free_again;
  int32_t* const tables = tables_.get();
  for (size_t b = 0; b < batch_.size(); ++b) {
    const SteadyZone& zone = *batch_[b].zone;
    const uint64_t first = zone.tokens() - tokens_;
    for (uint32_t t = 0; t < tokens_; ++t) tables[b * tokens_ + t] = zone.Slot(first + t);
    tables[counts_at_ + b] = zone.rows();
    std::copy(zone.pages().begin(), zone.pages().end(), tables + pages_at_ + b * zone_.PagesMax());
  }
  const cudaError_t error = cudaMemcpyAsync(device_tables_.get(), tables, tables_.bytes(),
                                            cudaMemcpyHostToDevice, stream);
  absl::Status copied = CudaStatus(error, "the step's tables");
  if (copied.ok() && doorbell_ != nullptr) {
    copied = doorbell_->BeginStep(far_sequences_, tokens_, stream);
  }
  if (!copied.ok()) return copied;
  return CudaStatus(cudaEventRecord(tables_copied_.get(), stream), "event");
}

absl::Status DecodeStep::Attend(uint32_t layer, const void* queries, const void* keys,
                                const void* values, void* out, cudaStream_t stream) {
  ++stats_.layers;
  if (doorbell_ != nullptr) return AttendByDoorbell(layer, queries, keys, values, out, stream);
  Timing& timing = timings_[layer];
  if (std::exchange(timing.valid, false) && cudaEventQuery(timing.end.get()) == cudaSuccess) {
    float tail_ms = 0.0F;
    cudaEventElapsedTime(&tail_ms, timing.begin.get(), timing.end.get());
    modes_.Record(layer, timing.host_us + 1000.0 * static_cast<double>(tail_ms));
  }
  const auto begun = Clock::now();
  const std::vector<HeadMode>& modes = modes_.Next(layer);
  const auto asks = [&](HeadMode mode) {
    return any_far_ && std::find(modes.begin(), modes.end(), mode) != modes.end();
  };
  const bool asks_rows = asks(HeadMode::kRows);
  const bool asks_daemons = asks_rows || asks(HeadMode::kState);
  absl::Status status;
  if (asks_daemons) status = AskDaemons(layer, queries, modes, stream);
  const auto asked = Clock::now();
  if (status.ok()) status = AttendSteadyZone(layer, queries, keys, values, stream);
  if (!asks_daemons) return status.ok() ? FinishLayer(layer, {}, queries, out, stream) : status;

  const bool ahead = status.ok() && !asks_rows;
  if (ahead) status = MergeAhead(layer, queries, out, stream);
  far_.Wait();  // also after an error: questions under way read this step's memory
  stats_.queries_us += Microseconds(asked - begun);
  stats_.asking_us += MicrosecondsSince(asked);
  const auto placing = Clock::now();
  Parts parts;
  absl::Status taken = TakeReplies(layer, parts);
  if (ahead) kernels::cuda::Permit(rest_permit_.get(), rest_number_);
  if (status.ok()) status = std::move(taken);
  if (!status.ok()) return status;
  timing.host_us =
      static_cast<double>(MicrosecondsSince(begun)) / static_cast<double>(batch_.size() * tokens_);
  if (!ahead || parts.local) status = FinishLayer(layer, parts, queries, out, stream);
  stats_.placing_us += MicrosecondsSince(placing);
  return status;
}

absl::Status DecodeStep::AttendByDoorbell(uint32_t layer, const void* queries, const void* keys,
                                          const void* values, void* out, cudaStream_t stream) {
  ++stats_.layers_asked;
  ++stats_.requests;
  stats_.bytes_to_host += Heads() * options_.shape.key_dim * sizeof(uint16_t);
  stats_.bytes_to_device += Heads() * (options_.shape.value_dim + 2) * sizeof(uint16_t);
  absl::Status status = doorbell_->Ring(layer, queries, stream);
  if (status.ok()) status = AttendSteadyZone(layer, queries, keys, values, stream);
  if (!status.ok()) return status;
  return doorbell_->Await(layer, {steady_out_.get(), steady_lse_.get(), 1}, out, stream);
}

DecoderStats DecodeStep::stats() const {
  DecoderStats stats = stats_;
  if (doorbell_ != nullptr) doorbell_->AddTo(stats);
  return stats;
}

uint64_t DecodeStep::DaemonNanoseconds(uint32_t layer) const {
  return doorbell_ == nullptr ? 0 : doorbell_->DaemonNanoseconds(layer);
}

/// Steady zone and rest, merged as soon as the rest is permitted.
absl::Status DecodeStep::MergeAhead(uint32_t layer, const void* queries, void* out,
                                    cudaStream_t stream) {
  absl::Status waits = CudaStatus(
      kernels::cuda::AwaitPermit(rest_permit_.get(), ++rest_number_, stream), "AwaitPermit");
  if (!waits.ok()) return waits;
  Parts parts;
  parts.rest = true;
  return FinishLayer(layer, parts, queries, out, stream);
}

PageQueries DecodeStep::Queries(const void* queries, uint32_t tokens, bool causal) const {
  const ModelShape& shape = options_.shape;
  return {.queries = queries,
          .tokens = Int(tokens),
          .group = Int(shape.Group()),
          .softmax_scale = shape.softmax_scale,
          .causal = causal};
}

/// The queries go first of all: the daemons wait for them.
absl::Status DecodeStep::AskDaemons(uint32_t layer, const void* queries,
                                    const std::vector<HeadMode>& modes, cudaStream_t stream) {
  ++stats_.layers_asked;
  const ModelShape& shape = options_.shape;
  const size_t bytes = Heads() * shape.key_dim * sizeof(uint16_t);
  absl::Status published =
      CudaStatus(kernels::cuda::Publish(queries, bytes, queries_.get(), queries_flags_.get(),
                                        ++queries_number_, stream),
                 "Publish");
  if (!published.ok()) return published;
  stats_.bytes_to_host += bytes;
  for (size_t b = 0; b < batch_.size(); ++b) {
    std::vector<RowCache>& caches = *batch_[b].caches;
    far_sequences_[b].caches =
        caches.empty() ? nullptr : caches.data() + layer * options_.shape.kv_heads;
  }
  FarQuestion question;
  question.layer = layer;
  question.tokens = tokens_;
  question.batch = far_sequences_;
  question.queries = queries_.get();
  question.modes = modes;
  question.rows =
      absl::MakeConstSpan(head_rows_).subspan(size_t{layer} * shape.kv_heads, shape.kv_heads);
  question.options = options_.search;
  question.deadline = options_.layer_deadline;
  far_.Prepare(question);
  absl::Status there = WaitForQueries(bytes, stream);
  if (!there.ok()) return there;
  far_.Send();
  return absl::OkStatus();
}

/// As long as the GPU takes for what is before them in the stream. A stream that failed never gets
/// there.
absl::Status DecodeStep::WaitForQueries(size_t bytes, cudaStream_t stream) {
  constexpr int kLooks = 4096;  // between two at the stream
  for (int i = 1;; ++i) {
    if (kernels::cuda::IsPublished(queries_flags_.get(), bytes, queries_number_)) break;
    if (i % kLooks != 0) continue;
    const cudaError_t error = cudaStreamQuery(stream);
    if (error != cudaSuccess && error != cudaErrorNotReady) {
      return CudaStatus(error, "queries to the host");
    }
  }
  return absl::OkStatus();
}

absl::Status DecodeStep::AttendSteadyZone(uint32_t layer, const void* queries, const void* keys,
                                          const void* values, cudaStream_t stream) {
  const int32_t* const tables = device_tables_.get();
  absl::Status written =
      CudaStatus(kernels::cuda::ScatterRows(keys, values, tables, Int(batch_.size() * tokens_),
                                            options_.shape.kv_heads, pools_[layer], stream),
                 "ScatterRows");
  if (!written.ok()) return written;
  const KvPages zone{.pool = pools_[layer],
                     .pages = tables + pages_at_,
                     .counts = tables + counts_at_,
                     .pages_max = Int(zone_.PagesMax()),
                     .sequences = Int(batch_.size())};
  return CudaStatus(kernels::cuda::AttendPages(zone, Queries(queries, tokens_, true),
                                               {workspace_.get(), workspace_.bytes()},
                                               steady_out_.get(), steady_lse_.get(), stream),
                    "AttendPages");
}

void DecodeStep::CountMiss(const absl::Status& status) {
  ++stats_.misses;
  if (status.code() == absl::StatusCode::kDeadlineExceeded) ++stats_.misses_deadline;
  if (status.code() == absl::StatusCode::kUnavailable) ++stats_.misses_unavailable;
}

absl::Status DecodeStep::TakeReplies(uint32_t layer, Parts& parts) {
  const std::deque<FarReply>& replies = far_.Wait();
  std::fill(missed_.begin(), missed_.end(), uint8_t{0});
  uint64_t daemon_us = 0;
  bool any_missed = false;
  for (const FarReply& reply : replies) {
    if (!reply.batch.empty()) ++stats_.requests;
    if (reply.answer.ok()) {
      daemon_us = std::max<uint64_t>(daemon_us, reply.answer->daemon_us);
      continue;
    }
    CountMiss(reply.answer.status());
    if (options_.fallback == Fallback::kError) return reply.answer.status();
    any_missed = true;
    for (const uint32_t b : reply.batch) missed_[b] = 1;
    for (const uint32_t b : reply.lost) {
      missed_[b] = 1;
      lost_[b][reply.daemon] = 1;  // the step's next layers leave it out
      if (batch_[b].store->lost[reply.daemon].exchange(1) == 0) ++stats_.sequences_lost;
    }
  }
  stats_.daemon_us += daemon_us;
  timings_[layer].valid = !any_missed && !replies.empty() && modes_.Chooses(layer);

  answers_.Clear(batch_.size(), tokens_);
  for (const FarReply& reply : replies) {
    if (!reply.answer.ok()) continue;
    answers_.PlaceState(reply, stats_);
    parts.rest = true;
    if (reply.rows) {
      answers_.PlaceRows(layer, reply, batch_, stats_);
      parts.rows = true;
    }
  }
  if (any_missed) FallBack(parts);
  return absl::OkStatus();
}

/// With a local copy, a sequence that missed anything takes all from there, which is exact.
void DecodeStep::FallBack(Parts& parts) {
  ++stats_.fallbacks;
  if (options_.fallback != Fallback::kLocalCopy) return;
  parts.local = true;
  for (size_t b = 0; b < batch_.size(); ++b) {
    const FarSequence& far = far_sequences_[b];
    local_counts_.get()[b] = missed_[b] != 0 ? static_cast<int32_t>(far.end - far.begin) : 0;
    if (missed_[b] == 0) continue;
    ListLocal(b);
    answers_.Drop(b);
  }
}

/// The same pages serve all layers of a step.
void DecodeStep::ListLocal(size_t b) {
  if (local_at_[b] >= 0) return;
  local_at_[b] = static_cast<int64_t>(local_listed_);
  const FarSequence& far = far_sequences_[b];
  const auto first = static_cast<ptrdiff_t>(far.begin / zone_.page_tokens);
  const auto last = static_cast<ptrdiff_t>(far.end / zone_.page_tokens);
  const auto& pages = batch_[b].store->local_pages;
  std::copy(pages.begin() + first, pages.begin() + last, local_pages_.get() + local_listed_);
  local_listed_ += static_cast<size_t>(last - first);
}

absl::Status DecodeStep::AttendRows(uint32_t layer, const void* queries, cudaStream_t stream) {
  const size_t lists = batch_.size() * tokens_ * options_.shape.kv_heads;
  const size_t bytes = lists * (1 + answers_.rows_max()) * sizeof(int32_t);
  absl::Status status = CudaStatus(cudaMemcpyAsync(device_row_lists_.get(), answers_.row_lists(),
                                                   bytes, cudaMemcpyHostToDevice, stream),
                                   "lists of rows");
  if (!status.ok()) return status;
  status = CudaStatus(kernels::cuda::ScatterRows(answers_.arrived_keys(), answers_.arrived_values(),
                                                 answers_.arrived_slots(), Int(answers_.arrivals()),
                                                 1, cache_pools_[layer], stream),
                      "ScatterRows");
  if (!status.ok()) return status;
  const KvPages rows{.pool = cache_pools_[layer],
                     .pages = device_row_lists_.get() + lists,
                     .counts = device_row_lists_.get(),
                     .pages_max = Int(answers_.rows_max()),
                     .sequences = Int(lists)};
  return CudaStatus(kernels::cuda::AttendPages(rows, Queries(queries, 1, false),
                                               {workspace_.get(), workspace_.bytes()},
                                               rows_out_.get(), rows_lse_.get(), stream),
                    "AttendPages of rows");
}

/// One call for each sequence: their lists differ a lot in length. Those that did not miss get
/// empty states.
absl::Status DecodeStep::AttendLocal(uint32_t layer, const void* queries, cudaStream_t stream) {
  const ModelShape& shape = options_.shape;
  const size_t heads = tokens_ * shape.query_heads;
  for (size_t b = 0; b < batch_.size(); ++b) {
    const int32_t count = local_counts_.get()[b];
    const KvPages local{.pool = local_.pool(layer),
                        .pages = local_pages_.get() + std::max<int64_t>(local_at_[b], 0),
                        .counts = local_counts_.get() + b,
                        .pages_max = std::max(count / Int(zone_.page_tokens), 1),
                        .sequences = 1};
    const auto* const own = static_cast<const uint16_t*>(queries) + b * heads * shape.key_dim;
    absl::Status status = CudaStatus(
        kernels::cuda::AttendPages(
            local, Queries(own, tokens_, false), {workspace_.get(), workspace_.bytes()},
            local_out_.get() + b * heads * shape.value_dim, local_lse_.get() + b * heads, stream),
        "AttendPages of the local copy");
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status DecodeStep::FinishLayer(uint32_t layer, const Parts& parts, const void* queries,
                                     void* out, cudaStream_t stream) {
  absl::Status status;
  if (modes_.Chooses(layer)) {
    status = CudaStatus(cudaEventRecord(timings_[layer].begin.get(), stream), "event");
  }
  if (status.ok() && parts.rows) status = AttendRows(layer, queries, stream);
  if (status.ok() && parts.local) status = AttendLocal(layer, queries, stream);
  if (!status.ok()) return status;
  const ModelShape& shape = options_.shape;
  StateList lists[kernels::cuda::kMaxStateLists];
  int count = 0;
  lists[count++] = {steady_out_.get(), steady_lse_.get(), 1};
  if (parts.rest) lists[count++] = {answers_.rest_out(), answers_.rest_lse(), 1};
  if (parts.rows) lists[count++] = {rows_out_.get(), rows_lse_.get(), 1};
  if (parts.local) lists[count++] = {local_out_.get(), local_lse_.get(), 1};
  status = CudaStatus(kernels::cuda::MergeStates(lists, count, Int(Heads()), Int(shape.value_dim),
                                                 out, shape.dtype, nullptr, stream),
                      "MergeStates");
  if (!status.ok() || !modes_.Chooses(layer)) return status;
  return CudaStatus(cudaEventRecord(timings_[layer].end.get(), stream), "event");
}

}  // namespace kvseek::client
