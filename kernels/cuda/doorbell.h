// A stream that asks a daemon and waits for its answer without any thread of its process: both look
// at numbers in memory that they share (docs/protocol.md, section 9).
//
// RingDoorbell writes a layer's queries there and then the question's number; the daemon answers
// under that number; AwaitAndMerge, later in the stream, waits until it is there or a deadline has
// passed, and merges it with what the device has computed meanwhile. All that changes
// from one step to the next stands in device memory, and numbers are counted there: a CUDA graph
// that holds a whole step can be launched again and again.
//
// A layer that misses its deadline goes without, and no later layer of its step asks or waits:
// a step waits once. An answer that comes after all has a number that nobody waits for.
#ifndef KVSEEK_KERNELS_CUDA_DOORBELL_H_
#define KVSEEK_KERNELS_CUDA_DOORBELL_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace kvseek::kernels::cuda {

/// What the kernels of a step know of it. Device memory, which the host writes anew before each
/// step (by a copy in the stream, in the graph or before it), with the question, 16-byte pieces as
/// the protocol has them, right behind.
struct alignas(16) DoorbellStep {
  uint64_t deadline_ns = 0;  ///< how long a layer waits, from AwaitAndMerge's start
  uint64_t mode = kAsk;

  static constexpr uint64_t kAsk = 0;
  static constexpr uint64_t kMissed = 1;  ///< so it becomes with the first layer that misses
  static constexpr uint64_t kNobody = 2;  ///< there is nothing to ask: empty states, and no miss
};

/// Of one slot. Device memory, zero at first, and never again written by the host.
struct DoorbellState {
  uint64_t number = 0;   ///< of the last question
  uint64_t verdict = 0;  ///< what AwaitAndMerge's blocks agreed on
  uint32_t arrived = 0;  ///< blocks of RingDoorbell
  uint32_t unused = 0;
};

/// What went wrong. Pinned host memory; the host reads it when it likes.
struct DoorbellFaults {
  uint64_t misses = 0;  ///< layers without an answer in time, or that did not ask since an earlier
                        ///< one of the step had missed
  uint64_t waits = 0;   ///< of them, those that waited for the whole deadline
  uint64_t refusals = 0;  ///< layers that the daemon answered with an error
  uint64_t status = 0;    ///< the last error's code
};

/// Where a slot's parts are, all 16-byte aligned but `asked`. In memory shared with the daemon that
/// the device can address, unless it says otherwise.
struct DoorbellSlot {
  uint64_t* asked = nullptr;
  void* question = nullptr;
  void* queries = nullptr;
  const void* answer = nullptr;
  const float* lses = nullptr;
  const void* outs = nullptr;
  DoorbellState* state = nullptr;  ///< device memory
};

/// Writes `bytes` of queries (a multiple of 16, 16-byte aligned device memory) and the question of
/// `question_bytes` behind `step`, then the next number. Only enqueues. Errors:
/// cudaErrorInvalidValue, or what the launch returned.
cudaError_t RingDoorbell(const DoorbellSlot& slot, const void* queries, size_t bytes,
                         const DoorbellStep* step, size_t question_bytes,
                         cudaStream_t stream) noexcept;

/// Waits for the answer to the slot's last question, and merges it with one state of the device's:
/// outs (heads, value_dim), 16-byte aligned, lses (heads); the same bits as MergeStates of both.
/// Out (heads, value_dim) in out_dtype, 16-byte aligned. Without an answer that state alone comes
/// out. heads >= 1, value_dim a multiple of 8. Holds one block of the device while it waits, or a
/// few if there are many heads. Only enqueues. Errors as above.
///
/// States travel as fp16, half of the bytes, and are read from the shared memory by the threads
/// that merge them: one trip over the bus from the number to the output, and one kernel.
cudaError_t AwaitAndMerge(const DoorbellSlot& slot, DoorbellStep* step, int heads, int value_dim,
                          const float* local_outs, const float* local_lses, void* out,
                          DType out_dtype, DoorbellFaults* faults, cudaStream_t stream) noexcept;

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_DOORBELL_H_
