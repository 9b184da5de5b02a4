#include "service/session.h"

#include <algorithm>
#include <mutex>
#include <shared_mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_code.h"

namespace kvseek::service {

Session::Session(uint64_t id, SessionSettings settings, MemoryBudget::Reservation memory,
                 Start start, TimePoint now)
    : id_(id),
      settings_(std::move(settings)),
      memory_(std::move(memory)),
      plan_(std::move(start.plan)),
      planner_(std::move(start.planner)),
      last_used_(now) {
  layers_.reserve(start.layers.size());
  for (const auto& state : start.layers) {
    layers_.push_back(std::make_unique<LayerCache>(state, absl::MakeSpan(sealing_)));
  }
}

uint64_t Session::BookkeepingBytes(const SessionSettings& settings) {
  return sizeof(Session) + sizeof(LivePlanner) + settings.name.size() + settings.model.size() +
         SessionPlan::Bytes(settings.layers, settings.kv_heads, settings.plan.get()) +
         settings.layers * (sizeof(LayerCache) + sizeof(LayerState) +
                            uint64_t{settings.kv_heads} * HeadCache::BookkeepingBytes() +
                            SelectionMemory::BookkeepingBytes(settings.kv_heads));
}

uint64_t Session::KvBytes(const SessionSettings& settings, int64_t tokens) {
  const uint64_t rows = settings.kv_heads * HeadCache::Bytes(settings.kv, tokens);
  const size_t block_elements = settings.kv_heads * static_cast<size_t>(settings.kv.key_dim);
  const uint64_t landmarks =
      settings.TakesLandmarks()
          ? LandmarkKeys::Bytes(tokens, settings.landmark.block, block_elements)
          : 0;
  return settings.layers * (rows + landmarks);
}

absl::StatusOr<int64_t> Session::Append(uint32_t layer, const LayerRows& rows, MemoryBudget& budget,
                                        Worker worker) {
  const std::shared_lock lock(shorten_mutex_);
  return layers_[layer]->Append(rows, budget, worker);
}

bool Session::Publish(uint32_t layer, size_t head, index::BuiltKind kind,
                      std::shared_ptr<const index::BuiltIndex> built, const LayerState& source) {
  const std::shared_lock lock(shorten_mutex_);
  return layers_[layer]->Publish(head, kind, std::move(built), source);
}

absl::Status Session::Learn(uint32_t layer, const SampledQueries& queries, MemoryBudget& budget) {
  const std::shared_lock lock(shorten_mutex_);
  return layers_[layer]->Learn(queries, settings_.query_heads, budget);
}

absl::Status Session::Truncate(uint64_t tokens, MemoryBudget& budget) {
  const std::unique_lock lock(shorten_mutex_);
  auto states = States(&tokens, budget);
  if (!states.ok()) return states.status();
  for (size_t l = 0; l < layers_.size(); ++l) {
    const LayerState& state = *(*states)[l];
    for (size_t h = 0; h < state.kv_heads(); ++h) {
      layers_[l]->selections().ForgetGone(h, state.View(h));
    }
    layers_[l]->Replace(std::move((*states)[l]));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::shared_ptr<const LayerState>>> Session::States(
    const uint64_t* tokens, MemoryBudget& budget) const {
  std::vector<std::shared_ptr<const LayerState>> states;
  states.reserve(layers_.size());
  int64_t longest = 0;
  for (const auto& layer : layers_) {
    states.push_back(layer->State());
    longest = std::max(longest, states.back()->tokens);
  }
  if (tokens == nullptr) return states;
  if (*tokens > static_cast<uint64_t>(longest)) {
    return proto::FieldError(
        absl::StatusCode::kInvalidArgument, "tokens",
        absl::StrCat("the longest layer has ", longest, " tokens, not ", *tokens));
  }
  const auto kept = static_cast<int64_t>(*tokens);
  uint64_t bytes = 0;
  for (const auto& state : states) bytes += TruncateStateBytes(*state, kept);
  absl::StatusOr<MemoryGrant> memory = MemoryGrant::Make(budget, bytes, "tokens");
  if (!memory.ok()) return memory.status();
  for (auto& state : states) {
    auto shorter = TruncateState(state, kept, *memory, budget);
    if (!shorter.ok()) return shorter.status();
    state = *std::move(shorter);
  }
  return states;
}

uint64_t Session::Bytes() const {
  uint64_t bytes = 0;
  for (const auto& layer : layers_) {
    const std::shared_ptr<const LayerState> state = layer->State();
    bytes += settings_.kv_heads * HeadCache::Bytes(settings_.kv, state->tokens);
    bytes += layer->selections().Bytes();
    if (state->landmarks != nullptr) bytes += state->landmarks->Bytes();
    for (const LayerState::BuiltSet& set : state->indexes->built) {
      for (const auto& built : set) bytes += built == nullptr ? 0 : built->Bytes();
    }
  }
  return bytes;
}

}  // namespace kvseek::service
