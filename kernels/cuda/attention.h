// Attention on the decoder's GPU: over the rows that a daemon returned, and the merge of partial
// results.
//
// A decode step of one layer puts its attention together from parts (kernels/attention_state.h):
// the steady zone that stays in device memory, the rows that TopK returned, and the state of the
// rest that came with them. The first two are AttendGatheredRows, all of them together MergeStates:
//
//   cuda::GatheredRows rows{.queries = q, .keys = k, .values = v, .row_counts = counts, .groups =
//   kv_heads, .group = 4,
//                           .rows_max = 512, .key_dim = 128, .value_dim = 128, .softmax_scale =
//                           scale};
//   cuda::AttendGatheredRows(rows, /*out=*/outs, /*lse=*/lses, stream);        // part 0 of `outs`
//   and `lses`
//   ...                                                                        // parts 1 and 2
//   likewise cuda::MergeStates(outs, lses, /*count=*/3, heads, /*value_dim=*/128, out, lse,
//   stream);
//
// All pointers are device memory, tensors row-major and contiguous, sums fp32. Calls only enqueue:
// nothing here waits, allocates or copies, so they may be captured in a CUDA graph. Thread-safe.
// The state of no rows is out = 0, lse = -infinity; lse is in natural-log units. Inputs must be
// finite.
//
// Errors: cudaErrorInvalidValue for an argument outside its limits, or what the launch returned.
// Errors of a kernel that is under way come from the stream, as ever.
#ifndef KVSEEK_KERNELS_CUDA_ATTENTION_H_
#define KVSEEK_KERNELS_CUDA_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/dtype.h"

namespace kvseek::kernels::cuda {

inline constexpr int kMaxGroup = 64;        ///< query heads that share a KV head
inline constexpr int kMaxRowDim = 256;      ///< elements of a key or value row
inline constexpr int kMaxRows = 1 << 30;    ///< rows of a group
inline constexpr int kMaxSplits = 65535;    ///< parts that the rows of a group are cut into
inline constexpr int kMaxValueDim = 65536;  ///< elements of a state that MergeStates takes

/// Queries and the rows they attend to, in `groups` independent groups (KV heads, or sequences x KV
/// heads). Owns nothing.
struct GatheredRows {
  const void* queries =
      nullptr;  ///< (groups, group, key_dim) in query_dtype, not scaled; 16-byte aligned
  const void* keys = nullptr;    ///< (groups, rows_max, key_dim) in row_dtype; 16-byte aligned
  const void* values = nullptr;  ///< (groups, rows_max, value_dim) in row_dtype; 16-byte aligned
  const int32_t* row_counts =
      nullptr;       ///< (groups): rows in use, clamped to 0..rows_max; rows past them are not read
  int groups = 0;    ///< 0 is fine and does nothing
  int group = 0;     ///< query heads of a group, 1..kMaxGroup
  int rows_max = 0;  ///< rows that a group has room for, 0..kMaxRows
  int key_dim = 0;   ///< a multiple of 8, 8..kMaxRowDim
  int value_dim = 0;                 ///< a multiple of 8, 8..kMaxRowDim
  DType query_dtype = DType::kFp32;  ///< any
  DType row_dtype = DType::kBf16;    ///< bf16 or fp16
  float softmax_scale = 0.0F;        ///< scores are softmax_scale * <q, k>; finite
  /// Cuts the rows of each group into so many parts, each with a state of its own: a few groups
  /// with many rows do not fill a GPU otherwise. MergeStates puts the parts
  /// together. 1..kMaxSplits.
  int splits = 1;
};

/// Attention of each group's queries over its rows: out (splits, groups, group, value_dim), lse
/// (splits, groups, group). They must not overlap the inputs.
cudaError_t AttendGatheredRows(const GatheredRows& rows, float* out, float* lse,
                               cudaStream_t stream) noexcept;

/// Merges `count` states of `heads` independent heads into one: outs (count, heads, value_dim),
/// lses (count, heads) to out (heads, value_dim), lse (heads). `out` and `lse` may be those of one
/// of the states. An empty state (lse = -infinity) counts for nothing, whatever its outs hold.
/// count >= 0, heads >= 0, value_dim a multiple of 4 in 4..kMaxValueDim; outs and out 16-byte
/// aligned.
cudaError_t MergeStates(const float* outs, const float* lses, int count, int heads, int value_dim,
                        float* out, float* lse, cudaStream_t stream) noexcept;

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_ATTENTION_H_
