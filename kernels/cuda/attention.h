// Decode attention on the decoder's GPU, and the merge of partial results.
//
// A decode step of one layer puts its attention together from parts (kernels/attention_state.h):
// the steady zone that stays in device memory, the rows that TopK returned, and the state of the
// rest that came with them. The first two are AttendPages, all of them together MergeStates.
//
// All pointers are device memory, or pinned host memory that the device can address where it is
// said so; tensors are row-major and contiguous, sums fp32. Calls only enqueue: nothing here waits,
// allocates or copies, so they may be captured in a CUDA graph. Thread-safe. The state of no rows
// is out = 0, lse = -infinity; lse is in natural-log units. Inputs must be finite.
//
// Errors: cudaErrorInvalidValue for an argument outside its limits, or what the launch returned.
// Errors of a kernel that is under way come from the stream, as ever.
#ifndef KVSEEK_KERNELS_CUDA_ATTENTION_H_
#define KVSEEK_KERNELS_CUDA_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/kv_pages.h"
#include "kernels/dtype.h"

namespace kvseek::kernels::cuda {

inline constexpr int kMaxGroup = 64;        ///< query heads that share a KV head
inline constexpr int kMaxTokens = 64;       ///< query tokens of a sequence
inline constexpr int kMaxValueDim = 65536;  ///< elements of a state that MergeStates takes
inline constexpr int kMaxStateLists = 4;    ///< lists that one MergeStates takes

/// Queries of every sequence of `KvPages`, all of the same number of tokens. Owns nothing.
struct PageQueries {
  /// (sequences, tokens, kv_heads, group, key_dim) in the pages' dtype, not scaled; 16-byte aligned
  const void* queries = nullptr;
  int tokens = 1;              ///< 1..kMaxTokens
  int group = 0;               ///< query heads of a KV head, 1..kMaxGroup
  float softmax_scale = 0.0F;  ///< scores are softmax_scale * <q, k>; finite
  /// Query token t sees the rows below count - (tokens - 1 - t): the last rows are those of the
  /// query tokens themselves. False: every token sees all rows.
  bool causal = false;
};

/// What AttendPages needs beside its arguments: scratch for heads whose rows are spread over
/// several blocks. One call at a time may use it; calls on one stream take turns by themselves.
/// `bytes` of AttendWorkspaceBytes, 16-byte aligned device memory, zeroed once before the first
/// call.
struct AttendWorkspace {
  void* data = nullptr;
  size_t bytes = 0;
};

/// Bytes of an AttendWorkspace on the current device for up to `groups` = sequences x kv_heads,
/// `tokens`, `group` and `value_dim`; 0 if there is no device.
size_t AttendWorkspaceBytes(int groups, int tokens, int group, int value_dim) noexcept;

/// Attention of each group's queries over its rows: out (sequences, tokens, kv_heads, group,
/// value_dim), 16-byte aligned, lse (sequences, tokens, kv_heads, group). They must not overlap the
/// inputs.
///
/// Work is cut into equal numbers of rows for each block, across the borders of groups (stream-K;
/// LeanAttention, arXiv 2405.10480), so mixed lengths and few groups fill the GPU alike. The same
/// input on the same kind of device gives the same bits. A row is read once for all query heads
/// of its group and all tokens, up to 16 of them in all; products are on tensor cores (bf16 or
/// fp16 in, fp32 sums; softmax weights are split in two so that they do not round). Refused is also
/// what may be more than 2^31 units of 32 rows: sequences x kv_heads x (rows_max() / 32 + 1), times
/// the number of 16s that tokens x group take.
cudaError_t AttendPages(const KvPages& pages, const PageQueries& queries,
                        const AttendWorkspace& workspace, float* out, float* lse,
                        cudaStream_t stream) noexcept;

/// `count` states of all heads: outs (count, heads, value_dim), lses (count, heads). Device memory,
/// or pinned host memory.
struct StateList {
  const float* outs = nullptr;  ///< 16-byte aligned
  const float* lses = nullptr;
  int count = 0;
};

/// Merges the states of `lists` (list_count of them, 0..kMaxStateLists) into one for each of
/// `heads` independent heads: out (heads, value_dim) in out_dtype, 16-byte aligned, and, unless
/// null, lse (heads). `out` (fp32) and `lse` may be those of one of the states. An empty state (lse
/// = -infinity) counts for nothing, whatever its outs hold. heads >= 0, value_dim a multiple of 8
/// in 8..kMaxValueDim.
cudaError_t MergeStates(const StateList* lists, int list_count, int heads, int value_dim, void* out,
                        DType out_dtype, float* lse, cudaStream_t stream) noexcept;

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_ATTENTION_H_
