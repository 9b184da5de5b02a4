#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/cuda/doorbell.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/merge_states.cuh"
#include "kernels/cuda/publish.h"

namespace kvseek::kernels::cuda {
namespace {

constexpr int kRingThreads = 512;
constexpr int kAwaitThreads = 512;
constexpr int kPiecesAtOnce = 2;  // of eight elements, that a thread has in flight
constexpr int kPiecesOfBlock = kAwaitThreads * kPiecesAtOnce;  // more take more blocks
constexpr int kAwaitBlocksMax = 16;
constexpr int64_t kPiecesMax = int64_t{1} << 30;

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

// After a fence.
__device__ void StoreRelaxed(uint64_t* to, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" : : "l"(to), "l"(value) : "memory");
}

__device__ uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__global__ void __launch_bounds__(kRingThreads)
    RingKernel(DoorbellSlot slot, const uint4* queries, size_t pieces, const DoorbellStep* step,
               int question_pieces) {
  DoorbellState& state = *slot.state;
  const size_t share = (pieces + gridDim.x - 1) / gridDim.x;
  const size_t begin = min(pieces, blockIdx.x * share) + threadIdx.x;
  const size_t end = min(pieces, blockIdx.x * share + share);
  // On their way while the mode is.
  const uint4 first = begin < end ? queries[begin] : uint4{};
  const uint64_t last = *static_cast<const volatile uint64_t*>(&state.number);
  if (step->mode != DoorbellStep::kAsk) {  // the number is used up, and nobody is asked
    if (blockIdx.x == 0 && threadIdx.x == 0) state.number = last + 1;
    return;
  }
  auto* const out = static_cast<uint4*>(slot.queries);
  if (begin < end) out[begin] = first;
  for (size_t i = begin + kRingThreads; i < end; i += kRingThreads) out[i] = queries[i];
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
  StoreRelaxed(slot.asked, last + 1);
  state.number = last + 1;
}

__device__ Outcome Wait(const uint64_t* answer, uint64_t number, uint64_t patience) {
  const uint64_t begun = Nanoseconds();
  while (LoadAcquire(answer) != number) {
    if (Nanoseconds() - begun >= patience) return kMissed;
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

__device__ void Widen(const uint4& halves, float4 (&quads)[2]) {
  const auto* const pairs = reinterpret_cast<const __half2*>(&halves);
  const float2 a = __half22float2(pairs[0]);
  const float2 b = __half22float2(pairs[1]);
  const float2 c = __half22float2(pairs[2]);
  const float2 d = __half22float2(pairs[3]);
  quads[0] = make_float4(a.x, a.y, b.x, b.y);
  quads[1] = make_float4(c.x, c.y, d.x, d.y);
}

struct AwaitArguments {
  DoorbellSlot slot;
  DoorbellStep* step;
  int heads;
  int value_dim;
  const float* local_outs;
  const float* local_lses;
  void* out;
  DoorbellFaults* faults;
};

// What a thread has of eight elements of a head.
struct Piece {
  uint4 far;
  float far_lse;
  float local_lse;
  float4 local[2];
};

// As MergeStatesKernel merges two states.
template <typename Out>
__device__ void MergePiece(const Piece& piece, bool is_far, Out* out) {
  float4 far[2];
  Widen(piece.far, far);
  const float lses[2] = {piece.local_lse, is_far ? piece.far_lse : -INFINITY};
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const float4 quads[2] = {piece.local[q], far[q]};
    MergedHead head;
    head.Add(lses, quads);
    const float factor = head.sum > 0.0F ? 1.0F / head.sum : 0.0F;
    StoreQuad(out + 4 * q, make_float4(head.acc.x * factor, head.acc.y * factor,
                                       head.acc.z * factor, head.acc.w * factor));
  }
}

// Each block waits for itself and then merges a share of the pieces.
template <typename Out>
__global__ void __launch_bounds__(kAwaitThreads)
    AwaitKernel(const __grid_constant__ AwaitArguments arguments) {
  WaitForEarlierWork();
  __shared__ bool there;
  const DoorbellSlot& slot = arguments.slot;
  const auto* const answer = static_cast<const AnswerWords*>(slot.answer);
  if (threadIdx.x == 0) {
    DoorbellStep& step = *arguments.step;
    const uint64_t number = slot.state->number;
    const uint64_t mode = *static_cast<volatile uint64_t*>(&step.mode);
    const uint64_t patience = mode == DoorbellStep::kAsk ? step.deadline_ns : 0;
    const Outcome mine = Wait(&answer->number, number, patience);
    there = Agree(mine, number, mode, *slot.state, step, *arguments.faults) == kAnswered;
  }
  __syncthreads();
  const int of_head = arguments.value_dim / 8;
  const int pieces = arguments.heads * of_head;
  const auto* const far = static_cast<const uint4*>(slot.outs);
  const int stride = static_cast<int>(gridDim.x) * kAwaitThreads;
  const int first = static_cast<int>(blockIdx.x) * kAwaitThreads + static_cast<int>(threadIdx.x);
  // Status, lse and the first pieces are on their way together: one trip. Plain loads: the number
  // was acquired, and loads past all caches would be a transaction on the bus for each 32 bytes.
  const uint32_t status = there ? answer->status : 1;
  for (int i = first; i < pieces; i += stride * kPiecesAtOnce) {
    Piece some[kPiecesAtOnce];
#pragma unroll
    for (int p = 0; p < kPiecesAtOnce; ++p) {
      const int at = i + p * stride;
      if (at >= pieces) break;
      if (there) {
        some[p].far = far[at];
        some[p].far_lse = slot.lses[at / of_head];
      }
      some[p].local_lse = arguments.local_lses[at / of_head];
      const auto* const local =
          reinterpret_cast<const float4*>(arguments.local_outs) + static_cast<size_t>(at) * 2;
      some[p].local[0] = local[0];
      some[p].local[1] = local[1];
    }
#pragma unroll
    for (int p = 0; p < kPiecesAtOnce; ++p) {
      const int at = i + p * stride;
      if (at >= pieces) break;
      MergePiece(some[p], status == 0,
                 static_cast<Out*>(arguments.out) + static_cast<size_t>(at) * 8);
    }
  }
  if (there && status != 0 && first == 0) {
    auto& counted = static_cast<volatile DoorbellFaults&>(*arguments.faults);
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
  return Launch(RingKernel, dim3(static_cast<unsigned>(PublishBlocks(bytes))), kRingThreads, 0,
                stream, slot, static_cast<const uint4*>(queries), bytes / 16, step,
                static_cast<int>(question_bytes / 16));
}

cudaError_t AwaitAndMerge(const DoorbellSlot& slot, DoorbellStep* step, int heads, int value_dim,
                          const float* local_outs, const float* local_lses, void* out,
                          DType out_dtype, DoorbellFaults* faults, cudaStream_t stream) noexcept {
  if (!IsValid(slot) || !IsAligned(step) || !IsAligned(local_outs) || local_lses == nullptr ||
      !IsAligned(out) || faults == nullptr || heads < 1 || value_dim < 8 || value_dim % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  const int64_t pieces = int64_t{heads} * (value_dim / 8);
  if (pieces > kPiecesMax) return cudaErrorInvalidValue;
  const auto blocks = dim3(static_cast<unsigned>(
      std::min<int64_t>((pieces + kPiecesOfBlock - 1) / kPiecesOfBlock, kAwaitBlocksMax)));
  const AwaitArguments arguments{slot, step, heads, value_dim, local_outs, local_lses, out, faults};
  switch (out_dtype) {
    case DType::kBf16:
      return LaunchEarly<AwaitKernel<__nv_bfloat16>>(blocks, kAwaitThreads, 0, stream, arguments);
    case DType::kFp16:
      return LaunchEarly<AwaitKernel<__half>>(blocks, kAwaitThreads, 0, stream, arguments);
    case DType::kFp32:
      return LaunchEarly<AwaitKernel<float>>(blocks, kAwaitThreads, 0, stream, arguments);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kvseek::kernels::cuda
