// The index over parts of keys: what landmark and cluster have in common once their parts are made.
//
// A list of runs, each with the parts of up to kRunTokens keys. A search scores the parts'
// summaries, ranks parts for the group by their best head, takes whole parts in that order until
// its budget is spent, and leaves the rest to chosen_plan.h: read what was taken, estimate the
// others.
//
// Runs with bounds are trees of two levels: kNodeParts neighbouring blocks make a node, whose own
// summary and bounds come first and are opened only where they may matter. In order of their bounds
// this takes the same blocks as scoring all of them would. With SearchOptions::exact_top the search
// goes on until no unread bound reaches any head's exact_top-th best score: branch and bound.
#ifndef KVSEEK_INDEX_PARTS_INDEX_H_
#define KVSEEK_INDEX_PARTS_INDEX_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "index/built_index.h"
#include "index/key_parts.h"

namespace kvseek::index {

inline constexpr int64_t kRunTokens = 4 * kSegmentTokens;
inline constexpr int kNodeParts = 16;

/// What a part's rank for a head is, before the head's lse is taken off.
enum class PartRank {
  kBound,    ///< upper bound of its scores; runs have bounds and nodes
  kSpread,   ///< mean of its scores plus their standard deviation
  kLandmark  ///< score of a key that the client supplied for it, else of its mean key
};

/// Keys [parts->begin(), parts->end()). Immutable; shared by the index and its successors.
struct PartsRun {
  std::shared_ptr<const KeyParts> parts;
  /// kBound: node i is parts [i * kNodeParts, (i + 1) * kNodeParts); else null.
  std::shared_ptr<const KeyParts> nodes;
  std::vector<float> landmarks;  ///< kLandmark: (parts->count(), key_dim); else empty
};

class PartsIndex final : public BuiltIndex {
 public:
  PartsIndex(std::string name, PartRank rank, std::vector<std::shared_ptr<const PartsRun>> runs,
             double build_core_seconds);

  absl::string_view name() const override { return name_; }
  int64_t covered() const override { return runs_.back()->parts->end(); }
  size_t Bytes() const override;
  double build_core_seconds() const override { return build_core_seconds_; }
  PlanPtr Plan(const KvView& view, const SearchQuery& query, const SearchOptions& options,
               Scratch& scratch) const override;
  PartRank rank() const { return rank_; }
  const std::vector<std::shared_ptr<const PartsRun>>& runs() const { return runs_; }

 private:
  std::string name_;
  PartRank rank_;
  /// At least one; they follow each other from position 0, and all but the last are full.
  std::vector<std::shared_ptr<const PartsRun>> runs_;
  double build_core_seconds_;
};

/// Makes the run of the keys [begin, end) with the given basis (null: its own).
using MakePartsRun = std::function<std::shared_ptr<const PartsRun>(
    int64_t begin, int64_t end, std::shared_ptr<const CholeskyFactor> basis)>;

/// What becomes of a run of an earlier build over the same keys: itself, or one that shares its
/// parts.
using RenewPartsRun =
    std::function<std::shared_ptr<const PartsRun>(const std::shared_ptr<const PartsRun>& run)>;

/// Runs over all sealed keys: those of input.previous as far as they go, renewed (null: as they
/// are), then new ones. The last run may be short; the next build makes it anew. Null if nothing is
/// sealed, or when the build is given up.
std::shared_ptr<const BuiltIndex> BuildParts(const BuildInput& input, const std::string& name,
                                             PartRank rank, const MakePartsRun& make,
                                             const RenewPartsRun& renew = nullptr);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_PARTS_INDEX_H_
