// Keys and values in pages: where the GPU keeps the rows that it attends to, and the kernels that
// move rows in and out.
//
// One description serves three uses:
//
//   steady zone   pages of some tokens, each with all KV heads; one list of pages a sequence
//   row cache     page_tokens = 1 and kv_heads = 1: each (sequence, KV head) is a "sequence" of its
//                 own, and its list names the rows it attends to
//   gathered rows pages = nullptr: sequence s has one page, number s, of page_tokens rows
//
// Calls only enqueue, allocate nothing, and may be captured in a CUDA graph. Thread-safe. Errors:
// cudaErrorInvalidValue for an argument outside its limits, or what the launch returned.
#ifndef KVSEEK_KERNELS_CUDA_KV_PAGES_H_
#define KVSEEK_KERNELS_CUDA_KV_PAGES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/dtype.h"

namespace kvseek::kernels::cuda {

inline constexpr int kMaxRowDim = 256;    ///< elements of a key or value row
inline constexpr int kMaxRows = 1 << 30;  ///< rows of a sequence

/// A pool of pages: keys (pages, kv_heads, page_tokens, key_dim), values (pages, kv_heads,
/// page_tokens, value_dim). Owns nothing. A pool has fewer than 2^31 rows.
struct PagePool {
  void* keys = nullptr;        ///< 16-byte aligned; device memory, or pinned host memory
  void* values = nullptr;      ///< likewise
  int kv_heads = 0;            ///< 1 or more
  int page_tokens = 0;         ///< a power of two, or any number where no list of pages is used
  int key_dim = 0;             ///< a multiple of 8, 8..kMaxRowDim
  int value_dim = 0;           ///< a multiple of 8, 8..kMaxRowDim
  DType dtype = DType::kBf16;  ///< bf16 or fp16
};

/// The rows of `sequences` sequences in a pool. Row r of sequence s and KV head h is row
///   (page * kv_heads + h) * page_tokens + r % page_tokens
/// of the pool, with page = pages[s * pages_max + r / page_tokens], or s where pages is null.
struct KvPages {
  PagePool pool;
  const int32_t* pages = nullptr;   ///< (sequences, pages_max), or null
  const int32_t* counts = nullptr;  ///< (sequences): rows in use, clamped to 0..rows_max(); rows
                                    ///< past them are not read, nor their pages' numbers
  int pages_max = 1;
  int sequences = 0;  ///< 0 is fine and does nothing

  int64_t rows_max() const {
    return static_cast<int64_t>(pages != nullptr ? pages_max : 1) * pool.page_tokens;
  }
};

/// Writes `count` tokens into a pool: keys (count, kv_heads, key_dim) and values (count, kv_heads,
/// value_dim) of the pool's dtype, each token token_stride rows after the one before (kv_heads:
/// they are contiguous). Token i goes to slots[i] = page * page_tokens + place in the page; a
/// negative slot is skipped. Sources are device memory or pinned host memory, 16-byte aligned, and
/// are read where they are; slots likewise. Slots must differ.
cudaError_t ScatterRows(const void* keys, const void* values, const int32_t* slots, int count,
                        int64_t token_stride, const PagePool& pool, cudaStream_t stream) noexcept;

/// The other way: reads `count` tokens of KV heads [first_head, first_head + heads) out of a pool
/// into keys (count, heads, key_dim) and values (count, heads, value_dim). The destination is
/// device memory or pinned host memory, 16-byte aligned.
cudaError_t PackRows(const PagePool& pool, const int32_t* slots, int count, int first_head,
                     int heads, void* keys, void* values, cudaStream_t stream) noexcept;

/// Packs one layer's keys or values out of an engine's own tensor for Append: row (t, h) of
/// `tokens` x `heads` rows of `dim` 2-byte elements is at rows + t * token_stride + h * head_stride
/// elements; out (tokens, heads, dim). Strides are multiples of 8; 16-byte aligned. Device or
/// pinned host memory.
cudaError_t PackStrided(const void* rows, int64_t token_stride, int64_t head_stride, int tokens,
                        int heads, int dim, void* out, cudaStream_t stream) noexcept;

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_KV_PAGES_H_
