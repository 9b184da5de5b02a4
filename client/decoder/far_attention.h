// One layer's questions to the daemons: attention to the tokens that are not in the steady zone.
//
// KV heads are spread over the daemons in equal runs; of each daemon's heads those in state mode
// go into one Attend, those in rows mode into one TopK for each number of rows that is asked for,
// with the whole batch of sequences in each.
// Prepare makes them, Send sends them when the queries are there, Wait returns when each has been
// answered or has missed. Not thread-safe.
#ifndef KVSEEK_CLIENT_DECODER_FAR_ATTENTION_H_
#define KVSEEK_CLIENT_DECODER_FAR_ATTENTION_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/decoder/head_modes.h"
#include "client/decoder/row_cache.h"
#include "client/kv_client.h"

namespace kvseek::client {

/// A daemon and the KV heads [first_head, first_head + heads) that it holds. Tokens have a
/// connection of their own, so that no question waits behind them.
struct DaemonShare {
  KvClient* questions = nullptr;
  KvClient* tokens = nullptr;
  uint32_t first_head = 0;
  uint32_t heads = 0;
  ClientOptions options{};  ///< what both were connected with
};

/// The shape of a share's sessions.
ModelShape ShapeOfShare(const ModelShape& shape, const DaemonShare& share);

/// What a share's sessions are opened with: its heads of the model's plan, under their numbers
/// there. None where the plan says nothing to a daemon, so that the daemon's own counts.
std::optional<HeadPlan> PlanOfShare(const HeadPlan& plan, const DaemonShare& share);
/// The name that they are opened with (OpenOptions::model): a share of the heads is a model of its
/// own. "" of "".
std::string ModelOfShare(const std::string& model, const ModelShape& shape,
                         const DaemonShare& share);

/// Whether an error says that a session is gone for good.
bool IsLost(const absl::Status& status);

/// One sequence of a batch.
struct FarSequence {
  absl::Span<const Session> sessions;  ///< one a daemon
  absl::Span<const uint8_t> lost;      ///< one a daemon: true if it no longer has the session
  uint64_t begin = 0;                  ///< positions that daemons answer for; empty: not asked
  uint64_t end = 0;
  RowCache* caches = nullptr;  ///< (kv_heads) of this layer; needed for rows
};

struct FarQuestion {
  uint32_t layer = 0;
  uint32_t tokens = 1;  ///< query tokens
  absl::Span<const FarSequence> batch;
  const uint16_t* queries = nullptr;  ///< (batch, tokens, query_heads, key_dim), shape.dtype;
                                      ///< read by Send, valid until Wait returns
  absl::Span<const HeadMode> modes;   ///< (kv_heads), without kAuto
  absl::Span<const uint32_t> rows;    ///< (kv_heads) keys of each in rows mode
  SearchOptions options;
  std::chrono::microseconds deadline{};
};

/// One request and what became of it.
struct FarReply {
  uint32_t daemon = 0;
  bool rows = false;            ///< a TopK ...
  uint32_t k = 0;               ///< ... of so many keys
  std::vector<uint32_t> heads;  ///< KV heads of the model, ascending
  std::vector<uint32_t> batch;  ///< which of the batch the items are of; empty: nothing was sent
  std::vector<uint32_t> lost;   ///< which of the batch the daemon no longer has a session of
  absl::StatusOr<SearchResponse> answer = absl::UnknownError("not answered yet");
};

class FarAttention {
 public:
  /// Wait reads answers itself (KvClient::Poll) for `spin` before the thread goes to sleep.
  FarAttention(const ModelShape& shape, std::vector<DaemonShare> shares,
               std::chrono::microseconds spin);

  const std::vector<DaemonShare>& shares() const { return shares_; }

  /// A daemon that missed is not asked again before the next step: a step waits for it once.
  void BeginStep();
  /// Makes the requests. Sequences with an empty range are left out, and so are heads in kLocal.
  void Prepare(const FarQuestion& question);
  /// Sends them, once. The deadline runs from here.
  void Send();
  /// All replies, once each is there. Requests that were not even sent have a status that says why.
  const std::deque<FarReply>& Wait();

 private:
  /// Shared with callbacks.
  struct Countdown {
    std::atomic<int> left{0};
  };

  /// One of replies_ on its way.
  struct Request {
    FarReply* reply;
    PreparedSearch search;
  };
  /// Queries of some heads, to be brought together.
  struct Packing {
    const uint16_t* first;               ///< (tokens, query_heads, key_dim), all heads
    const std::vector<uint32_t>* heads;  ///< of one of replies_
    std::vector<uint16_t> packed;        ///< (tokens, heads, group, key_dim)
  };

  /// The heads in `mode`, of kRows those that ask for k rows.
  void PrepareDaemon(const FarQuestion& question, uint32_t daemon, HeadMode mode, uint32_t k);
  PreparedSearch PrepareSearch(const FarQuestion& question, const FarReply& reply);
  QueryItem MakeItem(const FarQuestion& question, uint32_t b, const FarReply& reply);
  absl::Span<const uint8_t> PlaceOfQueries(const FarQuestion& question, uint32_t b,
                                           const std::vector<uint32_t>& heads);
  void Pack(Packing& packing) const;

  const ModelShape shape_;
  const std::vector<DaemonShare> shares_;
  const std::chrono::microseconds spin_;
  std::vector<uint8_t> missed_;  ///< (daemons), in this step
  std::vector<uint32_t> ks_;     ///< different numbers of rows of a daemon's heads, ascending
  std::deque<FarReply> replies_;
  AttendRequest attend_;  ///< to be filled and encoded
  TopKRequest top_k_;
  std::vector<Request> requests_;           ///< not sent yet
  std::vector<Packing> packings_;           ///< of requests under way
  std::deque<std::vector<uint32_t>> held_;  ///< their lists of held positions
  std::vector<KvClient*> asked_;            ///< whose answers Wait waits for
  std::chrono::microseconds deadline_{};
  std::shared_ptr<Countdown> countdown_ = std::make_shared<Countdown>();
};

}  // namespace kvseek::client

#endif  // KVSEEK_CLIENT_DECODER_FAR_ATTENTION_H_
