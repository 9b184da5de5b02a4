// How a warp of attend_pages.cuh attends: query rows, and the running state that tiles are added
// to.
#ifndef KVSEEK_KERNELS_CUDA_WARP_STATE_CUH_
#define KVSEEK_KERNELS_CUDA_WARP_STATE_CUH_

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attend_pages.h"
#include "kernels/cuda/tensor_core.cuh"
#include "kernels/cuda/tile_loader.cuh"

namespace kvseek::kernels::cuda {

// The query rows of one chunk, and which keys they see. They are the N of products, in tiles of 8:
// of each tile a thread multiplies row lane / 4, and has the scores of rows lane % 4 * 2 and one
// more.
template <typename Shape>
struct QueryRows {
  static constexpr int kTiles = Shape::kQueryTiles;

  uint32_t fragments[kTiles][Shape::kRowBytes / 32][2];
  int limits[kTiles][2];  // keys that the rows of the thread's scores see
  int full_limit;         // keys that all rows see

  static __device__ int64_t OutRow(const AttendArguments& arguments, int sequence, int head,
                                   int row) {
    const PageQueries& queries = arguments.queries;
    const int token = row / queries.group;
    return ((static_cast<int64_t>(sequence) * queries.tokens + token) *
                arguments.pages.pool.kv_heads +
            head) *
               queries.group +
           row % queries.group;
  }

  template <typename Cursor>
  __device__ void Load(const AttendArguments& arguments, const Cursor& cursor, int lane) {
    const PageQueries& queries = arguments.queries;
    const int key_dim = arguments.pages.pool.key_dim;
    const int rows = queries.tokens * queries.group;
    full_limit = cursor.count - (queries.causal ? queries.tokens - 1 : 0);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int tile_row = cursor.chunk * kChunkRows + 8 * t;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = tile_row + lane % 4 * 2 + i;
        limits[t][i] = cursor.count;
        if (queries.causal && row < rows) limits[t][i] -= queries.tokens - 1 - row / queries.group;
      }
      const int row = tile_row + lane / 4;
      const bool is_there = row < rows;
      const auto* query = static_cast<const uint16_t*>(queries.queries);
      if (is_there) query += OutRow(arguments, cursor.sequence, cursor.head, row) * key_dim;
#pragma unroll
      for (int i = 0; i < Shape::kRowBytes / 16; ++i) {
        const int element = 8 * i + lane % 4 * 2;
        fragments[t][i / 2][i % 2] = is_there && element < key_dim
                                         ? *reinterpret_cast<const unsigned*>(query + element)
                                         : 0U;
      }
    }
  }
};

// One warp's running state of a chunk (kernels/attention_state.h), exponentials to the base of 2.
// Products have keys, or elements of values, as M and queries as N, so that 8 queries waste
// nothing. `sum` is the thread's own share until FinishSums.
template <typename Elements, typename Shape>
struct WarpState {
  static constexpr int kTiles = Shape::kQueryTiles;
  static constexpr int kSteps = Shape::kRowBytes / 32;  // of 16 elements of a row

  float max[kTiles][2];
  float sum[kTiles][2];
  float acc[kSteps][kTiles][4];

  __device__ void Reset() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        max[t][i] = -INFINITY;
        sum[t][i] = 0.0F;
      }
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[n][t][i] = 0.0F;
      }
    }
  }

  // Adds the 16 keys of a tile, of which the first has number `row`.
  __device__ void AddTile(const QueryRows<Shape>& queries, float scale, int row, uint32_t tile,
                          int lane) {
    float scores[kTiles][4];
    Score(queries, tile, lane, scores);
    uint32_t high[kTiles][2];
    uint32_t low[kTiles][2];
    SoftMax(queries, scale, row, lane, scores, high, low);

    const uint32_t value = TileOffset<Shape::kRowBytes>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      uint32_t values[4];
      LoadMatricesTransposed(values,
                             tile + Shape::kTileBytes + (value ^ static_cast<uint32_t>(n << 5)));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) Elements::Multiply(acc[n][t], values, high[t]);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) Elements::Multiply(acc[n][t], values, low[t]);
    }
  }

  // Makes `sum` that of the whole row.
  __device__ void FinishSums() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int other = 4; other < 32; other *= 2) {
          sum[t][i] += __shfl_xor_sync(kAllLanes, sum[t][i], other);
        }
      }
    }
  }

  // Where element `element` of query row `row` is among a stored state's: rows lie in different
  // banks, and groups of 8 elements stay together.
  static __device__ int StoredAt(int row, int element) {
    return row * Shape::kDim + (element ^ ((row >> 1 & 3) << 3));
  }

  // Writes max and sum of each row to `rows`, the sums of values to `elements`.
  __device__ void Store(float2* rows, float* elements, int lane) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 8 * t + lane % 4 * 2 + i;
        if (lane < 4) rows[row] = make_float2(max[t][i], sum[t][i]);
#pragma unroll
        for (int n = 0; n < kSteps; ++n) {
          elements[StoredAt(row, 16 * n + lane / 4)] = acc[n][t][i];
          elements[StoredAt(row, 16 * n + lane / 4 + 8)] = acc[n][t][i + 2];
        }
      }
    }
  }

 private:
  // One chain of products for 16 queries, two for 8: a chain is as slow as its latency.
  __device__ void Score(const QueryRows<Shape>& queries, uint32_t tile, int lane,
                        float (&scores)[kTiles][4]) const {
    constexpr int kChains = 2 / kTiles;
    float chains[kChains][kTiles][4] = {};
    const uint32_t key = TileOffset<Shape::kRowBytes>(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t keys[4];
      LoadMatrices(keys, tile + (key ^ static_cast<uint32_t>(k << 5)));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        Elements::Multiply(chains[k % kChains][t], keys, queries.fragments[t][k]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[t][i] = chains[0][t][i];
        if constexpr (kChains == 2) scores[t][i] += chains[1][t][i];
      }
    }
  }

  // Turns scores into weights, as high and low parts in the layout of a right factor.
  __device__ void SoftMax(const QueryRows<Shape>& queries, float scale, int row, int lane,
                          float (&scores)[kTiles][4], uint32_t (&high)[kTiles][2],
                          uint32_t (&low)[kTiles][2]) {
    const bool is_masked = row + kTileRows > queries.full_limit;
    bool is_higher = false;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[t][i];
        score *= scale;
        if (is_masked && row + lane / 4 + i / 2 * 8 >= queries.limits[t][i % 2]) score = -INFINITY;
        is_higher = is_higher || score > max[t][i % 2];
      }
    }
    if (__any_sync(kAllLanes, is_higher)) RaiseMax(scores);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float weights[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float reference = max[t][i % 2] == -INFINITY ? 0.0F : max[t][i % 2];
        weights[i] = Exp2(scores[t][i] - (reference - Elements::kWeightShift));
        sum[t][i % 2] += weights[i];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t rounded = Elements::Pack(weights[2 * i], weights[2 * i + 1]);
        const float2 kept = Elements::Unpack(rounded);
        high[t][i] = TransposeMatrix(rounded);
        low[t][i] =
            TransposeMatrix(Elements::Pack(weights[2 * i] - kept.x, weights[2 * i + 1] - kept.y));
      }
    }
  }

  __device__ void RaiseMax(const float (&scores)[kTiles][4]) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float new_max = fmaxf(max[t][i], fmaxf(scores[t][i], scores[t][i + 2]));
#pragma unroll
        for (int other = 4; other < 32; other *= 2) {
          new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, other));
        }
        const float factor = max[t][i] == -INFINITY ? 0.0F : Exp2(max[t][i] - new_max);
        max[t][i] = new_max;
        sum[t][i] *= factor;
#pragma unroll
        for (int n = 0; n < kSteps; ++n) {
          acc[n][t][i] *= factor;
          acc[n][t][i + 2] *= factor;
        }
      }
    }
  }
};

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_WARP_STATE_CUH_
