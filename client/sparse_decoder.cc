#include "client/sparse_decoder.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/decoder/block_uploader.h"
#include "client/decoder/decode_step.h"
#include "client/decoder/far_attention.h"
#include "client/decoder/far_store.h"
#include "client/decoder/gpu_memory.h"
#include "client/decoder/prefill.h"
#include "client/decoder/row_cache.h"
#include "client/decoder/steady_zone.h"
#include "proto/status_code.h"

namespace kvseek {
namespace {

using client::Block;
using client::BlockUploader;
using client::DaemonShare;
using client::DecodeStep;
using client::FarStore;
using client::LocalCopy;
using client::PageAllocator;
using client::Prefill;
using client::RowCache;
using client::SteadyZone;
using client::StepSequence;
using client::ZoneShape;

constexpr uint32_t kSlackBlocks = 4;  ///< beyond the recent window, for daemons that are behind

absl::Status Invalid(absl::string_view field, absl::string_view message) {
  return proto::FieldError(absl::StatusCode::kInvalidArgument, field, message);
}

ZoneShape MakeZoneShape(const DecoderOptions& options) {
  const uint32_t slack = kSlackBlocks * options.block_tokens + options.query_tokens_max;
  return {.page_tokens = kPageTokens,
          .sink_tokens = options.sink_tokens,
          .recent_tokens = options.recent_tokens,
          .slack_tokens = (slack + kPageTokens - 1) / kPageTokens * kPageTokens};
}

}  // namespace

class SparseDecoder::Impl {
 public:
  Impl(const DecoderOptions& options, std::vector<std::unique_ptr<KvClient>> clients,
       const std::vector<DaemonShare>& shares, std::chrono::microseconds spin)
      : options_(options),
        zone_shape_(MakeZoneShape(options)),
        clients_(std::move(clients)),
        pages_(static_cast<int32_t>(options.sequences_max * zone_shape_.PagesMax())),
        step_(options, zone_shape_, shares, spin, local_) {
    for (uint32_t place = options.sequences_max; place > 0; --place) places_.push_back(place - 1);
  }

  ~Impl() {
    if (uploader_ != nullptr) uploader_->Drain(nullptr, options_.append_deadline);
    uploader_.reset();
    while (!sequences_.empty()) Close(sequences_.begin()->first).IgnoreError();
  }

  absl::Status Allocate() {
    const auto pages = kPageTokens;
    absl::Status status =
        local_.Allocate(options_.shape, options_.local_tokens_max, pages, pinned_bytes_);
    if (status.ok()) status = step_.Allocate(device_bytes_, pinned_bytes_);
    if (!status.ok()) return status;
    prefill_ =
        std::make_unique<Prefill>(options_, zone_shape_, step_.shares(), step_.pools(), local_);
    status = prefill_->Allocate(device_bytes_, pinned_bytes_);
    if (!status.ok()) return status;
    BlockUploader::Options uploads;
    uploads.shape = options_.shape;
    uploads.shares = step_.shares();
    uploads.pools = step_.pools();
    uploads.block_tokens = options_.block_tokens;
    uploads.call.deadline = options_.append_deadline;
    uploads.patience = options_.append_deadline;
    uploader_ = std::make_unique<BlockUploader>(std::move(uploads), local_);
    return uploader_->Start(pinned_bytes_);
  }

  absl::StatusOr<SequenceId> Open();
  absl::Status Close(SequenceId id);
  absl::StatusOr<uint64_t> Tokens(SequenceId id) const;
  absl::Status BeginPrefill(SequenceId id, uint64_t tokens);
  absl::Status PrefillLayer(SequenceId id, uint32_t layer, const PrefillTensors& tensors,
                            cudaStream_t stream);
  absl::Status BeginStep(absl::Span<const SequenceId> batch, uint32_t query_tokens,
                         cudaStream_t stream);
  absl::Status Attend(uint32_t layer, const void* queries, const void* keys, const void* values,
                      void* out, cudaStream_t stream);
  absl::Status Truncate(SequenceId id, uint64_t tokens);
  absl::Status Flush(std::chrono::milliseconds timeout);
  DecoderStats stats() const;
  const DecodeStep& step() const { return step_; }
  const ModelShape& shape() const { return options_.shape; }
  uint64_t device_bytes() const { return device_bytes_; }
  uint64_t pinned_bytes() const { return pinned_bytes_; }

 private:
  struct Sequence {
    Sequence(const ZoneShape& shape, PageAllocator& pages) : zone(shape, pages) {}
    SteadyZone zone;
    std::shared_ptr<FarStore> store;
    std::vector<RowCache> caches;  ///< (layers, kv_heads)
    uint32_t place = 0;
    uint64_t given = 0;  ///< tokens on their way to the daemons, or there
    uint64_t prefill_start = 0;
    uint64_t prefill_tokens = 0;        ///< 0: no prefill under way
    std::vector<uint8_t> prefill_done;  ///< (layers)
  };

  absl::StatusOr<Sequence*> Find(SequenceId id);
  absl::Status MakeRoom(Sequence& sequence, uint32_t tokens);
  absl::Status GrowLocal(Sequence& sequence, uint64_t tokens);
  Block NextBlock(Sequence& sequence, uint64_t tokens);
  absl::Status SendRest(Sequence& sequence);
  bool Drain(const Sequence& sequence) {
    return uploader_->Drain(sequence.store.get(), options_.append_deadline);
  }

  const DecoderOptions options_;
  const ZoneShape zone_shape_;
  const std::vector<std::unique_ptr<KvClient>> clients_;
  LocalCopy local_;
  PageAllocator pages_;
  DecodeStep step_;
  std::unique_ptr<Prefill> prefill_;
  std::unique_ptr<BlockUploader> uploader_;
  size_t device_bytes_ = 0;
  size_t pinned_bytes_ = 0;

  std::map<SequenceId, std::unique_ptr<Sequence>> sequences_;
  std::vector<uint32_t> places_;  ///< free ones
  SequenceId next_id_ = 1;
  std::vector<SequenceId> batch_;     ///< of the step under way
  std::vector<uint8_t> layers_done_;  ///< of the step under way
};

absl::StatusOr<SparseDecoder::Impl::Sequence*> SparseDecoder::Impl::Find(SequenceId id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) {
    return absl::NotFoundError(absl::StrCat("sequence ", id, " is not open"));
  }
  return found->second.get();
}

absl::StatusOr<SequenceId> SparseDecoder::Impl::Open() {
  if (places_.empty()) {
    return proto::FieldError(absl::StatusCode::kResourceExhausted, "sequences_max",
                             "so many sequences are open");
  }
  const ModelShape& shape = options_.shape;
  auto sequence = std::make_unique<Sequence>(zone_shape_, pages_);
  const std::vector<DaemonShare>& shares = step_.shares();
  sequence->store = std::make_shared<FarStore>(shares.size());
  for (size_t d = 0; d < shares.size(); ++d) {
    OpenOptions open = options_.open;
    open.plan = client::PlanOfShare(options_.plan, shares[d]);
    open.model = client::ModelOfShare(options_.open.model, shape, shares[d]);
    auto session = shares[d].tokens->Open(client::ShapeOfShare(shape, shares[d]), open);
    if (!session.ok()) {
      while (d-- > 0) shares[d].tokens->Close(sequence->store->sessions[d]).IgnoreError();
      return session.status();
    }
    sequence->store->sessions[d] = *std::move(session);
  }
  if (options_.rows > 0) {
    sequence->caches.assign(size_t{shape.layers} * shape.kv_heads, RowCache(options_.cache_rows));
  }
  sequence->place = places_.back();
  places_.pop_back();
  sequences_.emplace(next_id_, std::move(sequence));
  return next_id_++;
}

absl::Status SparseDecoder::Impl::Close(SequenceId id) {
  const auto found = Find(id);
  if (!found.ok()) return found.status();
  Sequence& sequence = **found;
  if (uploader_ != nullptr) Drain(sequence);
  absl::Status status;
  for (size_t d = 0; d < step_.shares().size(); ++d) {
    const Session& session = sequence.store->sessions[d];
    KvClient& daemon = *step_.shares()[d].tokens;
    if (sequence.store->lost[d].load() == 0) {
      status.Update(daemon.Close(session));
    } else {  // given up, but it may be there
      daemon.Close(session, {.deadline = options_.layer_deadline}).IgnoreError();
    }
  }
  local_.Shrink(sequence.store->local_pages, 0);
  places_.push_back(sequence.place);
  batch_.clear();
  sequences_.erase(id);
  return status;
}

absl::StatusOr<uint64_t> SparseDecoder::Impl::Tokens(SequenceId id) const {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) {
    return absl::NotFoundError(absl::StrCat("sequence ", id, " is not open"));
  }
  return found->second->zone.tokens();
}

absl::Status SparseDecoder::Impl::GrowLocal(Sequence& sequence, uint64_t tokens) {
  if (!local_.exists() || local_.Grow(sequence.store->local_pages, tokens)) return absl::OkStatus();
  return proto::FieldError(absl::StatusCode::kResourceExhausted, "local_tokens_max",
                           "the local copy is full");
}

/// The next `tokens` tokens that the daemons do not have, all of them in the zone.
Block SparseDecoder::Impl::NextBlock(Sequence& sequence, uint64_t tokens) {
  Block block;
  block.store = sequence.store;
  block.start = sequence.given;
  for (uint64_t i = 0; i < tokens; ++i) block.slots.push_back(sequence.zone.Slot(block.start + i));
  if (local_.exists()) {
    block.local_slots = local_.Slots(sequence.store->local_pages, block.start, tokens);
  }
  sequence.given += tokens;
  return block;
}

/// Tokens that were decoded and do not fill a block yet; the stream is idle.
absl::Status SparseDecoder::Impl::SendRest(Sequence& sequence) {
  absl::Status local = GrowLocal(sequence, sequence.zone.tokens());
  if (!local.ok()) return local;
  std::vector<Block> blocks;
  while (sequence.given < sequence.zone.tokens()) {
    const uint64_t rest = sequence.zone.tokens() - sequence.given;
    blocks.push_back(NextBlock(sequence, std::min<uint64_t>(rest, options_.block_tokens)));
  }
  absl::Status sent = uploader_->Enqueue(std::move(blocks), nullptr);
  if (!sent.ok()) return sent;
  if (!Drain(sequence)) return absl::DeadlineExceededError("append_deadline: blocks under way");
  return absl::OkStatus();
}

absl::Status SparseDecoder::Impl::BeginPrefill(SequenceId id, uint64_t tokens) {
  const auto found = Find(id);
  if (!found.ok()) return found.status();
  Sequence& sequence = **found;
  if (tokens == 0) return Invalid("tokens", "is 0");
  if (sequence.prefill_tokens != 0) {
    return absl::FailedPreconditionError("a prefill of this sequence is under way");
  }
  // A turn after decoded tokens: the daemons take positions without gaps.
  absl::Status idle = client::CudaStatus(cudaDeviceSynchronize(), "before a prefill");
  if (!idle.ok()) return idle;
  absl::Status status = SendRest(sequence);
  if (status.ok()) status = GrowLocal(sequence, sequence.zone.tokens() + tokens);
  if (!status.ok()) return status;
  const uint64_t start = sequence.zone.tokens();
  if (!sequence.zone.Skip(tokens)) {
    return proto::FieldError(absl::StatusCode::kResourceExhausted, "tokens", "pages ran out");
  }
  sequence.prefill_start = start;
  sequence.prefill_tokens = tokens;
  sequence.prefill_done.assign(options_.shape.layers, 0);
  return absl::OkStatus();
}

absl::Status SparseDecoder::Impl::PrefillLayer(SequenceId id, uint32_t layer,
                                               const PrefillTensors& tensors, cudaStream_t stream) {
  const auto found = Find(id);
  if (!found.ok()) return found.status();
  Sequence& sequence = **found;
  if (layer >= options_.shape.layers) return Invalid("layer", "is not below shape.layers");
  if (sequence.prefill_tokens == 0) return absl::FailedPreconditionError("no BeginPrefill");
  if (sequence.prefill_done[layer] != 0) {
    return absl::FailedPreconditionError(absl::StrCat("layer ", layer, " was given already"));
  }
  if (tensors.keys == nullptr) return Invalid("tensors.keys", "is null");
  if (tensors.values == nullptr) return Invalid("tensors.values", "is null");
  absl::Status sent =
      prefill_->SendLayer(sequence.zone, *sequence.store, layer, sequence.prefill_start,
                          sequence.prefill_tokens, tensors, stream);
  if (!sent.ok()) return sent;  // may be repeated: daemons skip what they hold
  sequence.prefill_done[layer] = 1;
  if (std::count(sequence.prefill_done.begin(), sequence.prefill_done.end(), 1) ==
      static_cast<ptrdiff_t>(options_.shape.layers)) {
    sequence.given = sequence.prefill_start + sequence.prefill_tokens;
    sequence.store->held.store(sequence.given);
    sequence.prefill_tokens = 0;
  }
  return absl::OkStatus();
}

/// Room for the step's tokens. Where the daemons are so far behind that there is none, they have as
/// long as a layer's answers; then tokens leave the zone without them, unless that is an error.
absl::Status SparseDecoder::Impl::MakeRoom(Sequence& sequence, uint32_t tokens) {
  FarStore& store = *sequence.store;
  sequence.zone.Slide(store.held.load());
  if (sequence.zone.Append(tokens)) return absl::OkStatus();
  uploader_->Drain(&store,
                   std::chrono::duration_cast<std::chrono::milliseconds>(options_.layer_deadline));
  sequence.zone.Slide(store.held.load());
  if (sequence.zone.Append(tokens)) return absl::OkStatus();
  if (options_.fallback != Fallback::kSteadyZone) {
    return proto::FieldError(absl::StatusCode::kResourceExhausted, "recent_tokens",
                             "the daemons are behind, and the steady zone is full");
  }
  for (size_t d = 0; d < store.lost.size(); ++d) uploader_->MarkLost(store, d);
  sequence.zone.Slide(sequence.zone.tokens());
  if (sequence.zone.Append(tokens)) return absl::OkStatus();
  return proto::FieldError(absl::StatusCode::kResourceExhausted, "recent_tokens", "pages ran out");
}

absl::Status SparseDecoder::Impl::BeginStep(absl::Span<const SequenceId> batch,
                                            uint32_t query_tokens, cudaStream_t stream) {
  if (batch.empty() || batch.size() > options_.sequences_max) {
    return Invalid("batch", "not in 1..sequences_max");
  }
  if (query_tokens == 0 || query_tokens > options_.query_tokens_max) {
    return Invalid("query_tokens", "not in 1..query_tokens_max");
  }
  std::vector<Sequence*> sequences;
  for (const SequenceId id : batch) {
    const auto found = Find(id);
    if (!found.ok()) return found.status();
    if ((*found)->prefill_tokens != 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("sequence ", id, ": layers of its prefill are missing"));
    }
    if (std::find(sequences.begin(), sequences.end(), *found) != sequences.end()) {
      return Invalid("batch", absl::StrCat("sequence ", id, " is in it twice"));
    }
    sequences.push_back(*found);
  }

  // Blocks that are full go off. Their rows were written by earlier steps; the youngest tokens may
  // still be taken back (Truncate) and stay.
  std::vector<Block> blocks;
  for (Sequence* const sequence : sequences) {
    const uint64_t tokens = sequence->zone.tokens();
    while (sequence->given + options_.block_tokens + options_.query_tokens_max <= tokens) {
      absl::Status local = GrowLocal(*sequence, sequence->given + options_.block_tokens);
      if (!local.ok()) return local;
      blocks.push_back(NextBlock(*sequence, options_.block_tokens));
    }
  }
  absl::Status sent = uploader_->Enqueue(std::move(blocks), stream);
  if (!sent.ok()) return sent;

  std::vector<StepSequence> step;
  for (Sequence* const sequence : sequences) {
    absl::Status room = MakeRoom(*sequence, query_tokens);
    if (!room.ok()) {
      for (size_t i = 0; i < step.size(); ++i) {
        sequences[i]->zone.Truncate(sequences[i]->zone.tokens() - query_tokens);
      }
      return room;
    }
    step.push_back({sequence->place, &sequence->zone, sequence->store.get(), &sequence->caches});
  }
  batch_.assign(batch.begin(), batch.end());
  layers_done_.assign(options_.shape.layers, 0);
  return step_.Begin(std::move(step), query_tokens, stream);
}

absl::Status SparseDecoder::Impl::Attend(uint32_t layer, const void* queries, const void* keys,
                                         const void* values, void* out, cudaStream_t stream) {
  if (layer >= options_.shape.layers) return Invalid("layer", "is not below shape.layers");
  if (batch_.empty()) return absl::FailedPreconditionError("no BeginStep");
  if (layers_done_[layer] != 0) {
    return absl::FailedPreconditionError(absl::StrCat("layer ", layer, " was attended already"));
  }
  absl::Status status = step_.Attend(layer, queries, keys, values, out, stream);
  if (status.ok()) layers_done_[layer] = 1;
  return status;
}

absl::Status SparseDecoder::Impl::Truncate(SequenceId id, uint64_t tokens) {
  const auto found = Find(id);
  if (!found.ok()) return found.status();
  Sequence& sequence = **found;
  if (sequence.prefill_tokens != 0) {
    return absl::FailedPreconditionError("a prefill of this sequence is under way");
  }
  if (tokens > sequence.zone.tokens()) return Invalid("tokens", "more than the sequence has");
  if (tokens < sequence.given) {
    if (!Drain(sequence)) return absl::DeadlineExceededError("append_deadline: blocks under way");
  }
  if (!sequence.zone.Truncate(tokens)) {
    return Invalid("tokens", "below the recent tokens that the GPU still has");
  }
  batch_.clear();
  for (RowCache& cache : sequence.caches) cache.Truncate(tokens);
  if (tokens >= sequence.given) return absl::OkStatus();
  sequence.given = tokens;
  sequence.store->held.store(std::min<uint64_t>(sequence.store->held.load(), tokens));
  local_.Shrink(sequence.store->local_pages, tokens);
  absl::Status status;
  for (size_t d = 0; d < step_.shares().size(); ++d) {
    if (sequence.store->lost[d].load() != 0) continue;
    const absl::Status truncated =
        step_.shares()[d].tokens->Truncate(sequence.store->sessions[d], tokens);
    // What a daemon holds beyond would be taken for the tokens that come instead.
    if (!truncated.ok()) uploader_->MarkLost(*sequence.store, d);
    status.Update(truncated);
  }
  return status;
}

absl::Status SparseDecoder::Impl::Flush(std::chrono::milliseconds timeout) {
  if (uploader_->Drain(nullptr, timeout)) return absl::OkStatus();
  return absl::DeadlineExceededError("timeout: blocks are under way");
}

DecoderStats SparseDecoder::Impl::stats() const {
  DecoderStats stats = step_.stats();
  stats.bytes_to_host += uploader_->bytes_packed() + prefill_->bytes_packed();
  stats.blocks_sent = uploader_->blocks_sent();
  stats.sequences_lost += uploader_->sessions_lost();
  return stats;
}

absl::StatusOr<std::unique_ptr<SparseDecoder>> SparseDecoder::Create(
    const DecoderOptions& options, const std::vector<ClientOptions>& daemons) {
  const absl::Status valid = client::CheckOptions(options, daemons.size());
  if (!valid.ok()) return valid;
  DecoderOptions complete = options;
  if (complete.shape.softmax_scale == 0.0F) {
    complete.shape.softmax_scale = 1.0F / std::sqrt(static_cast<float>(complete.shape.key_dim));
  }
  std::vector<std::unique_ptr<KvClient>> clients;
  std::vector<DaemonShare> shares;
  const auto heads = static_cast<uint32_t>(complete.shape.kv_heads / daemons.size());
  std::chrono::microseconds spin{0};
  for (const ClientOptions& daemon : daemons) {
    auto questions = KvClient::Connect(daemon);
    if (!questions.ok()) return questions.status();
    spin = std::max(spin, daemon.spin);
    ClientOptions patient = daemon;  // tokens are in no hurry
    patient.spin = std::chrono::microseconds(0);
    auto tokens = KvClient::Connect(patient);
    if (!tokens.ok()) return tokens.status();
    const auto first = static_cast<uint32_t>(shares.size()) * heads;
    shares.push_back({questions->get(), tokens->get(), first, heads, daemon});
    clients.push_back(*std::move(questions));
    clients.push_back(*std::move(tokens));
  }
  auto impl = std::make_unique<Impl>(complete, std::move(clients), shares, spin);
  const absl::Status allocated = impl->Allocate();
  if (!allocated.ok()) return allocated;
  return std::unique_ptr<SparseDecoder>(new SparseDecoder(std::move(impl)));
}

SparseDecoder::SparseDecoder(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SparseDecoder::~SparseDecoder() = default;
absl::StatusOr<SequenceId> SparseDecoder::Open() { return impl_->Open(); }
absl::Status SparseDecoder::Close(SequenceId sequence) { return impl_->Close(sequence); }
absl::StatusOr<uint64_t> SparseDecoder::Tokens(SequenceId sequence) const {
  return impl_->Tokens(sequence);
}
absl::Status SparseDecoder::BeginPrefill(SequenceId sequence, uint64_t tokens) {
  return impl_->BeginPrefill(sequence, tokens);
}
absl::Status SparseDecoder::PrefillLayer(SequenceId sequence, uint32_t layer,
                                         const PrefillTensors& tensors, cudaStream_t stream) {
  return impl_->PrefillLayer(sequence, layer, tensors, stream);
}
absl::Status SparseDecoder::BeginStep(absl::Span<const SequenceId> batch, uint32_t query_tokens,
                                      cudaStream_t stream) {
  return impl_->BeginStep(batch, query_tokens, stream);
}
absl::Status SparseDecoder::Attend(uint32_t layer, const void* queries, const void* keys,
                                   const void* values, void* out, cudaStream_t stream) {
  return impl_->Attend(layer, queries, keys, values, out, stream);
}
absl::Status SparseDecoder::Truncate(SequenceId sequence, uint64_t tokens) {
  return impl_->Truncate(sequence, tokens);
}
absl::Status SparseDecoder::Flush(std::chrono::milliseconds timeout) {
  return impl_->Flush(timeout);
}
DecoderStats SparseDecoder::stats() const { return impl_->stats(); }
uint64_t SparseDecoder::daemon_ns(uint32_t layer) const {
  return layer < impl_->shape().layers ? impl_->step().DaemonNanoseconds(layer) : 0;
}
uint64_t SparseDecoder::device_bytes() const { return impl_->device_bytes(); }
uint64_t SparseDecoder::pinned_bytes() const { return impl_->pinned_bytes(); }

}  // namespace kvseek
