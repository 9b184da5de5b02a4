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

// The query rows of one chunk, and which keys they see. A thread holds rows lane / 4 and lane / 4 +
// 8 of the fragments.
template <typename Shape>
struct QueryRows {
  uint32_t fragments[Shape::kRowBytes / 32][4];
  int limits[Shape::kThreadRows];  // keys that the row sees
  int full_limit;                  // keys that all rows see

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
    for (int r = 0; r < Shape::kThreadRows; ++r) {
      const int row = cursor.chunk * kChunkRows + lane / 4 + 8 * r;
      const bool is_there = row < rows;
      const int later = queries.tokens - 1 - row / queries.group;
      limits[r] = cursor.count - (queries.causal && is_there ? later : 0);
      const auto* query = static_cast<const uint16_t*>(queries.queries);
      if (is_there) query += OutRow(arguments, cursor.sequence, cursor.head, row) * key_dim;
#pragma unroll
      for (int i = 0; i < Shape::kRowBytes / 16; ++i) {
        const int element = 8 * i + lane % 4 * 2;
        fragments[i / 2][i % 2 * 2 + r] =
            is_there && element < key_dim
                ? __ldg(reinterpret_cast<const unsigned*>(query + element))
                : 0U;
      }
    }
    if constexpr (Shape::kThreadRows == 1) {
#pragma unroll
      for (int i = 0; i < Shape::kRowBytes / 32; ++i) fragments[i][1] = fragments[i][3] = 0U;
    }
  }
};

// One warp's running state of a chunk (kernels/attention_state.h), exponentials to the base of 2.
// `sum` is the thread's own share until FinishSums.
template <typename Elements, typename Shape>
struct WarpState {
  static constexpr int kRows = Shape::kThreadRows;
  static constexpr int kTiles = Shape::kRowBytes / 16;  // of 8 elements of a value row

  float max[kRows];
  float sum[kRows];
  float acc[kTiles][4];

  __device__ void Reset() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      max[r] = -INFINITY;
      sum[r] = 0.0F;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] = 0.0F;
    }
  }

  // Adds the 16 keys of a tile, of which the first has number `row`.
  __device__ void AddTile(const QueryRows<Shape>& queries, float scale, int row, uint32_t tile,
                          int lane) {
    float scores[2][4] = {};
    const uint32_t key = TileOffset<Shape::kRowBytes>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < Shape::kRowBytes / 32; ++k) {
      uint32_t keys[4];
      LoadMatrices(keys, tile + (key ^ static_cast<uint32_t>(k << 5)));
      Elements::Multiply(scores[0], queries.fragments[k], keys[0], keys[1]);
      Elements::Multiply(scores[1], queries.fragments[k], keys[2], keys[3]);
    }

    uint32_t high[4] = {};
    uint32_t low[4] = {};
    SoftMax(queries, scale, row, lane, scores, high, low);

    const uint32_t value = TileOffset<Shape::kRowBytes>(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      uint32_t values[4];
      LoadMatricesTransposed(values,
                             tile + Shape::kTileBytes + (value ^ static_cast<uint32_t>(n << 5)));
      Elements::Multiply(acc[2 * n], high, values[0], values[1]);
      Elements::Multiply(acc[2 * n + 1], high, values[2], values[3]);
      Elements::Multiply(acc[2 * n], low, values[0], values[1]);
      Elements::Multiply(acc[2 * n + 1], low, values[2], values[3]);
    }
  }

  // Makes `sum` that of the whole row.
  __device__ void FinishSums() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
    }
  }

  // Writes the thread's part of its row `r` as a state row.
  __device__ void Store(float* row, int r, int lane) const {
    if (lane % 4 == 0) *reinterpret_cast<float2*>(row) = make_float2(max[r], sum[r]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      *reinterpret_cast<float2*>(row + kStateHeader + 8 * n + lane % 4 * 2) =
          make_float2(acc[n][2 * r], acc[n][2 * r + 1]);
    }
  }

 private:
  // Turns scores into weights, as high and low parts in the layout of a left factor.
  __device__ void SoftMax(const QueryRows<Shape>& queries, float scale, int row, int lane,
                          float (&scores)[2][4], uint32_t (&high)[4], uint32_t (&low)[4]) {
    const bool is_masked = row + kTileRows > queries.full_limit;
    float new_max[kRows];
    bool is_higher = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      new_max[r] = max[r];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * r + i % 2];
        score *= scale;
        if (is_masked && row + i / 2 * 8 + lane % 4 * 2 + i % 2 >= queries.limits[r]) {
          score = -INFINITY;
        }
        new_max[r] = fmaxf(new_max[r], score);
      }
      new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(kAllLanes, new_max[r], 1));
      new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(kAllLanes, new_max[r], 2));
      is_higher = is_higher || new_max[r] > max[r];
    }
    if (__any_sync(kAllLanes, is_higher)) Rescale(new_max);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float reference = (max[r] == -INFINITY ? 0.0F : max[r]) - Elements::kWeightShift;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float first = Exp2(scores[n][2 * r] - reference);
        const float second = Exp2(scores[n][2 * r + 1] - reference);
        sum[r] += first + second;
        high[2 * n + r] = Elements::Pack(first, second);
        const float2 rounded = Elements::Unpack(high[2 * n + r]);
        low[2 * n + r] = Elements::Pack(first - rounded.x, second - rounded.y);
      }
    }
  }

  __device__ void Rescale(const float (&new_max)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float factor = max[r] == -INFINITY ? 0.0F : Exp2(max[r] - new_max[r]);
      max[r] = new_max[r];
      sum[r] *= factor;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        acc[n][2 * r] *= factor;
        acc[n][2 * r + 1] *= factor;
      }
    }
  }
};

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_WARP_STATE_CUH_
