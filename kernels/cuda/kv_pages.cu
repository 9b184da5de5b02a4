#include <algorithm>
#include <cstdint>

#include "kernels/cuda/kv_pages.cuh"
#include "kernels/cuda/kv_pages.h"
#include "kernels/cuda/launch.h"

namespace kvseek::kernels::cuda {
namespace {

constexpr int kPieceElements = 8;  // 16 bytes

template <typename Rows>
cudaError_t LaunchCopy(const RowSets<Rows>& rows, int sets, cudaStream_t stream) {
  int64_t pieces = 0;
  for (int i = 0; i < sets; ++i) pieces = std::max(pieces, rows.sets[i].pieces);
  if (pieces == 0) return cudaSuccess;
  const int64_t blocks = (pieces - 1) / kBlockPieces + 1;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return Launch(CopyRowsKernel<Rows>,
                dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(sets)), kCopyThreads, 0,
                stream, rows);
}

// Keys or values; without the direction.
PoolRows RowsOf(const PagePool& pool, void* pool_rows, int dim, const int32_t* slots, int count,
                const void* array, int64_t token_stride, int first_head, int heads) {
  PoolRows rows{};
  rows.slots = slots;
  rows.pool = static_cast<uint4*>(pool_rows);
  rows.array = static_cast<uint4*>(const_cast<void*>(array));
  rows.row_pieces = dim / kPieceElements;
  rows.token_stride = token_stride * rows.row_pieces;
  rows.kv_heads = pool.kv_heads;
  rows.page_tokens = pool.page_tokens;
  rows.first_head = first_head;
  rows.heads = heads;
  rows.pieces = int64_t{count} * heads * rows.row_pieces;
  return rows;
}

}  // namespace

cudaError_t ScatterRows(const void* keys, const void* values, const int32_t* slots, int count,
                        int64_t token_stride, const PagePool& pool, cudaStream_t stream) noexcept {
  if (count < 0 || !IsValid(pool) || token_stride < pool.kv_heads) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  if (!IsAligned(keys) || !IsAligned(values) || slots == nullptr) return cudaErrorInvalidValue;
  RowSets<PoolRows> rows{
      {RowsOf(pool, pool.keys, pool.key_dim, slots, count, keys, token_stride, 0, pool.kv_heads),
       RowsOf(pool, pool.values, pool.value_dim, slots, count, values, token_stride, 0,
              pool.kv_heads)}};
  rows.sets[0].into_pool = rows.sets[1].into_pool = true;
  return LaunchCopy(rows, 2, stream);
}

cudaError_t PackRows(const PagePool& pool, const int32_t* slots, int count, int first_head,
                     int heads, void* keys, void* values, cudaStream_t stream) noexcept {
  if (count < 0 || !IsValid(pool) || first_head < 0 || heads < 0 ||
      heads > pool.kv_heads - first_head) {
    return cudaErrorInvalidValue;
  }
  if (count == 0 || heads == 0) return cudaSuccess;
  if (!IsAligned(keys) || !IsAligned(values) || slots == nullptr) return cudaErrorInvalidValue;
  const RowSets<PoolRows> rows{
      {RowsOf(pool, pool.keys, pool.key_dim, slots, count, keys, heads, first_head, heads),
       RowsOf(pool, pool.values, pool.value_dim, slots, count, values, heads, first_head, heads)}};
  return LaunchCopy(rows, 2, stream);
}

cudaError_t PackStrided(const void* rows, int64_t token_stride, int64_t head_stride, int tokens,
                        int heads, int dim, void* out, cudaStream_t stream) noexcept {
  if (tokens < 0 || heads < 0 || dim < 0 || dim % kPieceElements != 0 ||
      token_stride % kPieceElements != 0 || head_stride % kPieceElements != 0) {
    return cudaErrorInvalidValue;
  }
  if (tokens == 0 || heads == 0 || dim == 0) return cudaSuccess;
  if (!IsAligned(rows) || !IsAligned(out)) return cudaErrorInvalidValue;
  StridedRows strided{};
  strided.rows = static_cast<const uint4*>(rows);
  strided.out = static_cast<uint4*>(out);
  strided.token_stride = token_stride / kPieceElements;
  strided.head_stride = head_stride / kPieceElements;
  strided.heads = heads;
  strided.row_pieces = dim / kPieceElements;
  strided.pieces = int64_t{tokens} * heads * strided.row_pieces;
  return LaunchCopy(RowSets<StridedRows>{{strided, {}}}, 1, stream);
}

}  // namespace kvseek::kernels::cuda
