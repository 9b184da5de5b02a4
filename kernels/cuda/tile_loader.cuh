// How a warp of attend_pages.cuh brings rows into shared memory.
#ifndef KVSEEK_KERNELS_CUDA_TILE_LOADER_CUH_
#define KVSEEK_KERNELS_CUDA_TILE_LOADER_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/attend_pages.h"
#include "kernels/cuda/tensor_core.cuh"
#include "kernels/cuda/work_share.cuh"

namespace kvseek::kernels::cuda {

inline constexpr int kTileRows = 16;
inline constexpr uint32_t kAllLanes = 0xffffffffU;

// kElements: of a row in shared memory; those past key_dim or value_dim are zero. kTiles: of 8
// query rows, 1 or 2. kWide: all warps of a multiprocessor are one block, so that fewer blocks
// share a group; such a block needs up to 192 KB of shared memory (HasRoom), others 96 KB.
template <int kElements, int kTiles, bool kWide>
struct AttendShape {
  static constexpr int kDim = kElements;
  static constexpr int kQueryTiles = kTiles;
  static constexpr int kBlocks = kWide ? 1 : kDim == 64 ? 3 : 2;  // of a multiprocessor
  static constexpr int kWarps = (kDim == 64 ? 12 : 1024 / kDim) / kBlocks;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kUnitRows = kTileRows * kWarps;
  static constexpr int kStages = kDim == 128 && kQueryTiles == 2 ? 2 : 3;
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kRowPieces = kRowBytes / 16;  // 16-byte ones
  static constexpr int kTileBytes = kTileRows * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kWarps * kRingBytes;
  // A stage has room for a state's sums of values.
  static_assert(kStageBytes == kChunkRows * kDim * 4);
};

// Where a thread finds 16-byte piece `piece` of row `row` of a tile: swizzled, so that 8 rows'
// equal pieces lie in different banks.
template <int kRowBytes>
__device__ uint32_t TileOffset(int row, int piece) {
  return static_cast<uint32_t>(row * kRowBytes + ((piece ^ (row & 7)) << 4));
}

// Brings a warp's tiles into its ring, one for each unit of the block. Lanes look up the rows of
// two units at once, 16 each, so that page numbers are there when they are needed.
template <typename Shape>
struct TileLoader {
  UnitCursor<Shape::kUnitRows> cursor;  // of the lane's unit
  int units_left;                       // from that one on
  int copies_left;
  int tile_row;      // the lane's row in a unit
  int half;          // whose rows the next copy takes
  int page;          // of the lane's row
  int place;         // of the row in its page, with all its heads, or -1: there is no such row
  const char* keys;  // where the lane's 16-byte piece of pool row 0 is
  const char* values;

  __device__ void Start(const AttendArguments& arguments, const WorkShare& work,
                        const UnitCursor<Shape::kUnitRows>& begin) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    cursor = begin;
    units_left = copies_left = work.end - work.begin;
    tile_row = static_cast<int>(threadIdx.x) / 32 * kTileRows + lane % kTileRows;
    half = 0;
    keys = static_cast<const char*>(arguments.pages.pool.keys) + lane % Shape::kRowPieces * 16;
    values = static_cast<const char*>(arguments.pages.pool.values) + lane % Shape::kRowPieces * 16;
    Advance(arguments, lane / kTileRows);
    LookUp(arguments);
  }

  // Copies the next tile to `ring`, if there is one, and commits.
  __device__ void Next(const AttendArguments& arguments, uint32_t ring) {
    if (copies_left > 0) {
      --copies_left;
      CopyTile(arguments.pages.pool, ring);
      if (half == 1) {
        Advance(arguments, 2);
        LookUp(arguments);
      }
      half ^= 1;
    }
    CommitCopies();
  }

 private:
  __device__ void Advance(const AttendArguments& arguments, int units) {
#pragma unroll 1
    for (int i = 0; i < units; ++i) {
      if (--units_left > 0) cursor.Advance(arguments);
    }
  }

  __device__ void LookUp(const AttendArguments& arguments) {
    const KvPages& pages = arguments.pages;
    const int row = cursor.unit * Shape::kUnitRows + tile_row;
    place = -1;
    if (units_left <= 0 || row >= cursor.count) return;
    page = cursor.sequence;
    int in_page = row;
    if (pages.pages != nullptr) {
      page =
          pages.pages[int64_t{cursor.sequence} * pages.pages_max + (row >> arguments.page_shift)];
      in_page = row & (pages.pool.page_tokens - 1);
    }
    place = cursor.head * pages.pool.page_tokens + in_page;
  }

  __device__ void CopyTile(const PagePool& pool, uint32_t ring) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int pool_row = place < 0 ? -1 : page * (pool.kv_heads * pool.page_tokens) + place;
    const int piece = lane % Shape::kRowPieces;
    const bool has_key = piece * 8 < pool.key_dim;
    const bool has_value = piece * 8 < pool.value_dim;
    const auto key_bytes = static_cast<uint32_t>(2 * pool.key_dim);
    const auto value_bytes = static_cast<uint32_t>(2 * pool.value_dim);
    constexpr int kRowsAtOnce = 32 / Shape::kRowPieces;
#pragma unroll
    for (int i = 0; i < kTileRows / kRowsAtOnce; ++i) {
      const int row = i * kRowsAtOnce + lane / Shape::kRowPieces;
      const int from = __shfl_sync(kAllLanes, pool_row, half * kTileRows + row);
      const bool is_there = from >= 0;
      const auto address = static_cast<uint64_t>(static_cast<uint32_t>(from));
      const uint32_t to = ring + TileOffset<Shape::kRowBytes>(row, piece);
      CopyAsync(to, keys + address * key_bytes, is_there && has_key);
      CopyAsync(to + Shape::kTileBytes, values + address * value_bytes, is_there && has_value);
    }
  }
};

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_TILE_LOADER_CUH_
