// What prefill can tell about the queries of a layer while they are still at hand: decode queries
// are far from the keys' distribution, so indexes and codes are trained on a sample of prefill
// queries.
//
// Who calls: the decoder, after a layer's prefill, with the layer's queries and keys in device
// memory.
//
//   AccumulateSecondMoments  what trained codes whiten keys with: the head's sum of q q^T
//   NearestKeys              the exact top k keys of each sampled query: what a graph of keys is
//                            linked by (RetrievalAttention, arXiv 2409.10516), and a measure of
//                            any index
//   MeasureFarMass           how much of its softmax mass a head spends beyond sink and recent
//                            window: a head that spends nearly none is a streaming head and needs
//                            no index (DuoAttention, arXiv 2410.10819; RazorAttention, arXiv
//                            2407.15891)
//
// All pointers but the sample itself are device memory. Inner products are cuBLAS matrix products
// with fp32 sums. Calls only enqueue: nothing here waits, allocates or copies to the host. A cuBLAS
// handle is in host pointer mode and belongs to one thread at a time; its stream is `stream`
// afterwards. Queries and keys must be finite.
//
// Errors: cudaErrorInvalidValue for an argument outside its limits, cudaErrorUnknown where cuBLAS
// refuses, or what a launch returned.
#ifndef KVSEEK_KERNELS_CUDA_QUERY_STATISTICS_H_
#define KVSEEK_KERNELS_CUDA_QUERY_STATISTICS_H_

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace kvseek::kernels::cuda {

inline constexpr int kMaxNearest = 1024;          ///< keys of a query in NearestKeys
inline constexpr int kMaxSampleGroup = 64;        ///< query heads that share a KV head
inline constexpr int kMaxSampleHeads = 65535;     ///< KV heads of a layer
inline constexpr int kMaxSampleSize = 1 << 24;    ///< sampled query tokens
inline constexpr int kMaxSampleTokens = 1 << 30;  ///< keys of a head

/// Sampled query tokens of one layer and the keys of its KV heads. Query head h * group + g belongs
/// to KV head h. Owns nothing.
struct QuerySample {
  /// Row (token, query head) begins at queries + token * query_token_stride + head * dim, so every
  /// s-th token of a prefill tensor is a sample; 16-byte aligned.
  const void* queries = nullptr;
  /// Row (KV head, token) begins at keys + head * key_head_stride + token * key_token_stride;
  /// 16-byte aligned. AccumulateSecondMoments does not look at keys, tokens or limits.
  const void* keys = nullptr;
  /// (count): query token i sees the keys before limits[i] (its position + 1 where attention is
  /// causal), clamped to 0..tokens; nullptr: all keys.
  const int32_t* limits = nullptr;
  int count = 0;               ///< sampled query tokens, 0..kMaxSampleSize
  int tokens = 0;              ///< keys of each head, 0..kMaxSampleTokens
  int kv_heads = 0;            ///< 0..kMaxSampleHeads
  int group = 0;               ///< 1..kMaxSampleGroup
  int dim = 0;                 ///< a multiple of 8, 8..kMaxRowDim (attention.h)
  DType dtype = DType::kBf16;  ///< of queries and keys: bf16 or fp16
  /// Strides are in elements, multiples of 8; those of tokens are dim..2^31 - 1.
  int64_t query_token_stride = 0;
  int64_t key_token_stride = 0;
  int64_t key_head_stride = 0;
};

/// moments (kv_heads, dim, dim) fp32 += sum of q q^T over the sample's tokens and the heads of each
/// group. The caller clears it before the first call.
cudaError_t AccumulateSecondMoments(const QuerySample& sample, cublasHandle_t handle,
                                    float* moments, cudaStream_t stream) noexcept;

/// Bytes of scratch that NearestKeys needs, about 25 MB at most.
size_t NearestKeysScratchBytes(const QuerySample& sample, int k) noexcept;

/// The k keys with the largest <q, k> for each query: positions (count, kv_heads * group, k), best
/// first, equal scores by ascending position, -1 where there are fewer keys; scores, of the same
/// shape, fp32, may be nullptr. k is 1..kMaxNearest. Exact up to the rounding of fp32 sums.
cudaError_t NearestKeys(const QuerySample& sample, int k, cublasHandle_t handle, void* scratch,
                        int32_t* positions, float* scores, cudaStream_t stream) noexcept;

/// The steady zone of a decoder, and the scale of its softmax.
struct SteadyZone {
  int sink = 0;                ///< first tokens, >= 0
  int recent = 0;              ///< last tokens before a query's limit, >= 0
  float softmax_scale = 0.0F;  ///< scores are softmax_scale * <q, k>; finite
};

/// Bytes of scratch that MeasureFarMass needs, about 17 MB at most.
size_t FarMassScratchBytes(const QuerySample& sample) noexcept;

/// The share of each query's softmax mass that lies outside sink and recent window: shares (count,
/// kv_heads * group), 0 for a query that sees no key; means (kv_heads) over the sample and the
/// heads of the group, 0 for an empty sample.
cudaError_t MeasureFarMass(const QuerySample& sample, const SteadyZone& zone, cublasHandle_t handle,
                           void* scratch, float* shares, float* means,
                           cudaStream_t stream) noexcept;

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_QUERY_STATISTICS_H_
