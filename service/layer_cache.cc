#include "service/layer_cache.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/attention.h"
#include "proto/status_code.h"

namespace kvseek::service {
namespace {

/// Elements that one thread checks at a time: enough to hide the hand-over.
constexpr int64_t kCheckElements = int64_t{1} << 18;
/// Rows of all heads that one thread copies by itself: as for a decode step.
constexpr int64_t kRowsInline = 256;

/// Refuses elements that are not finite or too large for the codes. `tensor` is (rows, heads, dim);
/// `name` says what a row is.
absl::Status CheckElements(const char* name, const uint16_t* tensor, int64_t rows, int64_t heads,
                           int64_t dim, kernels::DType dtype, Worker worker) {
  const int64_t count = rows * heads * dim;
  std::atomic<int64_t> first_bad{count};
  const auto parts = static_cast<int>((count + kCheckElements - 1) / kCheckElements);
  const auto check = [&](int part, index::Scratch&) {
    const int64_t begin = part * kCheckElements;
    const int64_t length = std::min(kCheckElements, count - begin);
    const int64_t bad = kernels::FindBadElement(tensor + begin, dtype, length);
    if (bad < 0) return;
    int64_t known = first_bad.load();
    while (begin + bad < known && !first_bad.compare_exchange_weak(known, begin + bad)) {
    }
  };
  if (parts == 1) {
    check(0, worker.scratch);
  } else if (parts > 1) {
    worker.pool.ForEach(parts, check, worker.scratch);
  }
  const int64_t bad = first_bad.load();
  if (bad == count) return absl::OkStatus();
  return proto::FieldError(
      absl::StatusCode::kInvalidArgument, "payload",
      absl::StrCat(name, " ", bad / dim / heads, ", KV head ", bad / dim % heads, ", element ",
                   bad % dim, " is not finite or its magnitude exceeds 65504"));
}

}  // namespace

std::shared_ptr<const LayerState> LayerState::Empty(const index::KvShape& shape, uint32_t kv_heads,
                                                    int nodes) {
  auto state = std::make_shared<LayerState>();
  auto heads = std::make_shared<std::vector<HeadCache>>();
  heads->reserve(kv_heads);
  index::KvShape head_shape = shape;
  for (uint32_t h = 0; h < kv_heads; ++h) {
    heads->emplace_back(head_shape);
    head_shape.node = (head_shape.node + 1) % nodes;
  }
  state->heads = std::move(heads);
  auto indexes = std::make_shared<Indexes>();
  indexes->built.resize(kv_heads);
  indexes->learned.resize(kv_heads);
  indexes->landmarks_built.resize(kv_heads);
  state->indexes = std::move(indexes);
  return state;
}

std::shared_ptr<const LayerState> LayerCache::State() const {
  const std::lock_guard lock(state_mutex_);
  return state_;
}

void LayerCache::Replace(std::shared_ptr<const LayerState> state) {
  const std::lock_guard lock(state_mutex_);
  state_.swap(state);  // the old one dies after the lock
}

absl::StatusOr<int64_t> LayerCache::Append(const LayerRows& rows, MemoryBudget& budget,
                                           Worker worker) {
  const std::lock_guard write_lock(write_mutex_);
  const std::shared_ptr<const LayerState> state = State();
  if (rows.start > state->tokens) {
    return proto::FieldError(
        absl::StatusCode::kFailedPrecondition, "start",
        absl::StrCat("a gap: ", state->tokens, " tokens are held, not ", rows.start));
  }
  const auto heads = static_cast<int>(state->kv_heads());
  const index::KvShape& shape = state->Head(0).shape();
  for (const auto& [name, tensor, dim] :
       {std::tuple("key of token", rows.keys, shape.key_dim),
        std::tuple("value of token", rows.values, shape.value_dim)}) {
    absl::Status status = CheckElements(name, tensor, rows.tokens, heads, dim, shape.dtype, worker);
    if (!status.ok()) return status;
  }
  const auto query_elements = static_cast<int64_t>(rows.queries.positions.size());
  absl::Status queries_good =
      CheckElements("query of token", rows.queries.rows, query_elements,
                    static_cast<int64_t>(rows.query_heads), shape.key_dim, shape.dtype, worker);
  if (!queries_good.ok()) return queries_good;
  absl::Status landmarks_good = CheckElements("landmark", rows.landmarks.rows,
                                              static_cast<int64_t>(rows.landmarks.positions.size()),
                                              heads, shape.key_dim, shape.dtype, worker);
  if (!landmarks_good.ok()) return landmarks_good;
  const int64_t skipped = std::min(state->tokens - rows.start, rows.tokens);
  const int64_t added = rows.tokens - skipped;
  std::shared_ptr<const QuerySample> queries = state->queries;
  if (!rows.queries.positions.empty()) {
    const QuerySample none(rows.query_heads * static_cast<size_t>(shape.key_dim));
    auto more = (queries == nullptr ? none : *queries).With(rows.queries, budget);
    if (!more.ok()) return more.status();
    queries = *std::move(more);
  }
  auto landmarks =
      LandmarkKeys::With(state->landmarks, rows.landmarks,
                         static_cast<size_t>(heads) * static_cast<size_t>(shape.key_dim), budget);
  if (!landmarks.ok()) return landmarks.status();
  if (added == 0 && queries == state->queries && *landmarks == state->landmarks) {
    return state->tokens;
  }

  auto next = Grow(*state, rows, added, budget, worker);
  if (!next.ok()) return next.status();
  (*next)->queries = std::move(queries);
  (*next)->queries_sent = state->queries_sent || !rows.queries.positions.empty();
  (*next)->landmarks = *std::move(landmarks);
  const std::shared_ptr<const LayerState> published = *std::move(next);
  Replace(published);
  if (published->heads != state->heads) MakeLater(*state, *published, worker.pool);
  return published->tokens;
}

absl::StatusOr<std::shared_ptr<LayerState>> LayerCache::Grow(const LayerState& state,
                                                             const LayerRows& rows, int64_t added,
                                                             MemoryBudget& budget,
                                                             Worker worker) const {
  const std::vector<HeadCache>& heads = *state.heads;
  const index::KvShape& shape = heads.front().shape();
  const auto key_dim = static_cast<size_t>(shape.key_dim);
  const auto value_dim = static_cast<size_t>(shape.value_dim);
  const auto first = static_cast<size_t>(rows.tokens - added);
  const auto rows_of = [&](size_t h) {
    return StridedRows{added, rows.keys + (first * heads.size() + h) * key_dim,
                       rows.values + (first * heads.size() + h) * value_dim, heads.size() * key_dim,
                       heads.size() * value_dim};
  };
  auto next = std::make_shared<LayerState>(state);
  next->tokens += added;
  size_t done = 0;  // heads that have their rows
  for (const HeadCache& head : heads) head.PrefetchPlace();
  while (done < heads.size() && heads[done].AppendInPlace(state.tokens, rows_of(done))) ++done;
  if (done == heads.size() || added == 0) return next;

  std::vector<MemoryGrant> shares;
  shares.reserve(heads.size() - done);
  uint64_t total = 0;
  for (size_t h = done; h < heads.size(); ++h) total += heads[h].AppendBytes(state.tokens, added);
  absl::StatusOr<MemoryGrant> memory = MemoryGrant::Make(budget, total, "payload");
  if (!memory.ok()) return memory.status();
  bool long_work = added * static_cast<int64_t>(heads.size()) > kRowsInline;
  for (size_t h = done; h < heads.size(); ++h) {
    shares.push_back(memory->Split(heads[h].AppendBytes(state.tokens, added)));
    long_work = long_work || heads[h].AppendMakesSegment(state.tokens, added);
  }
  std::vector<HeadCache> grown = heads;
  std::vector<absl::Status> failures(shares.size());
  const auto grow = [&](int number, index::Scratch& scratch) {
    const auto i = static_cast<size_t>(number);
    const size_t h = done + i;
    auto longer = heads[h].Append(state.tokens, rows_of(h), shares[i], scratch);
    if (longer.ok()) {
      grown[h] = *std::move(longer);
    } else {
      failures[i] = longer.status();
    }
  };
  const auto count = static_cast<int>(shares.size());
  if (long_work) {
    worker.pool.ForEach(count, grow, worker.scratch);
  } else {
    for (int i = 0; i < count; ++i) grow(i, worker.scratch);
  }
  for (const absl::Status& failure : failures) {
    if (!failure.ok()) return failure;
  }
  next->heads = std::make_shared<const std::vector<HeadCache>>(std::move(grown));
  return next;
}

void LayerCache::MakeLater(const LayerState& state, const LayerState& next,
                           ComputePool& pool) noexcept {
  const auto make = [](const std::weak_ptr<PendingSegment>& waiting, index::Scratch& scratch) {
    try {
      if (const auto segment = waiting.lock()) segment->Make(scratch);
    } catch (const std::bad_alloc&) {  // whoever needs it tries again
    }
  };
  const auto quarter = static_cast<size_t>(pool.workers() / 4);
  const size_t strands = std::clamp<size_t>(quarter, 1, sealing_.size());
  try {
    for (size_t h = 0; h < next.kv_heads(); ++h) {
      const std::shared_ptr<PendingSegment>& pending = next.Head(h).pending();
      if (pending == nullptr || pending->made() || pending == state.Head(h).pending()) continue;
      sealing_[h % strands].Submit(pool, [make, waiting = std::weak_ptr(pending)](
                                             index::Scratch& scratch) { make(waiting, scratch); });
    }
  } catch (const std::bad_alloc&) {
  }
}

absl::Status LayerCache::Learn(const SampledQueries& queries, size_t query_heads,
                               MemoryBudget& budget) {
  const std::lock_guard write_lock(write_mutex_);
  const std::shared_ptr<const LayerState> state = State();
  const auto key_dim = static_cast<size_t>(state->Head(0).shape().key_dim);
  const QuerySample none(query_heads * key_dim);
  auto more = (state->queries == nullptr ? none : *state->queries).With(queries, budget);
  if (more.ok()) more = QuerySample::Below(*more, state->tokens, budget);
  if (!more.ok()) return more.status();
  auto next = std::make_shared<LayerState>(*state);
  next->queries = *std::move(more);
  Replace(std::move(next));
  return absl::OkStatus();
}

bool LayerCache::Publish(size_t head, index::BuiltKind kind,
                         std::shared_ptr<const index::BuiltIndex> built, const LayerState& source) {
  const std::lock_guard write_lock(write_mutex_);
  const std::shared_ptr<const LayerState> state = State();
  const auto covered = static_cast<size_t>(built->covered() / index::kSegmentTokens);
  const auto segments = state->View(head).segments;
  const auto sources = source.View(head).segments;
  if (segments.size() < covered ||
      !std::equal(sources.begin(), sources.begin() + static_cast<ptrdiff_t>(covered),
                  segments.begin())) {
    return false;
  }
  auto indexes = std::make_shared<LayerState::Indexes>(*state->indexes);
  if (kind == index::BuiltKind::kLandmark) {
    indexes->landmarks_built[head] = source.Landmarks(built->covered());
  }
  indexes->built[head][static_cast<size_t>(kind)] = std::move(built);
  const uint32_t bit = 1U << static_cast<uint32_t>(kind);
  indexes->learned[head] &= ~bit;
  if (source.queries != nullptr && !source.queries->positions().empty()) {
    indexes->learned[head] |= bit;
  }
  auto next = std::make_shared<LayerState>(*state);
  next->indexes = std::move(indexes);
  Replace(std::move(next));
  return true;
}

absl::StatusOr<std::shared_ptr<const LayerState>> TruncateState(
    const std::shared_ptr<const LayerState>& state, int64_t tokens, MemoryGrant& memory,
    MemoryBudget& budget) {
  if (tokens >= state->tokens) return state;
  auto next = std::make_shared<LayerState>();
  next->tokens = tokens;
  std::vector<HeadCache> heads;
  heads.reserve(state->kv_heads());
  for (const HeadCache& head : *state->heads) {
    absl::StatusOr<HeadCache> shorter = head.Truncate(tokens, memory);
    if (!shorter.ok()) return shorter.status();
    heads.push_back(*std::move(shorter));
  }
  next->heads = std::make_shared<const std::vector<HeadCache>>(std::move(heads));
  auto queries = QuerySample::Below(state->queries, tokens, budget);
  if (!queries.ok()) return queries.status();
  next->queries = *std::move(queries);
  next->queries_sent = state->queries_sent;
  auto landmarks = LandmarkKeys::Below(state->landmarks, tokens, budget);
  if (!landmarks.ok()) return landmarks.status();
  next->landmarks = *std::move(landmarks);
  auto indexes = std::make_shared<LayerState::Indexes>(*state->indexes);
  for (LayerState::BuiltSet& set : indexes->built) {
    for (auto& built : set) {
      if (built != nullptr && built->covered() > index::SealedTokens(tokens)) built = nullptr;
    }
  }
  next->indexes = std::move(indexes);
  return next;
}

uint64_t TruncateStateBytes(const LayerState& state, int64_t tokens) {
  uint64_t bytes = 0;
  for (const HeadCache& head : *state.heads) bytes += head.TruncateBytes(tokens);
  return bytes;
}

}  // namespace kvseek::service
