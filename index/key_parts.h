// A partition of keys into parts that are read together or not at all, each with a summary from
// which its share of a query's attention is estimated without a look at its keys.
//
// Blocks of consecutive keys (landmark index; Quest, arXiv 2406.10774; InfLLM, arXiv 2402.04617)
// and clusters of similar keys (cluster index; RetroInfer, arXiv 2505.02922) differ only in how
// keys come together. A KeyParts covers a run of sealed segments; as a sequence grows, more of
// them are made, and those that are there never change.
#ifndef KVSEEK_INDEX_KEY_PARTS_H_
#define KVSEEK_INDEX_KEY_PARTS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "index/key_index.h"
#include "index/scratch.h"

namespace kvseek::index {

inline constexpr int64_t kMaxPartsTokens = 65536;  ///< that one KeyParts covers

/// Immutable, so thread-safe. Does not refer to the keys it was made from.
class KeyParts {
 public:
  /// Parts of the keys [begin, begin + part_of.size()) of `view`: key begin + i belongs to part
  /// part_of[i], 0 <= part_of[i] < count; no part is empty. REQUIRES: the range is sealed, its ends
  /// are multiples of kSegmentTokens, and it has at most kMaxPartsTokens. With `bounds`, parts also
  /// get the smallest and largest value of each dimension.
  static std::shared_ptr<const KeyParts> Make(const KvView& view, int64_t begin,
                                              absl::Span<const uint16_t> part_of, int count,
                                              bool bounds);

  int64_t begin() const { return begin_; }
  int64_t end() const { return begin_ + static_cast<int64_t>(members_.size()); }
  int count() const { return static_cast<int>(starts_.size()) - 1; }
  bool has_bounds() const { return !upper_.empty(); }
  /// Keys of part p, ascending: positions begin() + Members(p)[i].
  absl::Span<const uint16_t> Members(int p) const {
    const auto i = static_cast<size_t>(p);
    return absl::MakeConstSpan(members_).subspan(starts_[i], starts_[i + 1] - starts_[i]);
  }

  const float* mean_keys() const { return mean_keys_.data(); }  ///< (count, key_dim)
  /// (count, key_dim) bf16: variance of each dimension of the part's keys.
  const uint16_t* key_variances() const { return key_variances_.data(); }
  /// (count, key_dim) bf16, rounded away from the keys; only with bounds.
  const uint16_t* lower() const { return lower_.data(); }
  const uint16_t* upper() const { return upper_.data(); }
  const uint16_t* mean_values() const { return mean_values_.data(); }  ///< (count, value_dim) bf16
  size_t Bytes() const;

 private:
  KeyParts() = default;

  int64_t begin_ = 0;
  std::vector<uint32_t> starts_;   ///< (count + 1), into members_
  std::vector<uint16_t> members_;  ///< part by part
  std::vector<float> mean_keys_;
  std::vector<uint16_t> key_variances_, lower_, upper_, mean_values_;
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_KEY_PARTS_H_
