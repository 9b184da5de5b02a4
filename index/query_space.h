// Keys as queries see them: coordinates in which the distance of two keys is the root mean square,
// over the training queries, of the difference of their scores.
#ifndef KVSEEK_INDEX_QUERY_SPACE_H_
#define KVSEEK_INDEX_QUERY_SPACE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "index/built_index.h"
#include "index/cholesky.h"

namespace kvseek::index {

/// Rows of fp32.
struct FloatRows {
  size_t dim = 0;
  std::vector<float> elements;

  size_t count() const { return elements.size() / dim; }
  const float* row(size_t i) const { return elements.data() + i * dim; }
  /// Takes the mean row off every row.
  void Centre();
  /// Scales all rows so that their mean squared length is `squares`, unless they are all zero.
  void ScaleTo(double squares);
};

class QuerySpace {
 public:
  /// From input.queries; without any, all directions of a query are equally likely. `input` must
  /// outlive it.
  explicit QuerySpace(const BuildInput& input);

  /// The keys at [begin, end), centred: (end - begin, key_dim).
  FloatRows Keys(int64_t begin, int64_t end) const;
  const CholeskyFactor& factor() const { return factor_; }  ///< of the queries' second moment

 private:
  const BuildInput& input_;
  CholeskyFactor factor_;
};

/// Rows of the view's values at [begin, end), centred.
FloatRows CentredValues(const KvView& view, int64_t begin, int64_t end);

/// Gives the keys that are farthest from the mean of their part, one in kKeysPerOutlier, parts of
/// their own, and numbers parts anew so that none is empty; returns how many there are. Attention
/// sinks are such keys, and a part that hides one is neither ranked nor estimated rightly.
inline constexpr size_t kKeysPerOutlier = 256;
int SplitOutliers(const FloatRows& keys, std::vector<uint16_t>& part_of);

}  // namespace kvseek::index

#endif  // KVSEEK_INDEX_QUERY_SPACE_H_
