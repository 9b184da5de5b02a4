// The client of a kvseek daemon: what an inference engine calls.
//
//   auto client = kvseek::KvClient::Connect({.address = "unix:/run/kvseek.sock"});
//   if (!client.ok()) ...              // unreachable is a value, within the deadline
//   kvseek::ModelShape shape{.layers = 28, .kv_heads = 2, .query_heads = 12};
//   auto session = (*client)->Open(shape, {});
//   (*client)->Append(*session, layer, /*start=*/0, tokens, keys, values);
//   auto answer = (*client)->Attend({.items = {{.session = *session, .layer = layer,
//                                               .queries = kvseek::AsBytes(queries)}}});
//   // answer->items[0].out (tokens, query_heads, value_dim) and .lse are to be merged with the
//   // decoder's own part: MergeFinished in kernels/attention_state.h.
//
// Every call has a deadline (CallOptions, or the client's default) and returns by then: with an
// answer, or with an error. Nothing throws. Codes: invalid_argument, not_found, resource_exhausted
// (see RetryAfterMs), deadline_exceeded, failed_precondition, data_loss, unauthenticated,
// permission_denied, cancelled, and unavailable for a daemon that cannot be reached or went away,
// which a decoder treats as a miss. A broken connection is made again by the next call.
//
// Thread safety: a KvClient may be used from any number of threads. The synchronous calls are the
// asynchronous ones and a wait. Callbacks run on the client's own thread, or in a Poll of any
// thread: they must not block and must not make synchronous calls. They may make asynchronous ones,
// and never run within the call that they belong to.
//
// Tensors are row-major and contiguous. Keys and values are in the session's dtype (bf16 or fp16, 2
// bytes an element), queries in fp32 unless `query_dtype` says otherwise, unscaled. Memory behind a
// span must stay valid until the call returns or its callback has run.
#ifndef KVSEEK_CLIENT_KV_CLIENT_H_
#define KVSEEK_CLIENT_KV_CLIENT_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/head_plan.h"
#include "kernels/dtype.h"

namespace kvseek {

using kernels::DType;

struct ClientOptions {
  /// "unix:/path", "tcp://host:port", or "shm:/path": shared memory with the daemon that listens on
  /// that unix socket, unavailable if it grants none.
  std::string address{};
  std::string token{};  ///< shared secret, if the daemon asks for one
  std::chrono::milliseconds connect_timeout{2000};
  std::chrono::milliseconds default_deadline{10000};  ///< of calls that set none
  uint32_t payload_bytes_max = 1U << 30;              ///< of answers
  size_t inflight_requests_max = 256;  ///< more calls at once fail with resource_exhausted
  /// The client's thread looks for answers for so long after its last work before it sleeps in the
  /// kernel, which saves the wake-up (tens of us) of answers that come within. It takes a whole
  /// core while it looks; longer than an answer takes, and 0 where no core is to spare.
  std::chrono::microseconds spin{0};
};

struct CallOptions {
  std::optional<std::chrono::microseconds> deadline{};  ///< from now
};

/// Shape of a model's KV cache. Query head h belongs to KV head h / (query_heads / kv_heads).
struct ModelShape {
  uint32_t layers = 1;
  uint32_t kv_heads = 1;
  uint32_t query_heads = 1;
  uint32_t key_dim = 128;
  uint32_t value_dim = 128;
  DType dtype = DType::kBf16;
  float softmax_scale = 0.0F;  ///< 0: 1 / sqrt(key_dim)

  uint32_t Group() const { return query_heads / kv_heads; }
};

/// Handle of a session on the daemon; plain data. It does not close the session when it goes away:
/// Close or the lease does.
struct Session {
  uint64_t boot_id = 0;
  uint64_t session_id = 0;
  ModelShape shape{};
};

/// Landmark, cluster, graph and product are built for sessions opened with them (docs/indexes.md).
/// Until one is there, the ladder (or exact, for a short range) answers in its place, and the
/// report says so. Auto is exact for a short range, else product where it is built, else ladder.
enum class IndexKind : uint8_t {
  kAuto = 0,
  kExact = 1,
  kLadder = 2,
  kLandmark = 3,
  kCluster = 4,
  kGraph = 5,
  kProduct = 6,
};

/// How the heads of a group agree on which keys to read (index/key_index.h).
enum class Vote : uint8_t {
  kMax = 1,  ///< the head that wants a key most
  kSum = 2,  ///< the sum of the heads' shares of mass
};

/// What the index `landmark` keeps of a block of consecutive tokens to rank it by.
enum class LandmarkSummary : uint8_t {
  kBounds = 1,  ///< smallest and largest value of each dimension
  kMean = 2,    ///< mean key and the spread around it
  /// A key of the caller's own for each KV head, as that of a trained landmark token, which comes
  /// with Append; of a block for which none came, the mean key.
  kGiven = 3,
};

struct LandmarkOptions {
  LandmarkSummary summary = LandmarkSummary::kBounds;
  uint32_t block = 16;  ///< tokens of a block: 16, 32, 64, 128 or 256

  bool operator==(const LandmarkOptions&) const = default;
};

struct OpenOptions {
  std::chrono::milliseconds lease{0};  ///< closed when unused for so long; 0: the daemon's default
  uint32_t scan_bits = 0;              ///< 1 or 2; 0: the daemon's default
  uint64_t tokens_expected = 0;        ///< refuse now if there is no memory for so many
  std::string name{};                  ///< for listings
  std::vector<IndexKind> build{};      ///< kLandmark to kProduct: built in the background
  /// Index, candidates and threshold of each KV head where a request does not say. Indexes that it
  /// names are built; its scan_bits, unless 0, are the session's. None: the daemon's plan, if it
  /// has one; an empty one: no plan.
  std::optional<HeadPlan> plan{};
  /// The daemon's audits look for the cheapest setting of each KV head whose mean output error is
  /// at most this, and change the session's plan as they find it; 0: the daemon's default.
  float error_target = 0.0F;
  /// How landmark is built; for sessions that build it only. None: bounds of blocks of 16.
  std::optional<LandmarkOptions> landmark{};
  /// Which model's keys these are, and which part of it if the shape's heads are not all of its
  /// heads; tenants whose traffic must not mix put their own name into it. With an error target,
  /// sessions of the same model, shape, scan bits, indexes and target that bring no plan share what
  /// the audits find. Empty: this one shares with its forks alone.
  std::string model{};
};

/// How an answer is found; unset fields (kAuto counts as unset) take the session's plan for the KV
/// head, else the daemon's defaults. To name an index that is not the plan's leaves the plan aside.
/// See index/key_index.h.
struct SearchOptions {
  IndexKind index = IndexKind::kAuto;
  std::optional<uint32_t> candidates{};
  std::optional<uint32_t> exact_rows{};
  uint32_t audit_samples = 0;
  uint64_t seed = 0;
  bool list_read = false;  ///< Attend: also return the positions read at 4 bits or better
  /// Landmark, cluster, graph: the estimate of what was not read stays out of the state.
  bool leave_rest_out = false;
  /// Landmark by bounds: reads until each head's best so many keys are certain; else does nothing.
  uint32_t exact_top = 0;
  float mass = 0.0F;  ///< fewer candidates where no head misses more of its mass; 0: all. Not graph
  float beta = 0.0F;  ///< fewer where fewer are within beta nats of a head's best score; 0: all
  /// Of the candidates those alone whose share of any head's mass is at least exp(threshold); below
  /// 0 and not below -1000 nats; 0: all.
  std::optional<float> threshold{};
  std::chrono::microseconds search_time{0};  ///< landmark, cluster: answers by then; 0: no limit
  std::optional<Vote> vote{};                ///< landmark, cluster
  /// Ladder, landmark, cluster: of decode steps, at most n - 1 after one that was searched are
  /// answered from the keys that were found there; 1: a search that the next steps may reuse; 0:
  /// none (docs/indexes.md).
  uint32_t reuse_steps = 0;
  uint32_t reuse_keep = 0;  ///< keys that a search keeps for that; 0: three times the candidates
};

/// One session's part of a request: `tokens` query tokens of one layer, for all KV heads or for
/// some. What belongs to heads, in queries and answers, is there for the heads asked for only, in
/// their order: KvHeads() and QueryHeads() are their numbers.
struct QueryItem {
  Session session{};
  uint32_t layer = 0;
  uint32_t tokens = 1;
  absl::Span<const uint8_t>
      queries{};  ///< (tokens, QueryHeads(), key_dim) in the request's query_dtype; see AsBytes
  uint64_t range_begin = 0;
  std::vector<uint64_t> range_end{};  ///< one a token, or one for all; empty: all tokens held
  std::vector<uint32_t> kv_heads{};   ///< ascending, without repeats; empty: all
  /// TopK with rows: positions whose rows the caller has and which need not travel, one list for
  /// each (token, KV head asked for), ascending and without repeats, one list after the other.
  absl::Span<const uint32_t> held{};
  std::vector<uint32_t> held_counts{};  ///< lengths of the lists; empty: none is held

  uint32_t KvHeads() const {
    return kv_heads.empty() ? session.shape.kv_heads : static_cast<uint32_t>(kv_heads.size());
  }
  uint32_t QueryHeads() const { return KvHeads() * session.shape.Group(); }
};

struct AttendRequest {
  std::vector<QueryItem> items{};
  SearchOptions options{};
  DType query_dtype = DType::kFp32;
  /// How the answer's `out` travels: kFp32, or kFp16 for half of the bytes and a rounding of 2^-11.
  DType state_dtype = DType::kFp32;
};

struct TopKRequest {
  std::vector<QueryItem> items{};
  SearchOptions options{};
  DType query_dtype = DType::kFp32;
  uint32_t k = 256;
  bool with_rows = true;
  bool with_state = true;            ///< the attention state of everything not returned
  DType state_dtype = DType::kFp32;  ///< as AttendRequest's
};

/// What an answer says of itself, for one query token and KV head.
struct Report {
  uint64_t keys_scanned = 0;
  uint64_t keys_fine = 0;
  uint64_t keys_exact = 0;
  uint64_t bytes_touched = 0;
  std::vector<float> missed_mass;  ///< one for each query head of the group
  std::vector<float> missed_low;   ///< with an audit: ends of the 95 % interval
  std::vector<float> missed_high;
  IndexKind index = IndexKind::kAuto;
  bool reused = false;  ///< from an earlier step's keys: SearchOptions::reuse_steps
};

/// Keys chosen for one query token and KV head. Rows, with_rows only, are those of `positions` that
/// are not in the request's list of held ones, in the order of `positions`.
struct Selection {
  absl::Span<const int64_t> positions;  ///< ascending; held ones too
  absl::Span<const uint16_t> keys;      ///< (rows, key_dim)
  absl::Span<const uint16_t> values;    ///< (rows, value_dim)
};

/// Answer to one item. kv_heads and query_heads are those asked for.
struct ItemResult {
  absl::Span<const float> out;  ///< (tokens, query_heads, value_dim)
  absl::Span<const float> lse;  ///< (tokens, query_heads); -infinity: empty
  std::vector<Selection>
      selections;  ///< (tokens, kv_heads); TopK, or Attend with list_read (positions only)
  std::vector<Report> reports;  ///< (tokens, kv_heads)
};

/// Tensors stand where they arrived: all spans point into `payload` (states that travelled as fp16:
/// into `states`), which copies of the response share, so they are good for as long as any copy is
/// there, or a copy of these.
struct SearchResponse {
  std::vector<ItemResult> items;
  std::shared_ptr<const uint8_t[]> payload{};
  std::shared_ptr<const float[]> states{};
  uint64_t bytes_sent = 0;      ///< of the request's frame
  uint64_t bytes_received = 0;  ///< of the answer's frame
  /// Of the time that the call took, the daemon's own: from the whole request read to the answer's
  /// tensors in place, waiting for a worker included; the rest is the way there and back with
  /// checksums. At least 1; 0: the daemon does not say.
  uint32_t daemon_us = 0;
};

struct Rows {
  std::vector<uint16_t> keys;    ///< (count, key_dim)
  std::vector<uint16_t> values;  ///< (count, value_dim)
};

/// Queries of some of the tokens that an append brings: (positions.size(), query_heads, key_dim) in
/// the session's dtype, unscaled. 1 token in 32 is plenty.
struct SampledQueries {
  absl::Span<const uint64_t> positions{};  ///< ascending
  absl::Span<const uint16_t> rows{};
};

/// Tokens of one layer, all KV heads.
struct LayerTensors {
  absl::Span<const uint16_t> keys{};    ///< (tokens, kv_heads, key_dim)
  absl::Span<const uint16_t> values{};  ///< (tokens, kv_heads, value_dim)
};

/// Landmark keys of blocks that end in the tokens of an append: (positions.size(), kv_heads,
/// key_dim) in the session's dtype, after positional encoding, for a session with
/// LandmarkSummary::kGiven. A block that two appends share comes with the second, which brings its
/// last token. A block that has a landmark keeps it, so an append may be repeated; a block that was
/// sent without one gets it when its last token is sent again with it. Truncate forgets the
/// landmarks of blocks that it cuts; a fork shares its parent's.
struct LandmarkKeys {
  absl::Span<const uint64_t> positions{};  ///< of the blocks' first tokens, ascending
  absl::Span<const uint16_t> rows{};
};

/// How far an index of a session is built.
struct BuiltIndexStats {
  IndexKind index = IndexKind::kAuto;
  uint64_t tokens_covered = 0;  ///< in the head that has least; 0: some head has none yet
  uint64_t bytes = 0;
};

struct SessionStats {
  Session session;
  std::string name;
  std::vector<uint64_t> tokens;  ///< of each layer
  uint64_t bytes = 0;            ///< shared segments count in each session that holds them
  std::chrono::milliseconds idle{0};
  std::chrono::milliseconds lease{0};
  uint32_t scan_bits = 0;
  std::vector<BuiltIndexStats> built;
  float error_target = 0.0F;  ///< OpenOptions::error_target; 0: audits change nothing
  std::optional<LandmarkOptions> landmark{};  ///< how landmark is built; none: it is not
  uint64_t landmarks_given = 0;  ///< blocks that have a LandmarkKeys', in the layer with least
  std::string model;             ///< OpenOptions::model
  uint64_t planner_audits = 0;   ///< that its planner, shared or not, has learned from
};

struct DaemonStats {
  std::chrono::milliseconds uptime{0};
  uint64_t memory_used_bytes = 0;
  uint64_t memory_limit_bytes = 0;
  uint64_t sessions_open = 0;
  uint64_t connections_open = 0;
  uint64_t queue_depth = 0;
  uint64_t queue_limit = 0;
  uint32_t workers = 0;
  std::string simd_level;
  std::map<std::string, uint64_t> counters;
  std::vector<SessionStats> sessions;
};

/// What the daemon said when the connection was made.
struct DaemonInfo {
  uint64_t boot_id = 0;
  std::string server;
  std::string simd_level;
};

/// An Attend or a TopK, checked and encoded but for the elements of its tensors: for callers that
/// know all of a request some time before its queries are there. Spans keep their addresses and
/// sizes. It needs no client, and may be sent by any.
class PreparedSearch {
 public:
  explicit PreparedSearch(const AttendRequest& request);
  explicit PreparedSearch(const TopKRequest& request);
  PreparedSearch(PreparedSearch&& other) noexcept = default;
  PreparedSearch& operator=(PreparedSearch&& other) noexcept = default;
  PreparedSearch(const PreparedSearch&) = delete;
  PreparedSearch& operator=(const PreparedSearch&) = delete;
  ~PreparedSearch() = default;

 private:
  friend class KvClient;
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

template <typename T>
using Callback = std::function<void(absl::StatusOr<T>)>;

class KvClient {
 public:
  /// Connects and says hello, within options.connect_timeout.
  static absl::StatusOr<std::unique_ptr<KvClient>> Connect(const ClientOptions& options);
  /// Fails what is under way with `cancelled`, and waits for its callbacks.
  ~KvClient();
  KvClient(const KvClient&) = delete;
  KvClient& operator=(const KvClient&) = delete;

  DaemonInfo info() const;

  absl::StatusOr<Session> Open(const ModelShape& shape, const OpenOptions& options,
                               const CallOptions& call = {});
  /// Appends tokens [start, start + tokens) of one layer, all KV heads: keys (tokens, kv_heads,
  /// key_dim), values (tokens, kv_heads, value_dim). Searchable when it returns the number of
  /// tokens now held. Safe to repeat; a gap is refused. Some of the tokens' own queries may come
  /// along, for indexes that learn from them, and landmarks of blocks that end in them.
  absl::StatusOr<uint64_t> Append(const Session& session, uint32_t layer, uint64_t start,
                                  uint32_t tokens, absl::Span<const uint16_t> keys,
                                  absl::Span<const uint16_t> values, const CallOptions& call = {},
                                  const SampledQueries& queries = {},
                                  const LandmarkKeys& landmarks = {});
  absl::StatusOr<SearchResponse> Attend(const AttendRequest& request, const CallOptions& call = {});
  absl::StatusOr<SearchResponse> TopK(const TopKRequest& request, const CallOptions& call = {});
  absl::StatusOr<Rows> FetchRows(const Session& session, uint32_t layer, uint32_t kv_head,
                                 absl::Span<const int64_t> positions, const CallOptions& call = {});
  /// A new session that shares the first `tokens` tokens (all, if not given). Copies nothing on the
  /// daemon.
  absl::StatusOr<Session> Fork(const Session& session, std::optional<uint64_t> tokens,
                               const OpenOptions& options, const CallOptions& call = {});
  absl::Status Truncate(const Session& session, uint64_t tokens, const CallOptions& call = {});
  absl::Status Close(const Session& session, const CallOptions& call = {});
  absl::StatusOr<DaemonStats> Stats(bool with_sessions, const CallOptions& call = {});
  /// The session's plan as it is now, with what audits have changed; empty if it has none. Does not
  /// renew the lease. not_found naming "session".
  absl::StatusOr<HeadPlan> PlanOf(const Session& session, const CallOptions& call = {});
  /// A round trip that does nothing; an error if the daemon does not serve.
  absl::Status Health(const CallOptions& call = {});

  /// The asynchronous core of what a decoder calls on its critical path. The callback runs exactly
  /// once, also on error.
  void AppendAsync(const Session& session, uint32_t layer, uint64_t start, uint32_t tokens,
                   absl::Span<const uint16_t> keys, absl::Span<const uint16_t> values,
                   const CallOptions& call, Callback<uint64_t> done,
                   const SampledQueries& queries = {}, const LandmarkKeys& landmarks = {});
  /// The same tokens of layers [layer, layer + layers.size()) in one request, as a decode step
  /// brings them: one round trip instead of one for each layer. Returns what the layer holds that
  /// holds least. Each layer is appended for itself: an error may leave some that were. Safe to
  /// repeat.
  void AppendLayersAsync(const Session& session, uint32_t layer, uint64_t start, uint32_t tokens,
                         absl::Span<const LayerTensors> layers, const CallOptions& call,
                         Callback<uint64_t> done);
  void AttendAsync(const AttendRequest& request, const CallOptions& call,
                   Callback<SearchResponse> done);
  void TopKAsync(const TopKRequest& request, const CallOptions& call,
                 Callback<SearchResponse> done);
  /// Sends what has been prepared, as the two above do with what they prepare. Reads the elements
  /// of queries now, and says now what was wrong with the request.
  void SendAsync(PreparedSearch search, const CallOptions& call, Callback<SearchResponse> done);
  /// Looks once for what the daemon sent, and may run callbacks, of other threads' calls too. A
  /// thread that has nothing to do until its answer comes calls it in a loop and saves the
  /// hand-overs between threads; with ClientOptions::spin, whose work it does, and which rests
  /// meanwhile and for up to 0.4 ms after. Without, it does nothing, and so it does from callbacks
  /// and while another thread is at it. Never blocks. Its callers must be gone before the client
  /// goes.
  void Poll();

 private:
  class Impl;
  explicit KvClient(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// The bytes of a tensor (a span, vector or array of elements), for QueryItem::queries. Copies
/// nothing.
template <typename Tensor>
absl::Span<const uint8_t> AsBytes(const Tensor& tensor) {
  return {reinterpret_cast<const uint8_t*>(std::data(tensor)),
          std::size(tensor) * sizeof(*std::data(tensor))};
}

/// When the daemon said to come again, with resource_exhausted; 0 if it did not.
std::chrono::milliseconds RetryAfter(const absl::Status& status);
/// The request's field that an error names, "" if none.
std::string ErrorField(const absl::Status& status);

}  // namespace kvseek

#endif  // KVSEEK_CLIENT_KV_CLIENT_H_
