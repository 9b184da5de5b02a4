// From an Attend or a TopK of a client, which may hold anything, to a search that may be run.
//
// Every function checks all that it hands on and names what is wrong in full, e.g.
// "items[1].range_end[0]". Nothing here changes a session, apart from renewing the leases of the
// sessions found. The other requests are checked in request_validation.h.
#ifndef KVSEEK_SERVICE_SEARCH_VALIDATION_H_
#define KVSEEK_SERVICE_SEARCH_VALIDATION_H_

#include <cstdint>
#include <memory>
#include <memory_resource>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "index/key_index.h"
#include "index/reuse.h"
#include "index/scratch.h"
#include "kernels/dtype.h"
#include "proto/kvseek.pb.h"
#include "service/layer_cache.h"
#include "service/options.h"
#include "service/session.h"
#include "service/session_plan.h"
#include "service/session_store.h"

namespace kvseek::service {

/// One session's part of a search: `tokens` query tokens of one layer. Its lists stand in `memory`.
struct CheckedItem {
  explicit CheckedItem(index::Scratch& memory)
      : ends(&memory), kv_heads(&memory), settings_of_heads(&memory), held(&memory) {}

  std::shared_ptr<Session> session;
  uint32_t layer_number = 0;
  std::shared_ptr<const LayerState> layer;  ///< what is searched; keeps it alive
  size_t tokens = 0;
  int64_t begin = 0;
  std::pmr::vector<int64_t> ends;       ///< (tokens), each in [begin, layer->tokens]
  std::pmr::vector<uint32_t> kv_heads;  ///< those asked for, ascending
  std::pmr::vector<HeadSetting>
      settings_of_heads;           ///< (kv_heads.size()); candidates are at least 1
  const float* queries = nullptr;  ///< (tokens, QueryHeads(), key_dim)
  /// TopK: (Results()) the positions whose rows the client holds, ascending; empty: none.
  std::pmr::vector<absl::Span<const uint32_t>> held;

  const SessionSettings& settings() const { return session->settings(); }
  /// Query heads of the KV heads asked for.
  size_t QueryHeads() const { return kv_heads.size() * static_cast<size_t>(settings().Group()); }
  size_t Results() const { return tokens * kv_heads.size(); }
};

/// An Attend or a TopK. `queries` point into the request's payload or into `memory`, `held` into
/// the payload.
struct CheckedSearch {
  CheckedSearch() = default;
  CheckedSearch(CheckedSearch&&) = default;
  CheckedSearch& operator=(CheckedSearch&&) = delete;  // lists keep their memory

  /// Of all lists that belong to the request, also those that its answer is made with: for whoever
  /// works on it, one thread at a time.
  index::SearchMemory memory = index::TakeSearchMemory();
  std::pmr::vector<CheckedItem> items{memory.get()};
  index::SearchOptions options;  ///< k < 0: Attend; candidates and threshold are each head's
  /// every 0: nothing is reused or kept; keep 0: see AddReuse.
  index::ReuseOptions reuse{.every = 0};
  HeadSetting asked;            ///< what the request says
  bool asks_threshold = false;  ///< asked.threshold counts, be it 0
  bool with_rows = false;
  bool with_state = true;
  kernels::DType state_dtype = kernels::DType::kFp32;  ///< or kFp16

  bool topk() const { return options.k >= 0; }
  /// Of all items.
  size_t Results() const {
    size_t results = 0;
    for (const CheckedItem& item : items) results += item.Results();
    return results;
  }
};

/// Checks searches of one daemon against its limits. Thread-safe.
class SearchValidator {
 public:
  /// Both must outlive the validator.
  SearchValidator(const DaemonOptions& options, SessionStore& store)
      : options_(options), store_(store) {}

  absl::StatusOr<CheckedSearch> Check(const proto::AttendRequest& message,
                                      absl::Span<const uint8_t> payload, TimePoint now) const;
  absl::StatusOr<CheckedSearch> Check(const proto::TopKRequest& message,
                                      absl::Span<const uint8_t> payload, TimePoint now) const;
  /// Options alone, of searches to come. Errors name "options.<field>".
  absl::Status Check(const proto::SearchOptions& message) const {
    CheckedSearch unused;
    return CheckOptions(message, unused);
  }

 private:
  absl::Status CheckOptions(const proto::SearchOptions& message, CheckedSearch& search) const;
  static absl::Status CheckStateDType(proto::DType dtype, CheckedSearch& search);
  /// Fills all of `item` but its queries; errors name its fields.
  absl::Status CheckItem(const proto::QueryItem& message, TimePoint now,
                         const CheckedSearch& search, CheckedItem& item) const;
  /// How a KV head is searched: as asked, else as planned, else as the daemon does.
  HeadSetting Resolve(const CheckedSearch& search, const CheckedItem& item, uint32_t kv_head) const;
  /// Fills search.items, finds their queries in the payload, checks them and converts them.
  template <typename Message>
  absl::Status CheckItems(const Message& message, absl::Span<const uint8_t> payload, TimePoint now,
                          CheckedSearch& search) const;

  const DaemonOptions& options_;
  SessionStore& store_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_SEARCH_VALIDATION_H_
