// A partition of keys into parts that are read together or not at all, each with a summary from
// which its share of a query's attention is estimated without a look at its keys.
//
// Blocks of consecutive keys (landmark index; Quest, arXiv 2406.10774; InfLLM, arXiv 2402.04617)
// and clusters of similar keys (cluster index; RetroInfer, arXiv 2505.02922) differ only in how
// keys come together. A KeyParts covers a run of sealed segments; as a sequence grows, more of
// them are made, and those that are there never change.
//
// A part's scores have the mean <q, mean key>. Their variance q^T C q would take the covariance C
// of each part; the summary holds its diagonal only, but in coordinates L^-1 k in which the keys of
// an average part are uncorrelated (L L^T: mean covariance within parts). Summed over parts the
// variance is then right for any query, while a diagonal of the keys' own coordinates is off by
// half in some heads.
#ifndef KVSEEK_INDEX_KEY_PARTS_H_
#define KVSEEK_INDEX_KEY_PARTS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "index/cholesky.h"
#include "index/key_index.h"
#include "index/scratch.h"

namespace kvseek::index {

inline constexpr int64_t kMaxPartsTokens = 65536;  ///< that one KeyParts covers

/// The queries of one search, in the forms that summaries are multiplied with. Immutable.
class PartQueries {
 public:
  /// `basis`: that of the parts they are for.
  PartQueries(const SearchQuery& query, const KvShape& shape, const CholeskyFactor& basis);

  int group() const { return group_; }
  /// All (group, key_dim).
  const float* scaled() const { return scaled_.get(); }      ///< times softmax_scale
  const float* squared() const { return squared_.get(); }    ///< in the basis, squared
  const float* positive() const { return positive_.get(); }  ///< scaled, negative elements zero
  const float* negative() const { return negative_.get(); }  ///< scaled, positive elements zero

 private:
  int group_;
  AlignedArray<float> scaled_, squared_, positive_, negative_;
};

/// Immutable, so thread-safe. Does not refer to the keys it was made from.
class KeyParts {
 public:
  /// Parts of the keys [begin, begin + part_of.size()) of `view`: key begin + i belongs to part
  /// part_of[i], 0 <= part_of[i] < count; no part is empty. REQUIRES: the range is sealed, its ends
  /// are multiples of kSegmentTokens, and it has at most kMaxPartsTokens. With `bounds`, parts also
  /// get the smallest and largest value of each dimension. `basis` is made from these keys where it
  /// is null; parts that are searched together share one.
  static std::shared_ptr<const KeyParts> Make(
      const KvView& view, int64_t begin, absl::Span<const uint16_t> part_of, int count, bool bounds,
      std::shared_ptr<const CholeskyFactor> basis = nullptr);

  int64_t begin() const { return begin_; }
  int64_t end() const { return begin_ + static_cast<int64_t>(members_.size()); }
  int count() const { return static_cast<int>(starts_.size()) - 1; }
  bool has_bounds() const { return !upper_.empty(); }
  const std::shared_ptr<const CholeskyFactor>& basis() const { return basis_; }
  /// Keys of part p, ascending: positions begin() + Members(p)[i].
  absl::Span<const uint16_t> Members(int p) const {
    const auto i = static_cast<size_t>(p);
    return absl::MakeConstSpan(members_).subspan(starts_[i], starts_[i + 1] - starts_[i]);
  }

  /// Mean and variance of the scores of parts [first, first + count): of head h and part first + i
  /// at [h * stride + i].
  void ScoreMoments(const PartQueries& queries, int first, int count, float* means,
                    float* variances, int stride) const;
  /// No score of a part exceeds its bound but for rounding (see RoundingMargin). The same layout;
  /// `work` has room for as much. REQUIRES: has_bounds().
  void UpperBounds(const PartQueries& queries, int first, int count, float* bounds, float* work,
                   int stride) const;
  /// What rounding to fp32 may add to a score of head h, or to a bound, or take from it. REQUIRES:
  /// has_bounds().
  float RoundingMargin(const PartQueries& queries, int head) const;
  /// Bytes of one part's summary that ScoreMoments and UpperBounds read.
  size_t SummaryBytes() const;

  const float* mean_keys() const { return mean_keys_.data(); }         ///< (count, key_dim)
  const uint16_t* mean_values() const { return mean_values_.data(); }  ///< (count, value_dim) bf16
  size_t Bytes() const;  ///< the basis, which is shared, left out

 private:
  friend struct KeyPartsFile;  // index_file.cc: saves and loads the arrays

  KeyParts() = default;
  void SetMembers(absl::Span<const uint16_t> part_of, int count);
  void SetMeans(const KvView& view, absl::Span<const uint16_t> part_of);
  void SetVariances(const KvView& view, absl::Span<const uint16_t> part_of);
  void SetBounds(const KvView& view, absl::Span<const uint16_t> part_of);
  void SetLargest();  ///< from the bounds

  int key_dim_ = 0;
  int64_t begin_ = 0;
  std::vector<uint32_t> starts_;   ///< (count + 1), into members_
  std::vector<uint16_t> members_;  ///< part by part
  std::shared_ptr<const CholeskyFactor> basis_;
  std::vector<float> mean_keys_;
  std::vector<uint16_t> key_variances_;  ///< (count, key_dim) bf16, in the basis
  std::vector<uint16_t> lower_, upper_;  ///< (count, key_dim) bf16, rounded away from the keys
  std::vector<float> largest_;           ///< (key_dim): magnitude of any bound
  std::vector<uint16_t> mean_values_;
};

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_KEY_PARTS_H_
