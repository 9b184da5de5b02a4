// Which parts one search reads: best first, by rank.
#ifndef KVSEEK_INDEX_PARTS_SEARCH_H_
#define KVSEEK_INDEX_PARTS_SEARCH_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "index/chosen_plan.h"
#include "index/key_index.h"
#include "index/parts_index.h"

namespace kvseek::index {

/// Of one thread, used once. What the arguments refer to must outlive it.
class PartsSearch {
 public:
  PartsSearch(absl::Span<const std::shared_ptr<const PartsRun>> runs, PartRank rank,
              const KvView& view, const SearchQuery& query, const SearchOptions& options,
              Scratch& scratch);

  ChosenKeys Choose();

 private:
  /// A part, or a node of parts, that was scored. Its figures for head h stand at
  /// [slot * group + h].
  struct Scored {
    const PartsRun* run;
    const KeyParts* of;  ///< run->parts or run->nodes
    int part;
    int keys;  ///< of the range; > 0
  };

  bool IsNode(const Scored& scored) const { return scored.of == scored.run->nodes.get(); }
  /// Scores parts [first, last) of `of`; those with keys in the range get a slot.
  void Score(const PartsRun& run, const KeyParts& of, int first, int last);
  int KeysInRange(const KeyParts& of, int part) const;
  /// Queues slots from `first` on.
  void Queue(size_t first);
  void Open(size_t slot);
  /// Takes parts until there are about `keys` keys, or, unless `all`, enough by mass, beta or
  /// threshold; what is taken is kept, and read unless `all`, or it does not pass the threshold.
  void TakeParts(int64_t keys, bool all);
  bool Enough() const;
  bool Passes(size_t slot) const;
  /// Adds a part's keys to `positions`.
  void Take(const Scored& part, std::vector<int64_t>& positions);
  /// Scores the chosen keys from `first` on, and raises the heads' bars.
  void RaiseBars(size_t first);
  /// No key below has a place among any head's best exact_top.
  bool Beaten(size_t slot) const;
  void SetLse();
  float Rank(size_t slot) const;
  /// Estimated share of a head's softmax mass.
  double Share(size_t slot, size_t head) const;
  ChosenKeys Finish();

  const absl::Span<const std::shared_ptr<const PartsRun>> runs_;
  const PartRank rank_;
  const KvView& view_;
  const SearchQuery& query_;
  const SearchOptions& options_;
  Scratch& scratch_;
  const size_t group_;
  const int64_t end_;  ///< of what the search may choose from
  const PartQueries queries_;
  const bool prove_;  ///< exact_top is asked for and can be had

  std::vector<Scored> scored_;
  std::vector<float> ranks_, weights_, variances_;  ///< (slots, group)
  std::vector<float> lse_;                          ///< (group), estimated
  std::vector<std::pair<float, uint32_t>> queue_;   ///< a heap of (group's rank, slot)
  std::vector<uint32_t> beaten_;                    ///< slots
  std::vector<uint32_t> kept_;                      ///< slots taken to be kept, not read
  int64_t taken_ = 0;                               ///< keys
  std::vector<float> best_rank_;                    ///< (group), of what was scored first
  std::vector<double> left_;  ///< (group): estimated share of mass in parts not taken
  /// (group) min-heaps of the best exact_top scores so far.
  std::vector<std::vector<float>> best_;
  float margin_ = 0.0F;  ///< of rounding, the largest of any head and run
  ChosenKeys chosen_;
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_PARTS_SEARCH_H_
