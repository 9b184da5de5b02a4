// Answers a step from the keys that an earlier step's search found, without a search.
//
// Consecutive decode steps of a head attend to much the same keys (Recycled Attention, arXiv
// 2411.05787; TidalDecode, arXiv 2410.05076; the selection cache of TokenSelect, arXiv 2411.02886),
// but the few that are new weigh much. Three things make reuse good enough:
//
//   keep    the search remembers more keys than it reads (SearchOptions::keep, about three times as
//           many); the next step reads all of them at 4 bits
//   rest    the weights of the other keys are carried over, a sum for each 64-key block, shifted by
//           what the change of the query does to the segment's mean key
//   check   a sample of those others is scored exactly; where they hold more mass than the search
//           left unread, the answer is not trusted. A single heavy key among them goes unseen
//
// Keys that came since are read exactly. Works above any index that keeps (ladder, landmark,
// cluster), since every segment has its 4-bit records. It saves scans, not always bytes or time:
// docs/adr/0010 has the measurements.
#ifndef KVSEEK_INDEX_REUSE_H_
#define KVSEEK_INDEX_REUSE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "index/key_index.h"

namespace kvseek::index {

/// What a search leaves for the steps after it. Immutable.
struct LastSearch {
  int group = 0;
  int64_t begin = 0;  ///< of the search's range
  int64_t first_block = 0;
  int64_t last_block = 0;  ///< whole, sealed 64-key blocks [first_block, last_block) of the range
  std::vector<int64_t> positions;  ///< the keys kept, ascending, of those blocks
  /// (group, last_block - first_block): summed weight of a block's other keys over exp(reference).
  std::vector<float> block_weights;
  std::vector<float> reference;  ///< (group)
  std::vector<float> queries;    ///< (group, key_dim), as they came
  std::vector<float> missed;     ///< (group): estimated share of mass that the search left unread

  uint64_t Bytes() const;
};

struct ReuseOptions {
  int keep = 12288;   ///< keys to remember; 1..kMaxKeep
  int every = 3;      ///< search at least every so many steps; 1: always
  int samples = 256;  ///< keys that the check scores
  /// The heads' mean share of mass in the keys not read may be so many times what it was in the
  /// last search.
  float tolerance = 1.5F;
};

/// A step that is answered from `last`; it may prove not to be trusted. Null where it cannot be:
/// the range does not begin where that of the search did, or ends before keys that it chose from.
/// The head cache may have grown since, but `last` must be of its keys.
PlanPtr PlanReuse(std::shared_ptr<const LastSearch> last, const ReuseOptions& reuse,
                  const KvView& view, const SearchQuery& query, const SearchOptions& options,
                  Scratch& scratch);

/// The reuse of one head cache's selection from step to step. Not thread-safe. A step is
///
///   if (auto plan = reuse.Plan(view, query, options, scratch)) {
///     ... run it ...
///     if (result.report.trusted) return result;   // an answer like any other
///   }
///   ... search with reuse.ForSearch(options) ...
///   reuse.Remember(result);
///
/// The head cache may have grown since; after a truncation call Forget.
class SelectionReuse {
 public:
  explicit SelectionReuse(const ReuseOptions& options) : options_(options) {}

  /// Null where a search is due: `every` steps are over, nothing is remembered, or the range does
  /// not begin where it did.
  PlanPtr Plan(const KvView& view, const SearchQuery& query, const SearchOptions& options,
               Scratch& scratch);
  SearchOptions ForSearch(SearchOptions options) const;
  void Remember(const SearchResult& result);
  void Forget() { last_ = nullptr; }
  /// The whole step in the calling thread. Of an answer that was not trusted the search's report
  /// counts the bytes.
  SearchResult Search(const KeyIndex& index, const KvView& view, const SearchQuery& query,
                      const SearchOptions& options, Scratch& scratch);

 private:
  const ReuseOptions options_;
  std::shared_ptr<const LastSearch> last_;
  int steps_since_ = 0;
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_REUSE_H_
