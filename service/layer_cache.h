// The head caches of one layer: what queries read, and how it changes.
//
// A LayerState is immutable. Queries take the current one (a pointer, under a short lock) and read
// it as long as they like. Appends and truncations are serialised; they make the next state on the
// side, whatever that takes, and publish it in one step. So all heads of a layer grow together, and
// a failed change changes nothing.
#ifndef KVSEEK_SERVICE_LAYER_CACHE_H_
#define KVSEEK_SERVICE_LAYER_CACHE_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "index/built_index.h"
#include "index/scratch.h"
#include "service/compute_pool.h"
#include "service/head_cache.h"
#include "service/landmark_keys.h"
#include "service/memory_budget.h"
#include "service/query_sample.h"
#include "service/selection_memory.h"
#include "service/strand.h"
#include "service/traffic_queries.h"

namespace kvseek::service {

struct LayerState {
  using BuiltSet = std::array<std::shared_ptr<const index::BuiltIndex>, index::kBuiltKinds>;

  /// What has been built in the background.
  struct Indexes {
    std::vector<BuiltSet> built;           ///< (kv_heads), by kind; null where there is none yet
    std::vector<uint32_t> learned;         ///< (kv_heads), a bit for each kind: built with queries
    std::vector<int64_t> landmarks_built;  ///< (kv_heads): landmarks that the landmark index has
  };

  // States share what they have the same of: the next one, a token longer, is a copy of pointers.
  int64_t tokens = 0;                                   ///< of every head
  std::shared_ptr<const std::vector<HeadCache>> heads;  ///< (kv_heads)
  std::shared_ptr<const Indexes> indexes;
  std::shared_ptr<const QuerySample> queries;  ///< null: none came
  /// The client sends queries with its appends: none are taken from traffic.
  bool queries_sent = false;
  std::shared_ptr<const LandmarkKeys> landmarks;  ///< that the client supplied; null: none came

  const HeadCache& Head(size_t head) const { return (*heads)[head]; }
  size_t kv_heads() const { return heads->size(); }
  /// Valid while the state lives.
  index::KvView View(size_t head) const { return Head(head).View(tokens); }
  const index::BuiltIndex* Built(size_t head, index::BuiltKind kind) const {
    return indexes->built[head][static_cast<size_t>(kind)].get();
  }
  bool Learned(size_t head, index::BuiltKind kind) const {
    return (indexes->learned[head] >> static_cast<uint32_t>(kind) & 1U) != 0;
  }

  /// How many blocks that end at `end` or before have a landmark of the client's.
  int64_t Landmarks(int64_t end) const { return landmarks == nullptr ? 0 : landmarks->Count(end); }

  /// A layer without tokens; the first head lies on node shape.node of `nodes`, the others on those
  /// that follow, counted round.
  static std::shared_ptr<const LayerState> Empty(const index::KvShape& shape, uint32_t kv_heads,
                                                 int nodes = 1);
};

/// Rows to be appended to all heads of a layer; contiguous.
struct LayerRows {
  int64_t start = 0;  ///< position of the first
  int64_t tokens = 0;
  const uint16_t* keys = nullptr;    ///< (tokens, kv_heads, key_dim)
  const uint16_t* values = nullptr;  ///< (tokens, kv_heads, value_dim)
  SampledQueries queries{};          ///< of some of the tokens
  size_t query_heads = 0;
  GivenLandmarks landmarks{};  ///< of blocks that end in these tokens
};

/// Where changes compute: a worker of a pool and its scratch, which must be empty and is used.
struct Worker {
  ComputePool& pool;
  index::Scratch& scratch;
};

/// What appends write; thread-safe.
class LayerCache {
 public:
  /// Once appends have brought all of their tokens, segments are made on `sealing`, as many at a
  /// time as there are strands, but on a quarter of the workers at most. They must outlive the
  /// cache.
  LayerCache(const std::shared_ptr<const LayerState>& state, absl::Span<Strand> sealing)
      : state_(state), selections_(state->kv_heads()), sealing_(sealing) {}

  std::shared_ptr<const LayerState> State() const ABSL_LOCKS_EXCLUDED(state_mutex_);

  /// Appends what is not held yet of `rows` and returns the tokens held then. Checks first, then
  /// reserves all memory, then writes. Errors: failed_precondition naming "start" (a gap),
  /// invalid_argument naming "payload" (an element that is not finite or beyond 65504),
  /// resource_exhausted.
  absl::StatusOr<int64_t> Append(const LayerRows& rows, MemoryBudget& budget, Worker worker)
      ABSL_LOCKS_EXCLUDED(write_mutex_, state_mutex_);

  /// Adds queries that were taken from traffic; those of positions that are not held any more are
  /// left out. resource_exhausted.
  absl::Status Learn(const SampledQueries& queries, size_t query_heads, MemoryBudget& budget)
      ABSL_LOCKS_EXCLUDED(write_mutex_, state_mutex_);

  /// Adds an index that was built from `source`, an earlier state of this layer. False if the keys
  /// that it covers are no longer these.
  bool Publish(size_t head, index::BuiltKind kind, std::shared_ptr<const index::BuiltIndex> built,
               const LayerState& source) ABSL_LOCKS_EXCLUDED(write_mutex_, state_mutex_);

  /// Replaces the state. REQUIRES: nobody appends meanwhile (Session sees to it).
  void Replace(std::shared_ptr<const LayerState> state) ABSL_LOCKS_EXCLUDED(state_mutex_);

  /// Appends to this layer in the order of arrival.
  Strand& strand() { return strand_; }

  /// What decode steps leave for the next ones.
  SelectionMemory& selections() { return selections_; }

  /// Where queries of traffic wait for Learn.
  TrafficQueries& traffic() { return traffic_; }

  /// Set while the layer waits for a build.
  std::atomic<bool>& build_queued() { return build_queued_; }

 private:
  /// `state` with `added` tokens of `rows` behind those that it has, but for its other members.
  absl::StatusOr<std::shared_ptr<LayerState>> Grow(const LayerState& state, const LayerRows& rows,
                                                   int64_t added, MemoryBudget& budget,
                                                   Worker worker) const;
  /// Lets the pool make segments that `next` waits for and `state` did not.
  void MakeLater(const LayerState& state, const LayerState& next, ComputePool& pool) noexcept;

  std::mutex write_mutex_;  ///< held by an append from its look at the state to its publication
  mutable std::mutex state_mutex_
      ABSL_ACQUIRED_AFTER(write_mutex_);  ///< held for the swap of a pointer only
  std::shared_ptr<const LayerState> state_ ABSL_GUARDED_BY(state_mutex_);
  SelectionMemory selections_;
  const absl::Span<Strand> sealing_;
  TrafficQueries traffic_;
  std::atomic<bool> build_queued_{false};
  Strand strand_;
};

/// The first `tokens` tokens of a state; the state itself if it has no more.
absl::StatusOr<std::shared_ptr<const LayerState>> TruncateState(
    const std::shared_ptr<const LayerState>& state, int64_t tokens, MemoryGrant& memory,
    MemoryBudget& budget);
/// Bytes of memory that TruncateState takes.
uint64_t TruncateStateBytes(const LayerState& state, int64_t tokens);

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_LAYER_CACHE_H_
