// A block of scores, queries of one KV head times consecutive keys: what cuBLAS hands to the
// kernels of query_statistics.h.
#ifndef KVSEEK_KERNELS_CUDA_SCORE_BLOCK_CUH_
#define KVSEEK_KERNELS_CUDA_SCORE_BLOCK_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace kvseek::kernels::cuda {

inline constexpr int kKeyBlock = 4096;     // keys of a block
inline constexpr int kScoreRows = 1024;    // rows of a block at most: (head of the group, query)
inline constexpr int kScoreThreads = 256;  // of the kernels, one block of threads a row

struct ScoreBlock {
  const float* scores;    // (group, queries, kKeyBlock)
  const int32_t* limits;  // of all sampled tokens, or nullptr
  int keys;               // of this block, 0..kKeyBlock
  int first_key;
  int tokens;       // keys of the head
  int first_query;  // token of the sample
  int queries;      // tokens of this block
  int first_head;   // query head
  int heads;        // query heads of the layer

  __device__ const float* Row(int row) const {
    return scores + static_cast<size_t>(row) * kKeyBlock;
  }
  __device__ int Query(int row) const { return first_query + row % queries; }
  // Where the row stands in tensors (count, heads).
  __device__ size_t OutputRow(int row) const {
    return static_cast<size_t>(Query(row)) * heads + first_head + row / queries;
  }
  // Keys before this one are seen by the row's query.
  __device__ int Limit(int row) const {
    return limits == nullptr ? tokens : max(0, min(tokens, limits[Query(row)]));
  }
  // Of this block.
  __device__ int VisibleKeys(int row) const { return max(0, min(keys, Limit(row) - first_key)); }
};

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_SCORE_BLOCK_CUH_
