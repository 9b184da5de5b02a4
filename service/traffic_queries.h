// Queries of a layer's Attend and TopK traffic on their way into its QuerySample.
//
// For sessions whose indexes learn from queries and whose client sends none with its appends. One
// token of every eight positions is taken, the first that asks there, so what is taken does not
// depend on time or threads as long as one decoder asks. A decoder may ask for some KV heads in one
// request and for others in the next: a token is whole when its heads have all come, and is given
// up when the next eight positions begin. Whole tokens wait here until there is a batch of them,
// since each change of the sample copies it.
#ifndef KVSEEK_SERVICE_TRAFFIC_QUERIES_H_
#define KVSEEK_SERVICE_TRAFFIC_QUERIES_H_

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/types/span.h"
#include "kernels/dtype.h"
#include "service/memory_budget.h"

namespace kvseek::service {

/// Thread-safe.
class TrafficQueries {
 public:
  static constexpr int64_t kStride = 8;  ///< positions of which one is taken
  static constexpr size_t kBatchTokens = 16;

  /// Of the session; the same in each call.
  struct Shape {
    size_t kv_heads = 0;
    size_t group = 0;
    size_t key_dim = 0;
    kernels::DType dtype = kernels::DType::kBf16;

    size_t TokenElements() const { return kv_heads * group * key_dim; }
  };
  struct Token {
    int64_t position = 0;                 ///< the last that it sees
    absl::Span<const uint32_t> kv_heads;  ///< ascending
    const float* queries = nullptr;       ///< (kv_heads.size(), group, key_dim), not scaled
  };
  /// Whole tokens, with the memory that they take.
  struct Batch {
    std::vector<uint64_t> positions;
    std::vector<uint16_t> rows;  ///< (positions.size(), query heads, key_dim) in the shape's dtype
    MemoryBudget::Reservation memory;
  };

  /// Takes what is missing of a token. The batch that it completes, if it does. Where the budget
  /// has no memory for one nothing is taken.
  std::optional<Batch> Add(const Token& token, const Shape& shape, MemoryBudget& budget)
      ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  /// Memory for a batch; false if there is none.
  bool Prepare(const Shape& shape, MemoryBudget& budget) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::mutex mutex_;
  int64_t stretch_ ABSL_GUARDED_BY(mutex_) = -1;     ///< position / kStride of the last token
  size_t missing_ ABSL_GUARDED_BY(mutex_) = 0;       ///< of its KV heads
  std::vector<bool> taken_ ABSL_GUARDED_BY(mutex_);  ///< (kv_heads)
  /// The tokens that are whole, and rows for a whole batch; no rows: it has no memory yet.
  Batch batch_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvseek::service

#endif  // KVSEEK_SERVICE_TRAFFIC_QUERIES_H_
