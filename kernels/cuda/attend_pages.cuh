// The kernel behind AttendPages (attention.h).
//
// Up to 16 query rows are the M of m16n8k16 products: scores = queries x keys, then weights x
// values, with an online softmax between (FlashAttention-2, arXiv 2307.08691). The warps of a block
// work alone: each streams tiles of 16 rows, keys and values, through a ring of its own in shared
// memory, on through the borders of groups. Where a group ends, or the block's share of it, the
// warps' states are merged; blocks that share a group leave theirs as pieces, and the last of them
// to arrive merges these in the order of blocks.
#ifndef KVSEEK_KERNELS_CUDA_ATTEND_PAGES_CUH_
#define KVSEEK_KERNELS_CUDA_ATTEND_PAGES_CUH_

#include <cuda_runtime.h>

#include <atomic>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/attend_pages.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/tensor_core.cuh"
#include "kernels/cuda/tile_loader.cuh"
#include "kernels/cuda/warp_state.cuh"
#include "kernels/cuda/work_share.cuh"

namespace kvseek::kernels::cuda {

inline constexpr float kLog2e = 1.44269504F;
inline constexpr float kLn2 = 0.693147181F;

// Four elements of a running state, merged from state rows.
struct StateQuad {
  float max = -INFINITY;
  float sum = 0.0F;
  float4 acc = make_float4(0.0F, 0.0F, 0.0F, 0.0F);

  // Adds elements [4 quad, 4 quad + 4) of `count` rows; row_of(i) is where row i lies, kAtOnce of
  // which are read at once. They may come from other blocks, so no stale cache may serve them.
  template <int kAtOnce, bool kIsGlobal, typename RowOf>
  __device__ void Add(int count, int quad, RowOf row_of) {
#pragma unroll 1
    for (int first = 0; first < count; first += kAtOnce) {
      float2 states[kAtOnce];
      float4 values[kAtOnce];
      float new_max = max;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        states[i] = make_float2(-INFINITY, 0.0F);
        values[i] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
        if (first + i >= count) continue;
        const float* row = row_of(first + i);
        const auto* state = reinterpret_cast<const float2*>(row);
        const auto* value = reinterpret_cast<const float4*>(row + kStateHeader) + quad;
        states[i] = kIsGlobal ? __ldcg(state) : *state;
        values[i] = kIsGlobal ? __ldcg(value) : *value;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) new_max = fmaxf(new_max, states[i].x);
      const float reference = new_max == -INFINITY ? 0.0F : new_max;
      Scale(Exp2(max - reference));
      max = new_max;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float weight = Exp2(states[i].x - reference);
        sum = fmaf(weight, states[i].y, sum);
        acc.x = fmaf(weight, values[i].x, acc.x);
        acc.y = fmaf(weight, values[i].y, acc.y);
        acc.z = fmaf(weight, values[i].z, acc.z);
        acc.w = fmaf(weight, values[i].w, acc.w);
      }
    }
  }

  __device__ void Scale(float factor) {
    sum *= factor;
    acc = make_float4(acc.x * factor, acc.y * factor, acc.z * factor, acc.w * factor);
  }
};

// One chunk of one group, as far as a block's share goes.
template <typename Elements, typename Shape>
struct Piece {
  int sequence;
  int head;
  int chunk;
  int first_block;  // of those that share the group
  int last_block;

  __device__ bool IsWhole() const { return first_block == last_block; }

  // Merges the warps' states and writes the result, or the block's part of it. `rows` has room for
  // 8 state rows of each warp. Called by all threads.
  __device__ void Finish(const AttendArguments& arguments, WarpState<Elements, Shape>& state,
                         float* rows) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int quads = arguments.pages.pool.value_dim / 4;
    const int row_count = RowsOfChunk(arguments);
    state.FinishSums();
#pragma unroll
    for (int r = 0; r < Shape::kThreadRows; ++r) {
      __syncthreads();  // what was read there before is done with
      state.Store(rows + (warp * 8 + lane / 4) * Shape::kStateRow, r, lane);
      __syncthreads();
      const int half_rows = min(8, row_count - 8 * r);
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < half_rows * quads; i += Shape::kThreads) {
        const int row = i / quads;
        StateQuad merged;
        merged.template Add<Shape::kWarps, false>(Shape::kWarps, i % quads, [&](int of_warp) {
          return rows + (of_warp * 8 + row) * Shape::kStateRow;
        });
        if (IsWhole()) {
          WriteOut(arguments, merged, 8 * r + row, i % quads);
        } else {
          WritePiece(arguments, merged, 8 * r + row, i % quads);
        }
      }
    }
  }

  // Merges all pieces of the group and writes the result, if this block is the last of those that
  // share it. Called by all threads, after Finish.
  __device__ void MergeIfLast(const AttendArguments& arguments) const {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t* arrivals = arguments.arrivals + first_block;
      is_last = atomicAdd(arrivals, 1U) == static_cast<uint32_t>(last_block - first_block);
      if (is_last) *arrivals = 0U;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    const int quads = arguments.pages.pool.value_dim / 4;
    const int slot_floats = arguments.chunk_rows * arguments.piece_row;
    const int pieces = last_block - first_block + 1;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < RowsOfChunk(arguments) * quads;
         i += Shape::kThreads) {
      const float* first = PieceRow(arguments, first_block, i / quads);
      StateQuad merged;
      merged.template Add<8, true>(pieces, i % quads, [&](int piece) {
        return first + (2 * piece - (piece == pieces - 1 ? 1 : 0)) * slot_floats;
      });
      WriteOut(arguments, merged, i / quads, i % quads);
    }
  }

 private:
  __device__ int RowsOfChunk(const AttendArguments& arguments) const {
    return min(kChunkRows, arguments.queries.tokens * arguments.queries.group - chunk * kChunkRows);
  }

  // A block's piece of the group that goes on past the block is its second one.
  __device__ float* PieceRow(const AttendArguments& arguments, int block, int row) const {
    const int64_t slot = int64_t{2} * block + (block < last_block ? 1 : 0);
    return arguments.pieces + (slot * arguments.chunk_rows + row) * arguments.piece_row;
  }

  __device__ void WriteOut(const AttendArguments& arguments, StateQuad state, int row,
                           int quad) const {
    const int64_t out_row =
        QueryRows<Shape>::OutRow(arguments, sequence, head, chunk * kChunkRows + row);
    if (quad == 0) {
      arguments.lse[out_row] = state.sum > 0.0F
                                   ? kLn2 * (state.max - Elements::kWeightShift + log2f(state.sum))
                                   : -INFINITY;
    }
    state.Scale(state.sum > 0.0F ? 1.0F / state.sum : 0.0F);
    reinterpret_cast<float4*>(arguments.out + out_row * arguments.pages.pool.value_dim)[quad] =
        state.acc;
  }

  __device__ void WritePiece(const AttendArguments& arguments, const StateQuad& state, int row,
                             int quad) const {
    float* to = PieceRow(arguments, static_cast<int>(blockIdx.x), row);
    if (quad == 0) *reinterpret_cast<float2*>(to) = make_float2(state.max, state.sum);
    reinterpret_cast<float4*>(to + kStateHeader)[quad] = state.acc;
  }
};

// The piece at `unit`, where `cursor` is, of the block's share.
template <typename Elements, typename Shape>
__device__ Piece<Elements, Shape> PieceAt(const UnitCursor<Shape::kUnitRows>& cursor, int unit,
                                          const WorkShare& work) {
  const int begin = unit - cursor.unit;
  const int end = begin + cursor.units;
  const int block = static_cast<int>(blockIdx.x);
  return {cursor.sequence, cursor.head, cursor.chunk,
          begin < work.begin ? work.BlockOf(begin) : block,
          end > work.end ? work.BlockOf(end - 1) : block};
}

// Sequences without rows have no units: their outputs are written here.
template <typename Shape>
__device__ void WriteEmptySequences(const AttendArguments& arguments) {
  const KvPages& pages = arguments.pages;
  const int64_t heads =
      int64_t{arguments.queries.tokens} * pages.pool.kv_heads * arguments.queries.group;
  const int64_t elements = heads * pages.pool.value_dim;
#pragma unroll 1
  for (int sequence = static_cast<int>(blockIdx.x); sequence < pages.sequences;
       sequence += static_cast<int>(gridDim.x)) {
    if (RowCount(arguments, sequence) > 0) continue;
    for (int64_t i = threadIdx.x; i < elements; i += Shape::kThreads) {
      arguments.out[sequence * elements + i] = 0.0F;
    }
    for (int64_t i = threadIdx.x; i < heads; i += Shape::kThreads) {
      arguments.lse[sequence * heads + i] = -INFINITY;
    }
  }
}

// Grid: up to kBlocks for each multiprocessor.
template <typename Elements, int kDim, bool kFewRows>
__global__ void __launch_bounds__(AttendShape<kDim, kFewRows>::kThreads,
                                  AttendShape<kDim, kFewRows>::kBlocks)
    AttendPagesKernel(const __grid_constant__ AttendArguments arguments) {
  using Shape = AttendShape<kDim, kFewRows>;
  extern __shared__ __align__(128) unsigned char shared[];
  const PagePool& pool = arguments.pages.pool;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;

  const WorkShare work = FindShare<Shape::kUnitRows>(arguments);
  if (pool.key_dim < kDim || pool.value_dim < kDim) {
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kWarps * Shape::kRingBytes / 16;
         i += Shape::kThreads) {
      reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
  }
  const uint32_t ring = SharedAddress(shared) + static_cast<uint32_t>(warp * Shape::kRingBytes);
  auto* rows = reinterpret_cast<float*>(shared + Shape::kWarps * Shape::kRingBytes);
  UnitCursor<Shape::kUnitRows> cursor;
  cursor.Start(arguments, work);
  TileLoader<Shape> loader;
  loader.Start(arguments, work, cursor);
#pragma unroll 1
  for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
    loader.Next(arguments, ring + static_cast<uint32_t>(stage * Shape::kStageBytes));
  }
  WriteEmptySequences<Shape>(arguments);

  if (work.begin == work.end) return;
  const float scale = arguments.queries.softmax_scale * kLog2e;
  QueryRows<Shape> queries;
  queries.Load(arguments, cursor, lane);
  int stage = 0;
  for (int unit = work.begin; unit < work.end;) {
    const auto piece = PieceAt<Elements, Shape>(cursor, unit, work);
    WarpState<Elements, Shape> state;
    state.Reset();
    const int end = min(work.end, unit - cursor.unit + cursor.units);
    int row = cursor.unit * Shape::kUnitRows + warp * kTileRows;
    for (; unit < end; ++unit, row += Shape::kUnitRows) {
      WaitForCopies<Shape::kStages - 2>();
      __syncwarp();
      const int free_stage = stage == 0 ? Shape::kStages - 1 : stage - 1;
      loader.Next(arguments, ring + static_cast<uint32_t>(free_stage * Shape::kStageBytes));
      if (row < cursor.count) {
        state.AddTile(queries, scale, row, ring + static_cast<uint32_t>(stage * Shape::kStageBytes),
                      lane);
      }
      stage = stage == Shape::kStages - 1 ? 0 : stage + 1;
    }
    if (unit < work.end) {  // the next queries come while this piece is finished
      cursor.NextGroup(arguments);
      queries.Load(arguments, cursor, lane);
    }
    piece.Finish(arguments, state, rows);
    if (!piece.IsWhole()) piece.MergeIfLast(arguments);
  }
}

// Shared memory beyond 48 KB must be allowed once for each kernel and device.
template <typename Elements, int kDim, bool kFewRows>
cudaError_t LaunchShape(const AttendArguments& arguments, int processors, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed_devices{0};
  using Shape = AttendShape<kDim, kFewRows>;
  static_assert(Shape::kBlocks <= kBlocksPerProcessor && Shape::kUnitRows >= kMinUnitRows);
  const auto kernel = AttendPagesKernel<Elements, kDim, kFewRows>;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((allowed_devices.load(std::memory_order_relaxed) & bit) == 0) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
    if (error != cudaSuccess) return error;
    allowed_devices.fetch_or(bit, std::memory_order_relaxed);
  }
  return Launch(kernel, dim3(static_cast<unsigned>(Shape::kBlocks * processors)), Shape::kThreads,
                Shape::kSharedBytes, stream, arguments);
}

template <typename Elements, int kDim>
cudaError_t ChooseRows(const AttendArguments& arguments, int processors, cudaStream_t stream) {
  return arguments.chunk_rows <= 8
             ? LaunchShape<Elements, kDim, true>(arguments, processors, stream)
             : LaunchShape<Elements, kDim, false>(arguments, processors, stream);
}

template <typename Elements>
cudaError_t LaunchAttendPages(const AttendArguments& arguments, int processors,
                              cudaStream_t stream) {
  const PagePool& pool = arguments.pages.pool;
  const int dim = pool.key_dim > pool.value_dim ? pool.key_dim : pool.value_dim;
  if (dim <= 64) return ChooseRows<Elements, 64>(arguments, processors, stream);
  if (dim <= 128) return ChooseRows<Elements, 128>(arguments, processors, stream);
  return ChooseRows<Elements, 256>(arguments, processors, stream);
}

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_ATTEND_PAGES_CUH_
