// How the blocks of attend_pages.cuh share the work (stream-K).
//
// A group's rows are cut into units of kUnitRows. Units are numbered through all groups, in the
// order of sequences, KV heads and chunks; every block takes an equal run of them.
#ifndef KVSEEK_KERNELS_CUDA_WORK_SHARE_CUH_
#define KVSEEK_KERNELS_CUDA_WORK_SHARE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/attend_pages.h"

namespace kvseek::kernels::cuda {

inline constexpr int kMinBlockRows = 128;  // fewer cost more in merging than they gain

// Units of all groups, dealt out to blocks. Block b begins at unit b x total / blocks, rounded
// down: where groups are equal and their number goes with that of blocks, blocks begin and end as
// groups do.
struct WorkShare {
  int total = 0;
  int blocks = 1;
  int share = 0;      // total / blocks
  int remainder = 0;  // total % blocks
  int begin = 0;      // this block's
  int end = 0;
  int sequence = 0;        // that of `begin`
  int sequence_begin = 0;  // its first unit

  __device__ int BlockBegin(int block) const { return block * share + block * remainder / blocks; }
  __device__ int BlockOf(int unit) const {
    const int guess = static_cast<int>((static_cast<float>(unit) + 0.5F) *
                                       __fdividef(static_cast<float>(blocks), total));
    const int block = BlockBegin(guess) > unit ? guess - 1 : guess;
    return BlockBegin(block + 1) <= unit ? block + 1 : block;
  }
};

__device__ inline int RowCount(const AttendArguments& arguments, int sequence) {
  return max(0, min(arguments.pages.counts[sequence], arguments.rows_max));
}

// Called by all threads of a warp; every warp finds the same.
template <int kUnitRows>
__device__ WorkShare FindShare(const AttendArguments& arguments) {
  const int sequences = arguments.pages.sequences;
  const int groups = arguments.pages.pool.kv_heads * arguments.chunks;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int lane_sequences = (sequences - 1) / 32 + 1;
  const int first = min(lane * lane_sequences, sequences);
  const int last = min(first + lane_sequences, sequences);
  const auto units_of = [&](int sequence) {
    return (RowCount(arguments, sequence) + kUnitRows - 1) / kUnitRows * groups;
  };
  int units = 0;
#pragma unroll 4
  for (int sequence = first; sequence < last; ++sequence) units += units_of(sequence);
  int after = units;  // units up to the lane's last sequence
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffU, after, distance);
    if (lane >= distance) after += other;
  }

  WorkShare work;
  work.total = __shfl_sync(0xffffffffU, after, 31);
  constexpr int kMinUnits = (kMinBlockRows - 1) / kUnitRows + 1;
  work.blocks = max(1, min(static_cast<int>(gridDim.x), work.total / kMinUnits));
  const int block = static_cast<int>(blockIdx.x);
  if (block >= work.blocks) return work;
  work.share = work.total / work.blocks;
  work.remainder = work.total % work.blocks;
  work.begin = work.BlockBegin(block);
  work.end = work.BlockBegin(block + 1);
  int before = after - units;
  const bool is_here = before <= work.begin && work.begin < after;
  int sequence = first;
  if (is_here) {
    for (int next = units_of(sequence); before + next <= work.begin;) {
      before += next;
      next = units_of(++sequence);
    }
  }
  const int owner = max(0, __ffs(static_cast<int>(__ballot_sync(0xffffffffU, is_here))) - 1);
  work.sequence = __shfl_sync(0xffffffffU, sequence, owner);
  work.sequence_begin = __shfl_sync(0xffffffffU, before, owner);
  return work;
}

// A place in a block's run of units.
template <int kUnitRows>
struct UnitCursor {
  int sequence;
  int head;
  int chunk;
  int count;  // rows of the sequence
  int unit;   // of the group
  int units;  // that the group has
  int next_count;

  __device__ void Start(const AttendArguments& arguments, const WorkShare& work) {
    sequence = work.sequence;
    head = chunk = unit = 0;
    SetCount(RowCount(arguments, sequence));
    next_count = NextCount(arguments);
    if (units == 0) return;  // there are none in all
    const int group = (work.begin - work.sequence_begin) / units;
    unit = (work.begin - work.sequence_begin) % units;
    head = group / arguments.chunks;
    chunk = group % arguments.chunks;
  }

  __device__ void Advance(const AttendArguments& arguments) {
    if (++unit < units) return;
    NextGroup(arguments);
  }

  __device__ void NextGroup(const AttendArguments& arguments) {
    unit = 0;
    if (++chunk < arguments.chunks) return;
    chunk = 0;
    if (++head < arguments.pages.pool.kv_heads) return;
    head = 0;
    do {
      ++sequence;
      SetCount(next_count);
      next_count = NextCount(arguments);
    } while (count == 0 && sequence < arguments.pages.sequences - 1);
  }

 private:
  __device__ void SetCount(int rows) {
    count = rows;
    units = (rows + kUnitRows - 1) / kUnitRows;
  }
  __device__ int NextCount(const AttendArguments& arguments) const {
    return sequence + 1 < arguments.pages.sequences ? RowCount(arguments, sequence + 1) : 0;
  }
};

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_WORK_SHARE_CUH_
