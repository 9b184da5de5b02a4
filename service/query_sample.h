// A sample of the queries that a sequence has had, for the indexes that learn from queries.
//
// They come with appends, or are taken from traffic (traffic_queries.h). A sample is immutable: a
// layer's next state has the next sample, so forks share it and a build reads it without a lock. It
// is bounded: past kQuerySampleMax tokens, those whose position hashes highest go, which leaves an
// even sample of all that ever came.
#ifndef KVSEEK_SERVICE_QUERY_SAMPLE_H_
#define KVSEEK_SERVICE_QUERY_SAMPLE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/dtype.h"
#include "service/memory_budget.h"

namespace kvseek::service {

inline constexpr size_t kQuerySampleMax = 1024;  ///< tokens

/// Queries of some tokens: (positions.size(), query_heads, key_dim), not scaled.
struct SampledQueries {
  absl::Span<const uint64_t> positions;  ///< each the last one that the token saw: its own
  const uint16_t* rows = nullptr;
};

/// Immutable, so thread-safe.
class QuerySample {
 public:
  /// Elements of one token's queries.
  explicit QuerySample(size_t token_elements) : token_elements_(token_elements) {}

  /// This sample and `more`; of positions that are here already, the older queries stay.
  absl::StatusOr<std::shared_ptr<const QuerySample>> With(const SampledQueries& more,
                                                          MemoryBudget& budget) const;
  /// The queries of positions below `tokens`. Takes no new memory where it can share.
  static absl::StatusOr<std::shared_ptr<const QuerySample>> Below(
      const std::shared_ptr<const QuerySample>& sample, int64_t tokens, MemoryBudget& budget);

  const std::vector<int64_t>& positions() const { return positions_; }  ///< ascending
  /// The queries of one KV head, of `group` query heads, as fp32: (positions, group, key_dim).
  std::vector<float> OfHead(size_t kv_head, size_t group, size_t key_dim,
                            kernels::DType dtype) const;

 private:
  /// Some of this sample's queries and of `more`'s.
  struct Pick {
    int64_t position = 0;
    const uint16_t* row = nullptr;
  };
  static absl::StatusOr<std::shared_ptr<const QuerySample>> Copy(const std::vector<Pick>& picks,
                                                                 size_t token_elements,
                                                                 MemoryBudget& budget);
  std::vector<Pick> Picks() const;

  size_t token_elements_;
  std::vector<int64_t> positions_;
  std::vector<uint16_t> rows_;
  MemoryBudget::Reservation memory_;
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_QUERY_SAMPLE_H_
