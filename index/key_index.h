// What every index does: answer one group of query heads over one head cache.
//
// Who calls it: the service's request handler, `kvseek eval` and the tests. An index owns no keys;
// it reads them through a KvView. One search is one query token of one KV head. It is planned once,
// done in steps, each cut into pieces that any threads may run in any order, and finished once:
//
//   PlanPtr plan = index.Plan(view, query, options, scratch);
//   do {
//     for (int i = 0; i < plan->pieces(); ++i) plan->Run(i, scratch);  // in parallel, each with
//   } while (plan->NextStep(scratch));                                 // its worker's scratch
//   SearchResult result;
//   plan->Finish(result, scratch);
//
// The cut depends on the range and the options only, and results of pieces are merged in their
// order: the same search gives the same bits at the same SIMD level, however many threads run it.
#ifndef KVSEEK_INDEX_KEY_INDEX_H_
#define KVSEEK_INDEX_KEY_INDEX_H_

#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "index/scratch.h"
#include "index/segment.h"

namespace kvseek::index {

inline constexpr int kMaxGroup = 64;              ///< query heads that share a KV head
inline constexpr int kMaxK = 1 << 16;             ///< keys that one TopK may ask for
inline constexpr int kMaxCandidates = 1 << 20;    ///< candidates that one search may ask for
inline constexpr int kMaxExactRows = 1 << 16;     ///< exact rows a head that one search may ask for
inline constexpr int kMaxAuditSamples = 4096;     ///< audit samples a head
inline constexpr int kMaxKeep = 1 << 20;          ///< keys that one search may remember
inline constexpr float kMinThreshold = -1000.0F;  ///< nats; any key passes it
inline constexpr int64_t kExactBelowTokens = 8192;  ///< `auto` answers shorter ranges exactly

struct LastSearch;  // index/reuse.h

/// Rows after the last segment: kTailChunkTokens of them, fewer in the last chunk.
struct TailChunkView {
  const uint16_t* keys = nullptr;
  const uint16_t* values = nullptr;
};

/// A consistent look at one head cache: positions 0 .. tokens()-1. Owns nothing; what it points at
/// must outlive the search.
struct KvView {
  KvShape shape;
  absl::Span<const std::shared_ptr<const Segment>> segments;
  absl::Span<const TailChunkView> tail;
  int64_t tail_tokens = 0;

  int64_t SealedTokens() const { return static_cast<int64_t>(segments.size()) * kSegmentTokens; }
  int64_t Tokens() const { return SealedTokens() + tail_tokens; }
};

/// One query token of one group.
struct SearchQuery {
  const float* queries = nullptr;  ///< (group, key_dim) fp32, not scaled
  int group = 0;                   ///< 1..kMaxGroup
  int64_t begin = 0;  ///< range of positions that the token may see: 0 <= begin <= end <= Tokens()
  int64_t end = 0;
};

/// How the heads of a group agree on a part's rank. At equal reads the sum's output error was 0.92
/// to 1.00 of the other's on every shared head (landmark, cluster; 1024 and 4096 keys).
enum class Vote {
  kMax,  ///< the head that wants it most
  kSum   ///< the sum of their shares of softmax mass (TokenSelect, arXiv 2411.02886)
};

struct SearchOptions {
  /// Attend (k < 0): the attention state over the whole range. TopK (k >= 0): the k keys of the
  /// group with the largest softmax weight in any of its heads, and the state of all others; fewer
  /// if the range has fewer.
  int k = -1;
  /// Keys of the group, about; 1..kMaxCandidates. Ladder: read at 4 bits. Landmark and cluster:
  /// read, in whole parts. Graph: scored on the way.
  int candidates = 4096;
  int exact_rows = 64;     ///< ladder: keys of each head read exactly; 0..kMaxExactRows
  int audit_samples = 0;   ///< unread keys of each head sampled for the report's interval; 0: none
  uint64_t seed = 0;       ///< of sampling
  bool list_read = false;  ///< Attend: list the keys read at 4 bits or better in `positions`
  /// Landmark, cluster, graph: false leaves the unread keys' estimate out of the state (the report
  /// still tells their mass), as plain top-k attention does.
  bool estimate_rest = true;
  /// Landmark with bounds: read on, whatever `candidates` says, until each head's best `exact_top`
  /// keys are proven to be among those read (TopK with k <= exact_top is then exact); 0..kMaxK.
  int exact_top = 0;
  /// Ladder, landmark, cluster: fewer keys than `candidates` where they are expected to leave no
  /// head more than this share of its softmax mass unread; 0: spend all. 0..1.
  float mass = 0.0F;
  /// Fewer where fewer are expected within `beta` nats of any head's best score (DIPR of AlayaDB,
  /// arXiv 2504.10326), and a graph's walk ends where it expects no more of them; 0: spend all.
  float beta = 0.0F;
  /// Of the candidates that the other options allow, those whose estimated share of any head's
  /// softmax mass is at least exp(threshold), in nats: below 0 and not below kMinThreshold; 0: all.
  /// Calibrated for a head (threshold_calibration.h) it lets about the same number pass on average,
  /// more where attention is broad and fewer where it is narrow (Top-Theta, arXiv 2502.08363). What
  /// is compared: ladder: a key's estimate, of product codes + 1 deviation; landmark, cluster: the
  /// mean share of a part's keys, taking or leaving it whole; graph: true scores, and a walk ends
  /// where it expects no more keys that pass. The lse that makes a share of a score is estimated,
  /// from the whole range by the ladder, from the keys that they cover by the others. TopK has k
  /// candidates whether they pass or not.
  float threshold = 0.0F;
  Vote vote = Vote::kSum;  ///< landmark, cluster
  /// Ladder, landmark, cluster: put the `keep` best keys, those read among them, into the result's
  /// `last`, for the next step (index/reuse.h); 0: none; 0..kMaxKeep.
  int keep = 0;
  /// Landmark and cluster: what has been chosen by then is the answer, which is as good as its
  /// report says. The only option whose effect depends on time.
  std::chrono::steady_clock::time_point stop_at = std::chrono::steady_clock::time_point::max();
};

/// What an answer says of itself.
struct SearchReport {
  int64_t keys_scanned = 0;  ///< keys of which at least a scan code or an exact row was read
  int64_t keys_fine = 0;     ///< keys of the group read at 4 bits
  int64_t keys_exact = 0;    ///< exact rows read for the answer, tail and range edges included
  int64_t keys_chosen = 0;  ///< candidates: keys of the group that were read because of their score
  int64_t bytes_touched =
      0;  ///< of codes, factors and rows read for the answer (an audit's own reads are not counted)
  /// (group) estimated missed mass: the softmax mass within the range of keys not read at 4 bits or
  /// better (Attend) or not returned (TopK). With an audit it is corrected and low/high are the
  /// ends of a 95 % interval; without, they equal it.
  std::vector<float> missed_mass;
  std::vector<float> missed_low;
  std::vector<float> missed_high;
  bool reused = false;  ///< the keys are those of an earlier search (index/reuse.h) ...
  /// ... and a sample of the others found no more than that search left. False and not `reused`: a
  /// reuse was not trusted, so this is a search, whose bytes count both.
  bool trusted = true;
};

struct SearchResult {
  std::vector<float>
      out;  ///< (group, value_dim): state of the range, for TopK of what is not in `positions`
  std::vector<float> lse;          ///< (group)
  std::vector<int64_t> positions;  ///< ascending; TopK: the keys chosen; Attend: see list_read
  SearchReport report;
  std::shared_ptr<const LastSearch> last;  ///< see SearchOptions::keep; null if not kept

  /// Makes it as new, but for the memory of its arrays.
  void Clear();
  /// Of its arrays, as far as they may grow before they allocate.
  size_t Bytes() const;
};

/// What a search's time goes to.
enum class SearchPhase {
  kPlan,    ///< the plan: the queries, and sign codes' tables
  kSample,  ///< ladder: product codes' tables, the exact part, a sample of estimates, thresholds
  kScan,    ///< codes and candidates, or whatever an index reads in its one step
  kRefine,  ///< ladder: merging, and exact rows
  kFinish   ///< the result and its report
};
inline constexpr size_t kSearchPhases = 5;
/// "plan", ...
absl::string_view NameOf(SearchPhase phase);

/// One search under way, in memory of its own (MakePlan). Thread-safe as described at the top of
/// the file.
class SearchPlan {
 public:
  virtual ~SearchPlan() = default;
  /// What the step under way is for; what NextStep does belongs to the step before it.
  virtual SearchPhase phase() const { return SearchPhase::kScan; }
  /// Of the step that is under way; may be 0.
  virtual int pieces() const = 0;
  /// Runs piece `piece` of the step, each exactly once.
  virtual void Run(int piece, Scratch& scratch) = 0;
  /// After all pieces of a step, exactly once: goes on to the next step, or returns false if it was
  /// the last. Short, since it is done by one thread.
  virtual bool NextStep(Scratch& scratch) {
    (void)scratch;
    return false;
  }
  /// After the last step, exactly once. REQUIRES: `result` is as new.
  virtual void Finish(SearchResult& result, Scratch& scratch) = 0;
};

/// Ends a plan, and gives back the memory that it stands in.
struct EndPlan {
  SearchMemory memory;
  void operator()(SearchPlan* plan) {
    std::destroy_at(plan);
    memory.reset();
  }
};
using PlanPtr = std::unique_ptr<SearchPlan, EndPlan>;

/// A plan made as T(memory, args...): with memory that lasts as long as it does. It stands there
/// itself.
template <typename T, typename... Args>
PlanPtr MakePlan(Args&&... args) {
  static_assert(alignof(T) <= kCacheLine);
  SearchMemory memory = TakeSearchMemory();
  void* const place = memory->allocate(sizeof(T), alignof(T));
  SearchPlan* const plan = new (place) T(*memory, std::forward<Args>(args)...);
  return PlanPtr(plan, EndPlan{std::move(memory)});
}

/// Runs what is left of a plan in the calling thread.
SearchResult RunAll(SearchPlan& plan, Scratch& scratch);

/// Immutable; any number of threads may use one at once.
class KeyIndex {
 public:
  virtual ~KeyIndex() = default;
  virtual absl::string_view name() const = 0;
  /// REQUIRES: view, query and options within the limits above; the service checks what comes from
  /// outside. view's targets and query.queries must outlive the plan.
  virtual PlanPtr Plan(const KvView& view, const SearchQuery& query, const SearchOptions& options,
                       Scratch& scratch) const = 0;
  /// Plans, runs and finishes in the calling thread.
  SearchResult Search(const KvView& view, const SearchQuery& query, const SearchOptions& options,
                      Scratch& scratch) const;
};

/// Every key of the range exactly: reference, short ranges, audits.
const KeyIndex& ExactIndex();
/// The precision ladder (docs/architecture.md): scan codes for all, 4 bits for candidates, exact
/// rows for the best, an estimate for the rest.
const KeyIndex& LadderIndex();

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_KEY_INDEX_H_
