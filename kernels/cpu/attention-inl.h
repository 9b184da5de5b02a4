// The two products of attention over one block of rows: queries with keys, weights with values.
// Both keep a tile of sums in registers and load every row once for kHeadsMax heads.
#if defined(KVSEEK_KERNELS_CPU_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSEEK_KERNELS_CPU_ATTENTION_INL_H_
#undef KVSEEK_KERNELS_CPU_ATTENTION_INL_H_
#else
#define KVSEEK_KERNELS_CPU_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cstddef>

#include "hwy/highway.h"
#include "kernels/cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {

/// Rows of a block: its keys and values stay in the first caches while all heads pass over them.
constexpr int kBlockRows = 64;
/// Bytes of rows between the one in work and the one being fetched; less leaves gathered rows late.
constexpr size_t kFetchBytes = 8192;

/// Tile sizes that fit the registers: 4 rows * kScoreHeads sums; kHeadsMax * kStripVectors sums.
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128
constexpr int kScoreHeads = 2;
constexpr size_t kStripVectors = 2;
#else
constexpr int kScoreHeads = 6;
constexpr size_t kStripVectors = 4;
#endif
constexpr int kWeighHeads = 6;

struct NoFetch {
  HWY_INLINE void operator()(int) const {}
};

/// Prefetches the row kFetchBytes further on, up to `count`.
template <class Element, class Rows>
class FetchAhead {
 public:
  FetchAhead(Rows rows, int count, size_t dim)
      : rows_(rows),
        count_(count),
        distance_(static_cast<int>(kFetchBytes / (dim * sizeof(typename Element::T)))),
        dim_(dim) {}
  HWY_INLINE void operator()(int t) const {
    if (t + distance_ < count_) PrefetchRow(rows_[t + distance_], dim_);
  }

 private:
  Rows rows_;
  int count_;
  int distance_;
  size_t dim_;
};

/// Prefetches the same row of another block with `count` rows.
template <class Rows>
struct FetchBlock {
  Rows rows;
  int count;
  size_t dim;
  HWY_INLINE void operator()(int t) const {
    if (t < count) PrefetchRow(rows[t], dim);
  }
};

/// Scores of `heads` queries and the four rows: out[h * out_stride + row].
template <int heads, class Element>
HWY_INLINE void ScoreTile(const float* HWY_RESTRICT queries, size_t dim,
                          const typename Element::T* const* rows, float* HWY_RESTRICT out,
                          size_t out_stride) {
  const FloatTag d;
  using V = hn::Vec<FloatTag>;
  const size_t lanes = hn::Lanes(d);
  V sums[heads][4];
  for (int h = 0; h < heads; ++h) {
    for (int r = 0; r < 4; ++r) sums[h][r] = hn::Zero(d);
  }
  const auto add = [&](const V(&x)[4], const V(&q)[heads]) HWY_ATTR {
    for (int h = 0; h < heads; ++h) {
      for (int r = 0; r < 4; ++r) sums[h][r] = hn::MulAdd(q[h], x[r], sums[h][r]);
    }
  };
  size_t i = 0;
  for (; i + lanes <= dim; i += lanes) {
    V x[4];
    V q[heads];
    for (int r = 0; r < 4; ++r) x[r] = Element::Load(d, rows[r] + i);
    for (int h = 0; h < heads; ++h) q[h] = hn::LoadU(d, queries + static_cast<size_t>(h) * dim + i);
    add(x, q);
  }
#if HWY_MAX_BYTES > 32
  if (i < dim) {
    const TailTag tail;
    V x[4];
    V q[heads];
    for (int r = 0; r < 4; ++r) x[r] = hn::ZeroExtendVector(d, Element::Load(tail, rows[r] + i));
    for (int h = 0; h < heads; ++h) {
      q[h] = hn::ZeroExtendVector(d, hn::LoadU(tail, queries + static_cast<size_t>(h) * dim + i));
    }
    add(x, q);
  }
#endif
  for (int h = 0; h < heads; ++h) {
    SumLanes4(d, sums[h][0], sums[h][1], sums[h][2], sums[h][3],
              out + static_cast<size_t>(h) * out_stride);
  }
}

/// Scores of `heads` queries and `count` rows.
template <int heads, class Element, class Rows, class Fetch>
void ScoreHeads(const float* queries, Rows rows, int count, Fetch fetch, size_t dim, float* scores,
                size_t stride) {
  const typename Element::T* tile[4];
  int t = 0;
  for (; t + 4 <= count; t += 4) {
    for (int r = 0; r < 4; ++r) {
      tile[r] = rows[t + r];
      fetch(t + r);
    }
    ScoreTile<heads, Element>(queries, dim, tile, scores + t, stride);
  }
  if (t == count) return;
  // The last one to three rows: the tile is filled up with the last row again.
  float out[heads * 4];
  for (int r = 0; r < 4; ++r) {
    tile[r] = rows[std::min(t + r, count - 1)];
    fetch(t + r);
  }
  ScoreTile<heads, Element>(queries, dim, tile, out, 4);
  for (int h = 0; h < heads; ++h) {
    for (int r = 0; t + r < count; ++r) {
      scores[static_cast<size_t>(h) * stride + static_cast<size_t>(t + r)] = out[h * 4 + r];
    }
  }
}

template <class Element, class Rows, class Fetch>
void ScoreSomeHeads(int heads, const float* queries, Rows rows, int count, Fetch fetch, size_t dim,
                    float* scores, size_t stride) {
  switch (heads) {
    case 1:
      return ScoreHeads<1, Element>(queries, rows, count, fetch, dim, scores, stride);
    case 2:
      return ScoreHeads<2, Element>(queries, rows, count, fetch, dim, scores, stride);
#if HWY_TARGET != HWY_AVX2 && HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
    case 3:
      return ScoreHeads<3, Element>(queries, rows, count, fetch, dim, scores, stride);
    case 4:
      return ScoreHeads<4, Element>(queries, rows, count, fetch, dim, scores, stride);
    case 5:
      return ScoreHeads<5, Element>(queries, rows, count, fetch, dim, scores, stride);
    case 6:
      return ScoreHeads<6, Element>(queries, rows, count, fetch, dim, scores, stride);
#endif
    default:
      return;
  }
}

/// How many of `left` heads to take next, `most` at a time, in parts as equal as can be.
constexpr int NextHeads(int left, int most) {
  const int parts = (left + most - 1) / most;
  return (left + parts - 1) / parts;
}

/// Scores of one block, count <= kBlockRows, for a whole group. fetch(t) is called once for each
/// row, to prefetch what comes after the block.
template <class Element, class Rows, class Fetch>
void ScoreBlock(const float* queries, int group, Rows rows, int count, Fetch fetch, size_t dim,
                float* scores, size_t stride) {
  int heads = NextHeads(group, kScoreHeads);
  ScoreSomeHeads<Element>(heads, queries, rows, count, fetch, dim, scores, stride);
  for (int h = heads; h < group; h += heads) {
    heads = NextHeads(group - h, kScoreHeads);
    ScoreSomeHeads<Element>(heads, queries + static_cast<size_t>(h) * dim, rows, count, NoFetch{},
                            dim, scores + static_cast<size_t>(h) * stride, stride);
  }
}

/// acc[h][i] += sum_t weights[h * stride + t] * rows[t][i] for a strip of `vectors` vectors.
template <int heads, size_t vectors, class Element, class D, class Rows, class Fetch>
HWY_INLINE void WeighStrip(D d, const float* HWY_RESTRICT weights, size_t stride, Rows rows,
                           int count, Fetch fetch, size_t dim, size_t i, float* HWY_RESTRICT acc) {
  using V = hn::Vec<D>;
  const size_t lanes = hn::Lanes(d);
  V sums[heads][vectors];
  for (int h = 0; h < heads; ++h) {
    for (size_t v = 0; v < vectors; ++v) {
      sums[h][v] = hn::LoadU(d, acc + static_cast<size_t>(h) * dim + i + v * lanes);
    }
  }
  for (int t = 0; t < count; ++t) {
    fetch(t);
    const typename Element::T* row = rows[t] + i;
    V x[vectors];
    for (size_t v = 0; v < vectors; ++v) x[v] = Element::Load(d, row + v * lanes);
    for (int h = 0; h < heads; ++h) {
      const V w = hn::Set(d, weights[static_cast<size_t>(h) * stride + static_cast<size_t>(t)]);
      for (size_t v = 0; v < vectors; ++v) sums[h][v] = hn::MulAdd(w, x[v], sums[h][v]);
    }
  }
  for (int h = 0; h < heads; ++h) {
    for (size_t v = 0; v < vectors; ++v) {
      hn::StoreU(sums[h][v], d, acc + static_cast<size_t>(h) * dim + i + v * lanes);
    }
  }
}

template <int heads, class Element, class Rows, class Fetch>
void WeighHeads(const float* weights, size_t stride, Rows rows, int count, Fetch fetch, size_t dim,
                float* acc) {
  const FloatTag d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  if (kStripVectors * lanes <= dim) {
    WeighStrip<heads, kStripVectors, Element>(d, weights, stride, rows, count, fetch, dim, i, acc);
    i += kStripVectors * lanes;
  }
  for (; i + kStripVectors * lanes <= dim; i += kStripVectors * lanes) {
    WeighStrip<heads, kStripVectors, Element>(d, weights, stride, rows, count, NoFetch{}, dim, i,
                                              acc);
  }
  for (; i + lanes <= dim; i += lanes) {
    WeighStrip<heads, 1, Element>(d, weights, stride, rows, count, NoFetch{}, dim, i, acc);
  }
#if HWY_MAX_BYTES > 32
  if (i < dim) {
    const TailTag tail;
    WeighStrip<heads, 1, Element>(tail, weights, stride, rows, count, NoFetch{}, dim, i, acc);
  }
#endif
}

template <class Element, class Rows, class Fetch>
void WeighSomeHeads(int heads, const float* weights, size_t stride, Rows rows, int count,
                    Fetch fetch, size_t dim, float* acc) {
  switch (heads) {
    case 1:
      return WeighHeads<1, Element>(weights, stride, rows, count, fetch, dim, acc);
    case 2:
      return WeighHeads<2, Element>(weights, stride, rows, count, fetch, dim, acc);
    case 3:
      return WeighHeads<3, Element>(weights, stride, rows, count, fetch, dim, acc);
    case 4:
      return WeighHeads<4, Element>(weights, stride, rows, count, fetch, dim, acc);
    case 5:
      return WeighHeads<5, Element>(weights, stride, rows, count, fetch, dim, acc);
    case 6:
      return WeighHeads<6, Element>(weights, stride, rows, count, fetch, dim, acc);
    default:
      return;
  }
}

/// acc (group, dim) += weights times the rows of one block. For fetch see ScoreBlock.
template <class Element, class Rows, class Fetch>
void WeighBlock(const float* weights, size_t stride, int group, Rows rows, int count, Fetch fetch,
                size_t dim, float* acc) {
  int heads = NextHeads(group, kWeighHeads);
  WeighSomeHeads<Element>(heads, weights, stride, rows, count, fetch, dim, acc);
  for (int h = heads; h < group; h += heads) {
    heads = NextHeads(group - h, kWeighHeads);
    WeighSomeHeads<Element>(heads, weights + static_cast<size_t>(h) * stride, stride, rows, count,
                            NoFetch{}, dim, acc + static_cast<size_t>(h) * dim);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#endif  // KVSEEK_KERNELS_CPU_ATTENTION_INL_H_
