// How far an answer is from the truth: the figures that a planner learns from (index/planner.h).
//
// An audit answers a query exactly once, and then compares any number of answers to it, of any
// index with any options. It costs a pass over all keys and values of the range and another over
// the keys: off the answering path.
#ifndef KVSEEK_INDEX_SEARCH_AUDIT_H_
#define KVSEEK_INDEX_SEARCH_AUDIT_H_

#include <cstdint>
#include <vector>

#include "index/key_index.h"

namespace kvseek::index {

inline constexpr int64_t kAuditTopKeys = 100;  ///< recall is of each head's best so many keys

/// Each is (group).
struct AuditFigures {
  std::vector<float> output_error;  ///< ||o - o*|| / ||o*||; ||o|| where o* is zero
  std::vector<float> recall;        ///< share of the true top keys among those read, 1 of none
  std::vector<float> missed;        ///< softmax mass of the keys not read
};

/// Immutable once made; thread-safe then. Holds group x range scores in fp32.
class SearchAudit {
 public:
  /// REQUIRES: as KeyIndex::Plan. Keeps nothing of the arguments.
  SearchAudit(const KvView& view, const SearchQuery& query, Scratch& scratch);

  /// Of an Attend over the same view and query that lists the keys it read
  /// (SearchOptions::list_read).
  AuditFigures Compare(const SearchResult& result) const;
  /// Of the exact answer.
  int64_t exact_bytes() const { return truth_.report.bytes_touched; }
  const SearchResult& truth() const { return truth_; }

 private:
  const float* Scores(size_t head) const {
    return scores_.data() + head * static_cast<size_t>(range_);
  }

  int64_t begin_;
  int64_t range_;
  SearchResult truth_;
  std::vector<float> scores_;  ///< (group, range)
  std::vector<float> top_;     ///< (group): the lowest score of the head's best kAuditTopKeys
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_SEARCH_AUDIT_H_
