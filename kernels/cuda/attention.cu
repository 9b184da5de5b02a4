#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/gathered_attention.cuh"
#include "kernels/cuda/merge_states.cuh"

namespace kvseek::kernels::cuda {
namespace {

bool IsRowDim(int dim) { return dim >= 8 && dim <= kMaxRowDim && dim % 8 == 0; }

bool IsAligned(const void* pointer) {
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool IsValid(const GatheredRows& rows) {
  return rows.groups >= 0 && rows.group >= 1 && rows.group <= kMaxGroup && rows.rows_max >= 0 &&
         rows.rows_max <= kMaxRows && IsRowDim(rows.key_dim) && IsRowDim(rows.value_dim) &&
         DTypeBytes(rows.query_dtype) != 0 && DTypeBytes(rows.row_dtype) == 2 &&
         std::isfinite(rows.softmax_scale) && rows.splits >= 1 && rows.splits <= kMaxSplits;
}

bool HasPointers(const GatheredRows& rows) {
  return IsAligned(rows.queries) && rows.row_counts != nullptr &&
         (rows.rows_max == 0 || (IsAligned(rows.keys) && IsAligned(rows.values)));
}

template <typename Kernel, typename... Arguments>
cudaError_t Launch(Kernel kernel, dim3 grid, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename Rows, int kLanes, int kQueries>
cudaError_t LaunchAttention(const GatheredRows& rows, float* out, float* lse, cudaStream_t stream) {
  const int chunks = (rows.group + kQueries - 1) / kQueries;
  const dim3 grid(static_cast<unsigned>(rows.groups), static_cast<unsigned>(chunks),
                  static_cast<unsigned>(rows.splits));
  return Launch(GatheredAttentionKernel<Rows, kLanes, kQueries>, grid, kBlockThreads, stream, rows,
                out, lse);
}

template <typename Rows, int kLanes>
cudaError_t ChooseQueries(const GatheredRows& rows, float* out, float* lse, cudaStream_t stream) {
  return rows.group == 1 ? LaunchAttention<Rows, kLanes, 1>(rows, out, lse, stream)
                         : LaunchAttention<Rows, kLanes, 4>(rows, out, lse, stream);
}

template <typename Rows>
cudaError_t ChooseLanes(const GatheredRows& rows, float* out, float* lse, cudaStream_t stream) {
  const int dim = rows.key_dim > rows.value_dim ? rows.key_dim : rows.value_dim;
  if (dim <= 64) return ChooseQueries<Rows, 8>(rows, out, lse, stream);
  if (dim <= 128) return ChooseQueries<Rows, 16>(rows, out, lse, stream);
  return ChooseQueries<Rows, 32>(rows, out, lse, stream);
}

}  // namespace

cudaError_t AttendGatheredRows(const GatheredRows& rows, float* out, float* lse,
                               cudaStream_t stream) noexcept {
  if (!IsValid(rows)) return cudaErrorInvalidValue;
  if (rows.groups == 0) return cudaSuccess;
  if (!HasPointers(rows) || out == nullptr || lse == nullptr) return cudaErrorInvalidValue;
  return rows.row_dtype == DType::kBf16 ? ChooseLanes<Bf16Rows>(rows, out, lse, stream)
                                        : ChooseLanes<Fp16Rows>(rows, out, lse, stream);
}

cudaError_t MergeStates(const float* outs, const float* lses, int count, int heads, int value_dim,
                        float* out, float* lse, cudaStream_t stream) noexcept {
  if (count < 0 || heads < 0 || value_dim < 4 || value_dim > kMaxValueDim || value_dim % 4 != 0) {
    return cudaErrorInvalidValue;
  }
  if (heads == 0) return cudaSuccess;
  if (count > 0 && (!IsAligned(outs) || lses == nullptr)) return cudaErrorInvalidValue;
  if (!IsAligned(out) || lse == nullptr) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>((heads - 1) / kMergeHeads + 1));
  return Launch(MergeStatesKernel, grid, kMergeThreads, stream, outs, lses, count, heads, value_dim,
                out, lse);
}

}  // namespace kvseek::kernels::cuda
