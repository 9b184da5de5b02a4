// Between the launcher of AttendPages (attention.cu) and its kernels, which are compiled in one
// file for each element type.
#ifndef KVSEEK_KERNELS_CUDA_ATTEND_PAGES_H_
#define KVSEEK_KERNELS_CUDA_ATTEND_PAGES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/attention.h"

namespace kvseek::kernels::cuda {

inline constexpr int kChunkRows = 16;          // query rows that share a pass over the keys
inline constexpr int kMinUnitRows = 32;        // rows of a unit of work, or more
inline constexpr int kBlocksPerProcessor = 3;  // of the kernel's persistent grid, at most

// A state row is max, sum, two unused floats, and the sums of values (kernels/attention_state.h);
// exponentials are to the base of 2.
inline constexpr int kStateHeader = 4;

// Query row i of a (sequence, KV head) is that of token i / group and query head i % group; rows
// [16 c, 16 c + 16) are chunk c.
struct AttendArguments {
  KvPages pages;
  PageQueries queries;
  int chunks;          // of a (sequence, KV head)
  int chunk_rows;      // of the first chunk
  int page_shift;      // log2(page_tokens), where pages are listed
  int rows_max;        // of a sequence
  uint32_t* arrivals;  // (blocks): pieces of the group that begins in a block and goes on past it
  float* pieces;       // (blocks, 2, chunk_rows, piece_row): what a block leaves to others
  int piece_row;       // floats of a state row: kStateHeader + value_dim
  float* out;
  float* lse;
};

cudaError_t LaunchAttendPagesBf16(const AttendArguments& arguments, int processors,
                                  cudaStream_t stream);
cudaError_t LaunchAttendPagesFp16(const AttendArguments& arguments, int processors,
                                  cudaStream_t stream);

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_ATTEND_PAGES_H_
