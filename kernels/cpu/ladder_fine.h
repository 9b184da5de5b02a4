// The ladder's 4-bit rung: scores and values of candidates from their fine records. Layout:
// ladder_codes.h.
//
// Both functions prefetch ahead. Pure, noexcept, allocate nothing.
#ifndef KVSEEK_KERNELS_CPU_LADDER_FINE_H_
#define KVSEEK_KERNELS_CPU_LADDER_FINE_H_

#include <cstdint>

#include "kernels/attention_state.h"
#include "kernels/cpu/ladder_codes.h"

namespace kvseek::kernels {

/// Rounds rotated queries (heads, padded_dim) to bytes for the 4-bit dot products: quantised
/// (heads, padded_dim), units (heads, 0 for a zero query), query ~ unit * quantised, |quantised| <=
/// 127. The noise of a score is a sixteenth of what the key's four bits make. Scoring is faster
/// with queries on 64 bytes.
void QuantiseQueries(const float* rotated_queries, int heads, int padded_dim, int8_t* quantised,
                     float* units) noexcept;

/// Where a key's codes stand.
struct FineRow {
  const uint8_t* record;
  const FineFactors* factors;
};

/// scores[h * score_stride + i] += slopes[h] * gain * sum over e of (2 nibble_e - 15) q_e, of
/// rows[i], keys of any segments: what is there already is the score of each key's centre, and a
/// slope is scale * unit * kFourBitStep / 2. record_bytes = FineRecordBytes(padded_dim, value_dim).
/// Sixteen keys at a time where products of bytes are used.
void ScoreFine(const FineRow* rows, int count, int record_bytes, const int8_t* quantised,
               int padded_dim, const float* slopes, int heads, float* scores,
               int score_stride) noexcept;

/// Adds the keys, of any segments, to `state` with their scores and their 4-bit values.
/// value_offset = FineValueOffset(padded_dim). A score of -infinity leaves the key out for that
/// head. Many keys at a time: 64, of which a call for few costs nearly as much as one for all;
/// where products of bytes are used 128, and a call's last keys cost as much as the next multiple
/// of 32. There weights are rounded to a 32639th of the largest of each 128 keys: a thousandth of
/// what the values' own four bits leave.
void AccumulateFine(const FineRow* rows, int count, int value_offset, const float* scores,
                    int score_stride, const GroupState& state) noexcept;

/// Decodes one record's values: value (value_dim). For corrections and tests.
void DecodeFineValue(const uint8_t* record, int value_offset, const FineFactors& factors,
                     int value_dim, float* value) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_LADDER_FINE_H_
