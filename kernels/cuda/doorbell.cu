#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/cuda/doorbell.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/publish.h"

namespace kvseek::kernels::cuda {
namespace {

constexpr int kRingThreads = 512;
constexpr int kAwaitThreads = 256;
constexpr int kPiecesAtOnce = 4;      // 16 bytes each, that a thread has in flight
constexpr int kPiecesOfBlock = 4096;  // 64 KiB; more take more blocks
constexpr int kAwaitBlocksMax = 16;
constexpr unsigned kRestNs = 64;

enum Outcome : uint64_t { kAnswered = 1, kMissed = 2 };

// As docs/protocol.md has it.
struct AnswerWords {
  uint64_t number;
  uint64_t daemon_ns;
  uint32_t status;
  uint32_t unused;
};

__device__ uint64_t LoadAcquire(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

__device__ void StoreRelease(uint64_t* to, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(to), "l"(value) : "memory");
}

__device__ uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Memory that the daemon writes, past every cache.
template <typename T>
__device__ T Shared(const T* from) {
  return __ldcv(from);
}

__global__ void __launch_bounds__(kRingThreads)
    RingKernel(DoorbellSlot slot, const uint4* queries, size_t pieces, const DoorbellStep* step,
               int question_pieces) {
  WaitForEarlierWork();
  DoorbellState& state = *slot.state;
  if (step->mode != DoorbellStep::kAsk) {  // the number is used up, and nobody is asked
    if (blockIdx.x == 0 && threadIdx.x == 0) ++state.number;
    return;
  }
  const size_t share = (pieces + gridDim.x - 1) / gridDim.x;
  const size_t begin = min(pieces, blockIdx.x * share);
  const size_t end = min(pieces, begin + share);
  auto* const out = static_cast<uint4*>(slot.queries);
  for (size_t i = begin + threadIdx.x; i < end; i += kRingThreads) out[i] = queries[i];
  if (blockIdx.x == 0) {
    const auto* const question = reinterpret_cast<const uint4*>(step + 1);
    for (int i = static_cast<int>(threadIdx.x); i < question_pieces; i += kRingThreads) {
      static_cast<uint4*>(slot.question)[i] = question[i];
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence_system();
  if (gridDim.x > 1) {  // the last block to arrive rings
    if (atomicAdd(&state.arrived, 1U) + 1 != gridDim.x) return;
    state.arrived = 0;
    __threadfence_system();
  }
  StoreRelease(slot.asked, ++state.number);
}

__device__ Outcome Wait(const uint64_t* answer, uint64_t number, uint64_t patience) {
  const uint64_t begun = Nanoseconds();
  while (LoadAcquire(answer) != number) {
    if (Nanoseconds() - begun >= patience) return kMissed;
    __nanosleep(kRestNs);
  }
  return kAnswered;
}

// Of several blocks the first to know decides for all. Adds up what has been missed, once.
__device__ Outcome Agree(Outcome outcome, uint64_t number, uint64_t mode, DoorbellState& state,
                         DoorbellStep& step, DoorbellFaults& faults) {
  if (gridDim.x > 1) {
    auto* const verdict = reinterpret_cast<unsigned long long*>(&state.verdict);
    const unsigned long long mine = number << 2 | outcome;
    unsigned long long last = *static_cast<volatile unsigned long long*>(verdict);
    for (;;) {
      if (last >> 2 == number) {
        __threadfence_system();
        return static_cast<Outcome>(last & 3);
      }
      __threadfence_system();
      const unsigned long long found = atomicCAS(verdict, last, mine);
      if (found == last) break;
      last = found;
    }
  }
  if (outcome == kMissed && mode != DoorbellStep::kNobody) {
    step.mode = DoorbellStep::kMissed;
    auto& counted = static_cast<volatile DoorbellFaults&>(faults);
    counted.misses = counted.misses + 1;
    if (mode == DoorbellStep::kAsk) counted.waits = counted.waits + 1;
  }
  return outcome;
}

__device__ void StorePiece(const uint4& piece, float* to) {
  const auto* const pairs = reinterpret_cast<const __half2*>(&piece);
  const float2 a = __half22float2(pairs[0]);
  const float2 b = __half22float2(pairs[1]);
  const float2 c = __half22float2(pairs[2]);
  const float2 d = __half22float2(pairs[3]);
  reinterpret_cast<float4*>(to)[0] = make_float4(a.x, a.y, b.x, b.y);
  reinterpret_cast<float4*>(to)[1] = make_float4(c.x, c.y, d.x, d.y);
}

// Each block waits for itself and then brings a share of the heads.
__global__ void __launch_bounds__(kAwaitThreads)
    AwaitKernel(DoorbellSlot slot, DoorbellStep* step, int heads, int value_dim, float* out,
                float* lse, DoorbellFaults* faults) {
  WaitForEarlierWork();
  __shared__ bool there;
  const auto* const answer = static_cast<const AnswerWords*>(slot.answer);
  if (threadIdx.x == 0) {
    const uint64_t number = slot.state->number;
    const uint64_t mode = *static_cast<volatile uint64_t*>(&step->mode);
    const uint64_t patience = mode == DoorbellStep::kAsk ? step->deadline_ns : 0;
    const Outcome mine = Wait(&answer->number, number, patience);
    there = Agree(mine, number, mode, *slot.state, *step, *faults) == kAnswered;
  }
  __syncthreads();
  const int share = (heads + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  const int first = min(heads, static_cast<int>(blockIdx.x) * share);
  const int end = min(heads, first + share);
  const int thread = static_cast<int>(threadIdx.x);
  if (!there) {
    for (int head = first + thread; head < end; head += kAwaitThreads) lse[head] = -INFINITY;
    return;
  }
  // Status, lse and the first pieces are on their way together: one round trip.
  const uint32_t status = Shared(&answer->status);
  const int last_piece = end * (value_dim / 8);
  const auto* const pieces = static_cast<const uint4*>(slot.outs);
  for (int head = first + thread; head < end; head += kAwaitThreads) {
    const float from = Shared(slot.lses + head);
    lse[head] = status == 0 ? from : -INFINITY;
  }
  for (int i = first * (value_dim / 8) + thread; i < last_piece;
       i += kAwaitThreads * kPiecesAtOnce) {
    uint4 some[kPiecesAtOnce];
#pragma unroll
    for (int p = 0; p < kPiecesAtOnce; ++p) {
      const int at = i + p * kAwaitThreads;
      if (at < last_piece) some[p] = Shared(pieces + at);
    }
#pragma unroll
    for (int p = 0; p < kPiecesAtOnce; ++p) {
      const int at = i + p * kAwaitThreads;
      if (at < last_piece) StorePiece(some[p], out + static_cast<size_t>(at) * 8);
    }
  }
  if (status != 0 && blockIdx.x == 0 && thread == 0) {
    auto& counted = static_cast<volatile DoorbellFaults&>(*faults);
    counted.refusals = counted.refusals + 1;
    counted.status = status;
  }
}

bool IsValid(const DoorbellSlot& slot) {
  return slot.asked != nullptr && IsAligned(slot.question) && IsAligned(slot.queries) &&
         IsAligned(slot.answer) && IsAligned(slot.lses) && IsAligned(slot.outs) &&
         slot.state != nullptr;
}

}  // namespace

cudaError_t RingDoorbell(const DoorbellSlot& slot, const void* queries, size_t bytes,
                         const DoorbellStep* step, size_t question_bytes,
                         cudaStream_t stream) noexcept {
  if (!IsValid(slot) || !IsAligned(queries) || !IsAligned(step)) return cudaErrorInvalidValue;
  if (bytes == 0 || bytes % 16 != 0 || question_bytes == 0 || question_bytes % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  return LaunchEarly<RingKernel>(dim3(static_cast<unsigned>(PublishBlocks(bytes))), kRingThreads, 0,
                                 stream, slot, static_cast<const uint4*>(queries), bytes / 16, step,
                                 static_cast<int>(question_bytes / 16));
}

cudaError_t AwaitAnswer(const DoorbellSlot& slot, DoorbellStep* step, int heads, int value_dim,
                        float* out, float* lse, DoorbellFaults* faults,
                        cudaStream_t stream) noexcept {
  if (!IsValid(slot) || !IsAligned(step) || !IsAligned(out) || lse == nullptr ||
      faults == nullptr || heads < 1 || value_dim < 8 || value_dim % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  const int64_t pieces = int64_t{heads} * (value_dim / 8);
  if (pieces > (int64_t{1} << 30)) return cudaErrorInvalidValue;
  const auto blocks = std::min<int64_t>((pieces + kPiecesOfBlock - 1) / kPiecesOfBlock,
                                        std::min(heads, kAwaitBlocksMax));
  return LaunchEarly<AwaitKernel>(dim3(static_cast<unsigned>(blocks)), kAwaitThreads, 0, stream,
                                  slot, step, heads, value_dim, out, lse, faults);
}

}  // namespace kvseek::kernels::cuda
