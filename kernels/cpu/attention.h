// Exact attention of one group of query heads over stored rows.
//
// Shapes. Queries are fp32 (group, key_dim), already multiplied by the softmax scale. Key rows are
// (tokens, key_dim), value rows (tokens, value_dim), in bf16 or fp16, contiguous; every row is
// loaded once for the whole group. Scores are fp32, natural-log units. key_dim and value_dim are
// multiples of 8 up to 512 and may differ; group is 1..64. Pointers to rows need 2-byte alignment
// only (64 bytes is faster).
//
// All functions are pure, noexcept, allocate nothing and may run on any number of threads.
#ifndef KVSEEK_KERNELS_CPU_ATTENTION_H_
#define KVSEEK_KERNELS_CPU_ATTENTION_H_

#include <cstdint>

#include "kernels/attention_state.h"
#include "kernels/dtype.h"

namespace kvseek::kernels {

/// <q, k> for every query and every row of a contiguous range: scores[h * score_stride + t].
void ScoreRows(const float* queries, int group, const uint16_t* keys, DType dtype, int tokens,
               int key_dim, float* scores, int score_stride) noexcept;

/// The same for rows anywhere: key_rows[t] points at row t. Prefetches ahead.
void ScoreGathered(const float* queries, int group, const uint16_t* const* key_rows, DType dtype,
                   int count, int key_dim, float* scores, int score_stride) noexcept;

/// The same for fp32 rows (segment centres, landmarks): rows is (count, dim), dim up to 1024.
void ScoreFloatRows(const float* queries, int group, const float* rows, int count, int dim,
                    float* scores, int score_stride) noexcept;

/// The same for fp32 rows anywhere.
void ScoreGatheredFloatRows(const float* queries, int group, const float* const* rows, int count,
                            int dim, float* scores, int score_stride) noexcept;

/// Adds attention over `tokens` contiguous rows to `state`. One pass, block-wise online softmax.
void AttendRows(const float* queries, const uint16_t* keys, const uint16_t* values, DType dtype,
                int tokens, int key_dim, const GroupState& state) noexcept;

/// Adds rows whose scores are known: scores[h * score_stride + t] and contiguous value rows. A
/// score of -infinity leaves the row out for that head.
void AccumulateScored(const float* scores, int score_stride, const uint16_t* values, DType dtype,
                      int tokens, const GroupState& state) noexcept;

/// The same with value rows anywhere.
void AccumulateScoredGathered(const float* scores, int score_stride,
                              const uint16_t* const* value_rows, DType dtype, int count,
                              const GroupState& state) noexcept;

/// acc[h][d] += sum_t weights[h * weight_stride + t] * rows[t * row_stride + d]; rows are bf16,
/// `count` of `dim` elements, acc is (group, dim). For weights that are already exponentials.
void AddWeightedRows(const float* weights, int weight_stride, int group, const uint16_t* rows,
                     int row_stride, int count, int dim, float* acc) noexcept;

/// Index of the first element that is not finite or whose magnitude exceeds 65504, or -1. dtype may
/// be any.
int64_t FindBadElement(const void* data, DType dtype, int64_t count) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_ATTENTION_H_
