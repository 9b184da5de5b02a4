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
#include <cuda/atomic>

#include "kernels/cuda/attend_pages.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/tensor_core.cuh"
#include "kernels/cuda/tile_loader.cuh"
#include "kernels/cuda/warp_state.cuh"
#include "kernels/cuda/work_share.cuh"

namespace kvseek::kernels::cuda {

inline constexpr float kLog2e = 1.44269504F;
inline constexpr float kLn2 = 0.693147181F;

// Four elements of `kStates` states.
template <int kStates>
struct StateQuads {
  float2 states[kStates];  // max and sum
  float4 values[kStates];

  __device__ void Clear(int i) {
    states[i] = make_float2(-INFINITY, 0.0F);
    values[i] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
  }
};

// Four elements of a running state, merged from others.
struct MergedQuad {
  float max = -INFINITY;
  float sum = 0.0F;
  float4 acc = make_float4(0.0F, 0.0F, 0.0F, 0.0F);

  template <int kStates>
  __device__ void Add(const StateQuads<kStates>& quads) {
    float new_max = max;
#pragma unroll
    for (int i = 0; i < kStates; ++i) new_max = fmaxf(new_max, quads.states[i].x);
    const float reference = new_max == -INFINITY ? 0.0F : new_max;
    Scale(Exp2(max - reference));
    max = new_max;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const float weight = Exp2(quads.states[i].x - reference);
      sum = fmaf(weight, quads.states[i].y, sum);
      acc.x = fmaf(weight, quads.values[i].x, acc.x);
      acc.y = fmaf(weight, quads.values[i].y, acc.y);
      acc.z = fmaf(weight, quads.values[i].z, acc.z);
      acc.w = fmaf(weight, quads.values[i].w, acc.w);
    }
  }

  __device__ void Scale(float factor) {
    sum *= factor;
    acc = make_float4(acc.x * factor, acc.y * factor, acc.z * factor, acc.w * factor);
  }
};

// One chunk of one group, as far as a block's share goes. Its threads merge and write (row, quad)
// items, of kDim / 4 quads a row.
template <typename Elements, typename Shape>
struct Piece {
  static constexpr int kQuads = Shape::kDim / 4;
  static constexpr int kPiecesAtOnce = 8;  // that a thread reads of each item
  static constexpr int kItemsAtOnce =
      Shape::kDim == 64 ? 1 : 2;  // there are fewer of 64 dimensions

  int sequence;
  int head;
  int chunk;
  int first_block;  // of those that share the group
  int last_block;

  __device__ bool IsWhole() const { return first_block == last_block; }

  // Merges the warps' states and writes the result, or the block's part of it. `stages` is where
  // the first warp's stage that is free now lies; the others follow kRingBytes apart. Called by all
  // threads.
  __device__ void Finish(const AttendArguments& arguments, WarpState<Elements, Shape>& state,
                         unsigned char* stages) const {
    __shared__ float2 states[Shape::kWarps][kChunkRows];
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const auto elements_of = [&](int of_warp) {
      return reinterpret_cast<float*>(stages + of_warp * Shape::kRingBytes);
    };
    state.FinishSums();
    state.Store(states[warp], elements_of(warp), static_cast<int>(threadIdx.x) % 32);
    __syncthreads();
    const int items = RowsOfChunk(arguments) * kQuads;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < items; i += Shape::kThreads) {
      const int row = i / kQuads;
      const int quad = i % kQuads;
      const int at = WarpState<Elements, Shape>::StoredAt(row, 4 * quad);
      StateQuads<Shape::kWarps> quads;
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w) {
        quads.states[w] = states[w][row];
        quads.values[w] = *reinterpret_cast<const float4*>(elements_of(w) + at);
      }
      MergedQuad merged;
      merged.Add(quads);
      if (IsWhole()) {
        WriteOut(arguments, merged, row, quad);
      } else {
        WritePiece(arguments, merged, row, quad);
      }
    }
    __syncthreads();  // the stages are free again, the piece is written
  }

  // Merges all pieces of the group and writes the result, if this block is the last of those that
  // share it. Called by all threads, after Finish.
  __device__ void MergeIfLast(const AttendArguments& arguments) const {
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
      // Between the barriers it releases and acquires for all threads.
      ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_device> arrivals(
          arguments.arrivals[first_block]);
      is_last = arrivals.fetch_add(1U, ::cuda::memory_order_acq_rel) ==
                static_cast<uint32_t>(last_block - first_block);
      if (is_last) arrivals.store(0U, ::cuda::memory_order_relaxed);
    }
    __syncthreads();
    if (!is_last) return;
    const int items = RowsOfChunk(arguments) * kQuads;
    const int pieces = last_block - first_block + 1;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < items; i += kItemsAtOnce * Shape::kThreads) {
      MergedQuad merged[kItemsAtOnce];
#pragma unroll 1
      for (int piece = 0; piece < pieces; piece += kPiecesAtOnce) {
        StateQuads<kPiecesAtOnce> quads[kItemsAtOnce];
#pragma unroll
        for (int j = 0; j < kItemsAtOnce; ++j) {
          const int item = i + j * Shape::kThreads;
          ReadPieces(arguments, piece, item < items ? pieces : 0, item / kQuads, item % kQuads,
                     quads[j]);
        }
#pragma unroll
        for (int j = 0; j < kItemsAtOnce; ++j) merged[j].Add(quads[j]);
      }
#pragma unroll
      for (int j = 0; j < kItemsAtOnce; ++j) {
        const int item = i + j * Shape::kThreads;
        if (item < items) WriteOut(arguments, merged[j], item / kQuads, item % kQuads);
      }
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

  // Pieces [piece, piece + kPiecesAtOnce), as far as there are so many. Other blocks wrote them, so
  // no stale cache may serve them.
  __device__ void ReadPieces(const AttendArguments& arguments, int piece, int pieces, int row,
                             int quad, StateQuads<kPiecesAtOnce>& quads) const {
#pragma unroll
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      quads.Clear(i);
      if (piece + i >= pieces || 4 * quad >= arguments.pages.pool.value_dim) continue;
      const float* from = PieceRow(arguments, first_block + piece + i, row);
      quads.states[i] = __ldcg(reinterpret_cast<const float2*>(from));
      quads.values[i] = __ldcg(reinterpret_cast<const float4*>(from + kStateHeader) + quad);
    }
  }

  __device__ void WriteOut(const AttendArguments& arguments, MergedQuad state, int row,
                           int quad) const {
    const int value_dim = arguments.pages.pool.value_dim;
    if (4 * quad >= value_dim) return;
    const int64_t out_row =
        QueryRows<Shape>::OutRow(arguments, sequence, head, chunk * kChunkRows + row);
    if (quad == 0) {
      arguments.lse[out_row] = state.sum > 0.0F
                                   ? kLn2 * (state.max - Elements::kWeightShift + log2f(state.sum))
                                   : -INFINITY;
    }
    state.Scale(state.sum > 0.0F ? 1.0F / state.sum : 0.0F);
    reinterpret_cast<float4*>(arguments.out + out_row * value_dim)[quad] = state.acc;
  }

  __device__ void WritePiece(const AttendArguments& arguments, const MergedQuad& state, int row,
                             int quad) const {
    if (4 * quad >= arguments.pages.pool.value_dim) return;
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

// Grid: Blocks().
template <typename Elements, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    AttendPagesKernel(const __grid_constant__ AttendArguments arguments) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;

  WaitForEarlierWork();
  const WorkShare work = FindShare<Shape::kUnitRows>(arguments);
  const uint32_t ring = SharedAddress(shared) + static_cast<uint32_t>(warp * Shape::kRingBytes);
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
  int free_stage = Shape::kStages - 1;
  for (int unit = work.begin; unit < work.end;) {
    const auto piece = PieceAt<Elements, Shape>(cursor, unit, work);
    WarpState<Elements, Shape> state;
    state.Reset();
    const int end = min(work.end, unit - cursor.unit + cursor.units);
    int row = cursor.unit * Shape::kUnitRows + warp * kTileRows;
    for (; unit < end; ++unit, row += Shape::kUnitRows) {
      WaitForCopies<Shape::kStages - 2>();
      __syncwarp();
      loader.Next(arguments, ring + static_cast<uint32_t>(free_stage * Shape::kStageBytes));
      if (row < cursor.count) {
        state.AddTile(queries, scale, row, ring + static_cast<uint32_t>(stage * Shape::kStageBytes),
                      lane);
      }
      free_stage = stage;
      stage = stage == Shape::kStages - 1 ? 0 : stage + 1;
    }
    if (unit < work.end) {  // the next queries come while this piece is finished
      cursor.NextGroup(arguments);
      queries.Load(arguments, cursor, lane);
    }
    piece.Finish(arguments, state, shared + free_stage * Shape::kStageBytes);
    if (!piece.IsWhole()) piece.MergeIfLast(arguments);
  }
}

// Blocks for `groups` groups of rows: fewer than `most` if their number then goes with that of
// groups and hardly any is lost.
inline int Blocks(int64_t groups, int most) {
  const int64_t even = groups <= most ? most / groups * groups : groups / ((groups - 1) / most + 1);
  return even * 16 >= int64_t{most} * 15 ? static_cast<int>(even) : most;
}

// Shared memory beyond 48 KB must be allowed once for each kernel and device.
template <typename Elements, typename Shape>
cudaError_t LaunchShape(const AttendArguments& arguments, int processors, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed_devices{0};
  static_assert(Shape::kBlocks <= kBlocksPerProcessor && Shape::kUnitRows >= kMinUnitRows);
  constexpr auto kKernel = AttendPagesKernel<Elements, Shape>;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((allowed_devices.load(std::memory_order_relaxed) & bit) == 0) {
    const cudaError_t error = cudaFuncSetAttribute(
        kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
    if (error != cudaSuccess) return error;
    allowed_devices.fetch_or(bit, std::memory_order_relaxed);
  }
  const int64_t groups =
      int64_t{arguments.pages.sequences} * arguments.pages.pool.kv_heads * arguments.chunks;
  const dim3 grid(static_cast<unsigned>(Blocks(groups, Shape::kBlocks * processors)));
  return LaunchEarly<kKernel>(grid, Shape::kThreads, Shape::kSharedBytes, stream, arguments);
}

// Whether a block of the current device may have the shared memory.
template <typename Shape>
bool HasRoom() {
  constexpr int kOther = 4096;  // what is declared in kernels, at most
  int device = 0;
  int bytes = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
             cudaSuccess &&
         Shape::kSharedBytes + kOther <= bytes;
}

template <typename Elements, int kDim, int kTiles>
cudaError_t ChooseWidth(const AttendArguments& arguments, int processors, cudaStream_t stream) {
  using Wide = AttendShape<kDim, kTiles, true>;
  if (HasRoom<Wide>()) return LaunchShape<Elements, Wide>(arguments, processors, stream);
  using Narrow = AttendShape<kDim, kTiles, false>;
  return LaunchShape<Elements, Narrow>(arguments, processors, stream);
}

template <typename Elements, int kDim>
cudaError_t ChooseRows(const AttendArguments& arguments, int processors, cudaStream_t stream) {
  return arguments.chunk_rows <= 8 ? ChooseWidth<Elements, kDim, 1>(arguments, processors, stream)
                                   : ChooseWidth<Elements, kDim, 2>(arguments, processors, stream);
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
