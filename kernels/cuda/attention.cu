#include <climits>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/attend_pages.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/merge_states.cuh"

namespace kvseek::kernels::cuda {
namespace {

int Chunks(const PageQueries& queries) {
  return (queries.tokens * queries.group + kChunkRows - 1) / kChunkRows;
}

// No fewer than a group's units of work. The kernel counts those of all groups in 32 bits.
int64_t GroupUnitsMax(const KvPages& pages) { return pages.rows_max() / kMinUnitRows + 1; }

bool IsValid(const KvPages& pages, const PageQueries& queries) {
  const PagePool& pool = pages.pool;
  const bool is_listed = pages.pages != nullptr;
  return pages.sequences >= 0 && pages.pages_max >= 1 && pool.kv_heads >= 1 &&
         int64_t{pages.sequences} * pool.kv_heads <= INT_MAX && pool.page_tokens >= 1 &&
         !(is_listed && (pool.page_tokens & (pool.page_tokens - 1)) != 0) &&
         pages.rows_max() <= kMaxRows && IsRowDim(pool.key_dim) && IsRowDim(pool.value_dim) &&
         DTypeBytes(pool.dtype) == 2 && queries.tokens >= 1 && queries.tokens <= kMaxTokens &&
         queries.group >= 1 && queries.group <= kMaxGroup && std::isfinite(queries.softmax_scale) &&
         GroupUnitsMax(pages) * pages.sequences * pool.kv_heads <= INT_MAX / Chunks(queries);
}

// Of the current device; 0 if there is none.
int Processors() {
  int device = 0;
  int processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 0;
  }
  return processors;
}

constexpr int PieceRow(int value_dim) { return kStateHeader + value_dim; }

// The workspace: arrivals (blocks), then pieces.
size_t ArrivalBytes(int processors) {
  return (static_cast<size_t>(kBlocksPerProcessor) * processors * 4 + 15) / 16 * 16;
}

int ChunkRows(int tokens, int group) {
  return tokens * group < kChunkRows ? tokens * group : kChunkRows;
}

size_t WorkspaceBytes(int processors, int tokens, int group, int value_dim) {
  const size_t rows =
      size_t{2} * kBlocksPerProcessor * processors * static_cast<size_t>(ChunkRows(tokens, group));
  return ArrivalBytes(processors) + rows * PieceRow(value_dim) * sizeof(float);
}

template <typename Out, typename Shape>
cudaError_t LaunchMergeTo(const MergeArguments& arguments, cudaStream_t stream) {
  const int block_heads = Shape::kHeadsAtOnce * (kMergeThreads / arguments.head_threads);
  const dim3 grid(static_cast<unsigned>((arguments.heads - 1) / block_heads + 1));
  return LaunchEarly<MergeStatesKernel<Out, Shape>>(grid, kMergeThreads, 0, stream, arguments);
}

template <typename Shape>
cudaError_t LaunchMerge(const MergeArguments& arguments, DType out_dtype, cudaStream_t stream) {
  switch (out_dtype) {
    case DType::kBf16:
      return LaunchMergeTo<__nv_bfloat16, Shape>(arguments, stream);
    case DType::kFp16:
      return LaunchMergeTo<__half, Shape>(arguments, stream);
    case DType::kFp32:
      break;
  }
  return LaunchMergeTo<float, Shape>(arguments, stream);
}

}  // namespace

size_t AttendWorkspaceBytes(int groups, int tokens, int group, int value_dim) noexcept {
  const int processors = Processors();
  if (processors == 0 || groups < 0 || tokens < 1 || group < 1 || value_dim < 1) return 0;
  return WorkspaceBytes(processors, tokens, group, value_dim);
}

cudaError_t AttendPages(const KvPages& pages, const PageQueries& queries,
                        const AttendWorkspace& workspace, float* out, float* lse,
                        cudaStream_t stream) noexcept {
  if (!IsValid(pages, queries)) return cudaErrorInvalidValue;
  if (pages.sequences == 0) return cudaSuccess;
  const PagePool& pool = pages.pool;
  if (!IsAligned(pool.keys) || !IsAligned(pool.values) || !IsAligned(queries.queries) ||
      pages.counts == nullptr || !IsAligned(workspace.data) || !IsAligned(out) || lse == nullptr) {
    return cudaErrorInvalidValue;
  }
  const int processors = Processors();
  if (processors == 0) return cudaErrorNoDevice;
  if (workspace.bytes < WorkspaceBytes(processors, queries.tokens, queries.group, pool.value_dim)) {
    return cudaErrorInvalidValue;
  }
  AttendArguments arguments{};
  arguments.pages = pages;
  arguments.queries = queries;
  arguments.chunks = Chunks(queries);
  arguments.chunk_rows = ChunkRows(queries.tokens, queries.group);
  while ((1 << arguments.page_shift) < pool.page_tokens) ++arguments.page_shift;
  arguments.arrivals = static_cast<uint32_t*>(workspace.data);
  arguments.pieces = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace.data) +
                                              ArrivalBytes(processors));
  arguments.piece_row = PieceRow(pool.value_dim);
  arguments.rows_max = static_cast<int>(pages.rows_max());
  arguments.out = out;
  arguments.lse = lse;
  return pool.dtype == DType::kBf16 ? LaunchAttendPagesBf16(arguments, processors, stream)
                                    : LaunchAttendPagesFp16(arguments, processors, stream);
}

cudaError_t MergeStates(const StateList* lists, int list_count, int heads, int value_dim, void* out,
                        DType out_dtype, float* lse, cudaStream_t stream) noexcept {
  if (list_count < 0 || list_count > kMaxStateLists || (list_count > 0 && lists == nullptr) ||
      heads < 0 || value_dim < 8 || value_dim > kMaxValueDim || value_dim % 8 != 0 ||
      DTypeBytes(out_dtype) == 0) {
    return cudaErrorInvalidValue;
  }
  MergeArguments arguments{};
  for (int i = 0; i < list_count; ++i) {
    const StateList& list = lists[i];
    if (list.count < 0 || list.count > INT_MAX - ManyStates::kStatesAtOnce - arguments.count) {
      return cudaErrorInvalidValue;
    }
    if (heads > 0 && list.count > 0 && (!IsAligned(list.outs) || list.lses == nullptr)) {
      return cudaErrorInvalidValue;
    }
    arguments.lists[i] = list;
    arguments.count += list.count;
  }
  if (heads == 0) return cudaSuccess;
  if (!IsAligned(out)) return cudaErrorInvalidValue;
  arguments.heads = heads;
  arguments.value_dim = value_dim;
  arguments.head_threads = value_dim / 4 < kMergeThreads ? value_dim / 4 : kMergeThreads;
  arguments.out = out;
  arguments.lse = lse;
  return arguments.count <= FewStates::kStatesAtOnce
             ? LaunchMerge<FewStates>(arguments, out_dtype, stream)
             : LaunchMerge<ManyStates>(arguments, out_dtype, stream);
}

}  // namespace kvseek::kernels::cuda
