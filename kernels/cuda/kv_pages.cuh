// The kernel behind ScatterRows, PackRows and PackStrided (kv_pages.h): copies of rows in pieces of
// 16 bytes, a thread a piece, several in flight.
#ifndef KVSEEK_KERNELS_CUDA_KV_PAGES_CUH_
#define KVSEEK_KERNELS_CUDA_KV_PAGES_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/kv_pages.h"

namespace kvseek::kernels::cuda {

inline constexpr int kCopyThreads = 256;
inline constexpr int kPiecesAtOnce = 4;  // of a thread
inline constexpr int kBlockPieces = kCopyThreads * kPiecesAtOnce;

// Where a piece is, and where it goes; null where it is to be skipped.
struct PieceCopy {
  const uint4* from = nullptr;
  uint4* to = nullptr;
};

// Rows of tokens x heads, keys or values, between a pool and an array. Strides are in pieces.
struct PoolRows {
  const int32_t* slots;
  uint4* pool;
  uint4* array;
  int64_t token_stride;  // of the array
  int kv_heads;          // of the pool
  int page_tokens;
  int first_head;
  int heads;
  int row_pieces;
  int64_t pieces;  // in all
  bool into_pool;

  __device__ PieceCopy Locate(int64_t index) const {
    const int token_pieces = heads * row_pieces;
    const int64_t token = index / token_pieces;
    const int in_token = static_cast<int>(index % token_pieces);
    const int slot = slots[token];
    if (slot < 0) return {};
    const int head = first_head + in_token / row_pieces;
    const int64_t row =
        (int64_t{slot / page_tokens} * kv_heads + head) * page_tokens + slot % page_tokens;
    uint4* in_pool = pool + row * row_pieces + in_token % row_pieces;
    uint4* in_array = array + token * token_stride + in_token;
    return into_pool ? PieceCopy{in_array, in_pool} : PieceCopy{in_pool, in_array};
  }
};

struct StridedRows {
  const uint4* rows;
  uint4* out;
  int64_t token_stride;
  int64_t head_stride;
  int heads;
  int row_pieces;
  int64_t pieces;

  __device__ PieceCopy Locate(int64_t index) const {
    const int64_t row = index / row_pieces;
    return {rows + row / heads * token_stride + row % heads * head_stride + index % row_pieces,
            out + index};
  }
};

// Two sets of rows, of which one may be empty: blockIdx.y chooses.
template <typename Rows>
struct RowSets {
  Rows sets[2];
};

// Grid: (pieces / kBlockPieces, rounded up; sets).
template <typename Rows>
__global__ void __launch_bounds__(kCopyThreads)
    CopyRowsKernel(const __grid_constant__ RowSets<Rows> row_sets) {
  const Rows& rows = row_sets.sets[blockIdx.y];
  const int64_t first = int64_t{blockIdx.x} * kBlockPieces + threadIdx.x;
  PieceCopy copies[kPiecesAtOnce];
#pragma unroll
  for (int i = 0; i < kPiecesAtOnce; ++i) {
    const int64_t index = first + i * kCopyThreads;
    if (index < rows.pieces) copies[i] = rows.Locate(index);
  }
  uint4 pieces[kPiecesAtOnce];
#pragma unroll
  for (int i = 0; i < kPiecesAtOnce; ++i) {
    if (copies[i].from != nullptr) pieces[i] = *copies[i].from;
  }
#pragma unroll
  for (int i = 0; i < kPiecesAtOnce; ++i) {
    if (copies[i].to != nullptr) *copies[i].to = pieces[i];
  }
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_KV_PAGES_CUH_
