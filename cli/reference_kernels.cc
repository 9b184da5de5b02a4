#include "cli/reference_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cli/reference_kernels.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace kvseek::cli {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// One vector of query rows, or of value elements, times eight scalars: eight independent
// accumulators hide the latency of the multiply-adds.
using D = hn::CappedTag<double, kReferenceRowTile>;
using V = hn::Vec<D>;

struct Eight {
  V v0, v1, v2, v3, v4, v5, v6, v7;
};

HWY_INLINE Eight Zeros(D d) {
  const V z = hn::Zero(d);
  return {z, z, z, z, z, z, z, z};
}

HWY_INLINE void MulAddEight(D d, const double* scalars, int stride, V x, Eight& s) {
  s.v0 = hn::MulAdd(hn::Set(d, scalars[0]), x, s.v0);
  s.v1 = hn::MulAdd(hn::Set(d, scalars[stride]), x, s.v1);
  s.v2 = hn::MulAdd(hn::Set(d, scalars[2 * stride]), x, s.v2);
  s.v3 = hn::MulAdd(hn::Set(d, scalars[3 * stride]), x, s.v3);
  s.v4 = hn::MulAdd(hn::Set(d, scalars[4 * stride]), x, s.v4);
  s.v5 = hn::MulAdd(hn::Set(d, scalars[5 * stride]), x, s.v5);
  s.v6 = hn::MulAdd(hn::Set(d, scalars[6 * stride]), x, s.v6);
  s.v7 = hn::MulAdd(hn::Set(d, scalars[7 * stride]), x, s.v7);
}

HWY_INLINE void StoreEight(D d, const Eight& s, double* out, int stride) {
  hn::StoreU(s.v0, d, out);
  hn::StoreU(s.v1, d, out + stride);
  hn::StoreU(s.v2, d, out + 2 * stride);
  hn::StoreU(s.v3, d, out + 3 * stride);
  hn::StoreU(s.v4, d, out + 4 * stride);
  hn::StoreU(s.v5, d, out + 5 * stride);
  hn::StoreU(s.v6, d, out + 6 * stride);
  hn::StoreU(s.v7, d, out + 7 * stride);
}

HWY_INLINE Eight LoadEight(D d, const double* in, int stride) {
  return {hn::LoadU(d, in),
          hn::LoadU(d, in + stride),
          hn::LoadU(d, in + 2 * stride),
          hn::LoadU(d, in + 3 * stride),
          hn::LoadU(d, in + 4 * stride),
          hn::LoadU(d, in + 5 * stride),
          hn::LoadU(d, in + 6 * stride),
          hn::LoadU(d, in + 7 * stride)};
}

void Scores(const double* keys, int count, int dim, const double* queries, int rows,
            double* scores) {
  const D d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int t = 0; t < count; t += 8) {
    for (int r = 0; r < rows; r += lanes) {
      Eight sums = Zeros(d);
      for (int i = 0; i < dim; ++i) {
        MulAddEight(d, keys + t * dim + i, dim, hn::LoadU(d, queries + i * rows + r), sums);
      }
      StoreEight(d, sums, scores + t * rows + r, rows);
    }
  }
}

void Accumulate(const double* weights, int rows, const double* values, int count, int dim,
                double* acc) {
  const D d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int r = 0; r < rows; r += 8) {
    for (int i = 0; i < dim; i += lanes) {
      Eight sums = LoadEight(d, acc + r * dim + i, dim);
      for (int t = 0; t < count; ++t) {
        MulAddEight(d, weights + t * rows + r, 1, hn::LoadU(d, values + t * dim + i), sums);
      }
      StoreEight(d, sums, acc + r * dim + i, dim);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::cli
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::cli {

HWY_EXPORT(Scores);
HWY_EXPORT(Accumulate);

void ReferenceScores(const double* keys, int count, int dim, const double* queries, int rows,
                     double* scores) noexcept {
  HWY_DYNAMIC_DISPATCH(Scores)(keys, count, dim, queries, rows, scores);
}

void ReferenceAccumulate(const double* weights, int rows, const double* values, int count, int dim,
                         double* acc) noexcept {
  HWY_DYNAMIC_DISPATCH(Accumulate)(weights, rows, values, count, dim, acc);
}

}  // namespace kvseek::cli
#endif  // HWY_ONCE
