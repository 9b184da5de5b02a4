// The two inner loops of the double-precision reference, for the SIMD levels of this machine.
//
// `rows` is a number of query rows, padded to a multiple of kReferenceRowTile; query rows lie next
// to each other, so that one vector holds several of them. Pure, noexcept, allocate nothing.
#ifndef KVSEEK_CLI_REFERENCE_KERNELS_H_
#define KVSEEK_CLI_REFERENCE_KERNELS_H_

namespace kvseek::cli {

inline constexpr int kReferenceRowTile = 8;

/// scores (count, rows) := keys (count, dim) times queries (dim, rows). REQUIRES: count is a
/// multiple of 8.
void ReferenceScores(const double* keys, int count, int dim, const double* queries, int rows,
                     double* scores) noexcept;

/// acc (rows, dim) += transpose of weights (count, rows) times values (count, dim). REQUIRES: dim
/// is a multiple of 8.
void ReferenceAccumulate(const double* weights, int rows, const double* values, int count, int dim,
                         double* acc) noexcept;

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_REFERENCE_KERNELS_H_
