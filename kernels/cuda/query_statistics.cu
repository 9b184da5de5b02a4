#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cuda/far_mass.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/nearest_keys.cuh"
#include "kernels/cuda/query_statistics.h"
#include "kernels/cuda/score_block.cuh"

namespace kvseek::kernels::cuda {
namespace {

bool IsTokenStride(int64_t stride, int dim) {
  return stride >= dim && stride <= std::numeric_limits<int>::max() && stride % 8 == 0;
}

bool HasQueries(const QuerySample& sample) {
  return sample.count >= 0 && sample.count <= kMaxSampleSize && sample.kv_heads >= 0 &&
         sample.kv_heads <= kMaxSampleHeads && sample.group >= 1 &&
         sample.group <= kMaxSampleGroup && IsRowDim(sample.dim) && DTypeBytes(sample.dtype) == 2 &&
         IsTokenStride(sample.query_token_stride, sample.dim) &&
         (sample.count == 0 || sample.kv_heads == 0 || IsAligned(sample.queries));
}

bool HasKeys(const QuerySample& sample) {
  return sample.tokens >= 0 && sample.tokens <= kMaxSampleTokens &&
         IsTokenStride(sample.key_token_stride, sample.dim) && sample.key_head_stride % 8 == 0 &&
         (sample.tokens == 0 || IsAligned(sample.keys));
}

cudaError_t FromCublas(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorUnknown;
}

cudaDataType_t CublasType(DType dtype) { return dtype == DType::kBf16 ? CUDA_R_16BF : CUDA_R_16F; }

/// The first of a group's queries of token `token`.
const uint16_t* GroupQueries(const QuerySample& sample, int token, int kv_head) {
  return static_cast<const uint16_t*>(sample.queries) + token * sample.query_token_stride +
         static_cast<int64_t>(kv_head) * sample.group * sample.dim;
}

/// Query tokens of a block of scores.
int BlockQueries(const QuerySample& sample) {
  return std::min(sample.count, std::max(1, kScoreRows / sample.group));
}

size_t BlockRows(const QuerySample& sample) {
  return static_cast<size_t>(BlockQueries(sample)) * static_cast<size_t>(sample.group);
}

size_t ScoreBytes(const QuerySample& sample) {
  return BlockRows(sample) * kKeyBlock * sizeof(float);
}

/// scores := the inner products of the block's queries and keys, row-major (group, queries,
/// kKeyBlock).
cudaError_t ComputeScores(const QuerySample& sample, int kv_head, const ScoreBlock& block,
                          cublasHandle_t handle, float* scores) {
  if (block.keys == 0) return cudaSuccess;
  const uint16_t* keys = static_cast<const uint16_t*>(sample.keys) +
                         kv_head * sample.key_head_stride +
                         block.first_key * sample.key_token_stride;
  const cudaDataType_t type = CublasType(sample.dtype);
  const float one = 1.0F;
  const float zero = 0.0F;
  return FromCublas(cublasGemmStridedBatchedEx(
      handle, CUBLAS_OP_T, CUBLAS_OP_N, block.keys, block.queries, sample.dim, &one, keys, type,
      static_cast<int>(sample.key_token_stride), 0,
      GroupQueries(sample, block.first_query, kv_head), type,
      static_cast<int>(sample.query_token_stride), sample.dim, &zero, scores, CUDA_R_32F, kKeyBlock,
      int64_t{kKeyBlock} * block.queries, sample.group, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

/// Calls add(block, rows) for each block of scores of each block of queries, keys ascending and at
/// least once, and finish(block, rows) behind the last of them.
template <typename Add, typename Finish>
cudaError_t ForScores(const QuerySample& sample, cublasHandle_t handle, float* scores,
                      cudaStream_t stream, const Add& add, const Finish& finish) {
  cudaError_t error = FromCublas(cublasSetStream(handle, stream));
  ScoreBlock block{};
  block.scores = scores;
  block.limits = sample.limits;
  block.tokens = sample.tokens;
  block.heads = sample.kv_heads * sample.group;
  for (int h = 0; h < sample.kv_heads; ++h) {
    block.first_head = h * sample.group;
    for (int q = 0; q < sample.count; q += block.queries) {
      block.first_query = q;
      block.queries = std::min(BlockQueries(sample), sample.count - q);
      const int rows = block.queries * sample.group;
      block.first_key = 0;
      do {
        block.keys = std::min(kKeyBlock, sample.tokens - block.first_key);
        if (error == cudaSuccess) error = ComputeScores(sample, h, block, handle, scores);
        if (error == cudaSuccess) error = add(block, rows);
        block.first_key += kKeyBlock;
      } while (block.first_key < sample.tokens);
      if (error == cudaSuccess) error = finish(block, rows);
      if (error != cudaSuccess) return error;
    }
  }
  return error;
}

}  // namespace

cudaError_t AccumulateSecondMoments(const QuerySample& sample, cublasHandle_t handle,
                                    float* moments, cudaStream_t stream) noexcept {
  if (!HasQueries(sample) || handle == nullptr || !IsAligned(moments)) return cudaErrorInvalidValue;
  if (sample.count == 0 || sample.kv_heads == 0) return cudaSuccess;
  const cudaDataType_t type = CublasType(sample.dtype);
  const int token_stride = static_cast<int>(sample.query_token_stride);
  const int64_t head_stride = int64_t{sample.group} * sample.dim;
  const float one = 1.0F;
  cudaError_t error = FromCublas(cublasSetStream(handle, stream));
  for (int g = 0; g < sample.group && error == cudaSuccess; ++g) {
    const uint16_t* queries = GroupQueries(sample, 0, 0) + g * sample.dim;
    error = FromCublas(cublasGemmStridedBatchedEx(
        handle, CUBLAS_OP_N, CUBLAS_OP_T, sample.dim, sample.dim, sample.count, &one, queries, type,
        token_stride, head_stride, queries, type, token_stride, head_stride, &one, moments,
        CUDA_R_32F, sample.dim, int64_t{sample.dim} * sample.dim, sample.kv_heads,
        CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }
  return error;
}

size_t NearestKeysScratchBytes(const QuerySample& sample, int k) noexcept {
  return ScoreBytes(sample) + BlockRows(sample) * (static_cast<size_t>(k) + 1) * sizeof(uint64_t);
}

cudaError_t NearestKeys(const QuerySample& sample, int k, cublasHandle_t handle, void* scratch,
                        int32_t* positions, float* scores, cudaStream_t stream) noexcept {
  if (!HasQueries(sample) || !HasKeys(sample) || k < 1 || k > kMaxNearest || handle == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (sample.count == 0 || sample.kv_heads == 0) return cudaSuccess;
  if (!IsAligned(scratch) || positions == nullptr) return cudaErrorInvalidValue;
  auto* block_scores = static_cast<float*>(scratch);
  auto* best = reinterpret_cast<uint64_t*>(static_cast<char*>(scratch) + ScoreBytes(sample));
  const NearestSoFar state{best, best + BlockRows(sample) * static_cast<size_t>(k), k};
  return ForScores(
      sample, handle, block_scores, stream,
      [&](const ScoreBlock& block, int rows) {
        return Launch(MergeNearestKernel, dim3(static_cast<unsigned>(rows)), kScoreThreads, 0,
                      stream, block, state);
      },
      [&](const ScoreBlock& block, int rows) {
        return Launch(WriteNearestKernel, dim3(static_cast<unsigned>(rows)), kScoreThreads, 0,
                      stream, block, state, positions, scores);
      });
}

size_t FarMassScratchBytes(const QuerySample& sample) noexcept {
  return ScoreBytes(sample) + BlockRows(sample) * sizeof(MassState);
}

cudaError_t MeasureFarMass(const QuerySample& sample, const SteadyZone& zone, cublasHandle_t handle,
                           void* scratch, float* shares, float* means,
                           cudaStream_t stream) noexcept {
  if (!HasQueries(sample) || !HasKeys(sample) || zone.sink < 0 || zone.recent < 0 ||
      !std::isfinite(zone.softmax_scale) || handle == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (sample.kv_heads == 0) return cudaSuccess;
  const bool has_output = sample.count == 0 || (IsAligned(scratch) && shares != nullptr);
  if (!has_output || means == nullptr) return cudaErrorInvalidValue;
  auto* block_scores = static_cast<float*>(scratch);
  auto* states = reinterpret_cast<MassState*>(static_cast<char*>(scratch) + ScoreBytes(sample));
  const cudaError_t error = ForScores(
      sample, handle, block_scores, stream,
      [&](const ScoreBlock& block, int rows) {
        return Launch(AddMassKernel, dim3(static_cast<unsigned>(rows)), kScoreThreads, 0, stream,
                      block, zone, states);
      },
      [&](const ScoreBlock& block, int rows) {
        const int grid = (rows + kScoreThreads - 1) / kScoreThreads;
        return Launch(WriteSharesKernel, dim3(static_cast<unsigned>(grid)), kScoreThreads, 0,
                      stream, block, rows, states, shares);
      });
  if (error != cudaSuccess) return error;
  return Launch(MeanSharesKernel, dim3(static_cast<unsigned>(sample.kv_heads)), kScoreThreads, 0,
                stream, shares, sample.count, sample.group, means);
}

}  // namespace kvseek::kernels::cuda
