// Encodes segments on the GPU that holds them: the ladder's codes (kernels/cpu/ladder_codes.h), the
// very bits that index::Segment::Build makes of the same rows on a CPU.
//
// Who calls: a decoder after prefill, layer by layer, with the tensors (tokens, kv_heads, dim) that
// its attention just used. The codes then stay in device memory for the scan there, or travel to a
// daemon, which need not encode again: a CPU core takes about 0.35 ms a segment, an H200 0.2 ms for
// the 256 segments of 8 heads and 32K tokens (two scan bits, dims 128; four times what copying rows
// and codes takes, since the rotation is bound by instructions).
//
//   cuda::LadderRows rows{.keys = k, .values = v, .heads = kv_heads, .segments = tokens / 1024,
//                         .key_dim = 128, .value_dim = 128, .key_token_stride = kv_heads * 128,
//                         ...};
//   cuda::EncodeLadder(rows, codes, /*scratch=*/memory, stream);
//
// Codes are those of RaBitQ (arXiv 2405.12497) and KIVI (arXiv 2402.02750) as ladder_codes.h has
// them. All pointers are device memory. Calls only enqueue: nothing here waits, allocates or
// copies, so they may be captured in a CUDA graph. Thread-safe. Rows must be finite.
//
// Errors: cudaErrorInvalidValue for an argument outside its limits, or what a launch returned.
#ifndef KVSEEK_KERNELS_CUDA_LADDER_ENCODE_H_
#define KVSEEK_KERNELS_CUDA_LADDER_ENCODE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/ladder_codes.h"
#include "kernels/dtype.h"

namespace kvseek::kernels::cuda {

inline constexpr int kSegmentKeys = 1024;           ///< keys of a segment
inline constexpr int kMaxEncodeHeads = 65535;       ///< heads of one call
inline constexpr int kMaxEncodeSegments = 1 << 20;  ///< segments of a head in one call

/// Keys and values of `segments` * 1024 tokens of `heads` KV heads. Row (head, token) of the keys
/// begins at keys + head * key_head_stride + token * key_token_stride; values likewise. Owns
/// nothing.
struct LadderRows {
  const void* keys = nullptr;    ///< 16-byte aligned
  const void* values = nullptr;  ///< 16-byte aligned
  int heads = 0;                 ///< 0..kMaxEncodeHeads
  int segments = 0;              ///< of each head, 0..kMaxEncodeSegments
  int key_dim = 0;               ///< a multiple of 8, 8..kMaxRowDim (attention.h)
  int value_dim = 0;             ///< a multiple of 8, 8..kMaxRowDim
  DType dtype = DType::kBf16;    ///< bf16 or fp16
  int64_t key_token_stride = 0;  ///< strides are in elements, multiples of 8
  int64_t key_head_stride = 0;
  int64_t value_token_stride = 0;
  int64_t value_head_stride = 0;
  int scan_bits = 2;  ///< bits a dimension of the scan code: 1 or 2
};

/// Where the codes go, each array contiguous and 16-byte aligned, D = PaddedDim(key_dim). What
/// stands at (head, segment) is what a Segment holds under the same name. Owns nothing.
struct LadderCodes {
  float* centres = nullptr;        ///< (heads, segments, key_dim)
  uint8_t* scan_blocks = nullptr;  ///< (heads, segments, 16, ScanBlockBytes(Symbols(D), scan_bits))
  float* scan_noise = nullptr;     ///< (heads, segments)
  uint8_t* fine_records = nullptr;      ///< (heads, segments, 1024, FineRecordBytes(D, value_dim))
  FineFactors* fine_factors = nullptr;  ///< (heads, segments, 1024)
  uint16_t* block_means = nullptr;      ///< (heads, segments, 16, value_dim), bf16
};

/// Bytes of scratch that EncodeLadder needs for these rows, 16-byte aligned.
size_t EncodeLadderScratchBytes(const LadderRows& rows) noexcept;

/// Encodes all segments of all heads. Outputs and scratch must not overlap each other or the rows;
/// scratch is free again when the stream has passed.
cudaError_t EncodeLadder(const LadderRows& rows, const LadderCodes& codes, void* scratch,
                         cudaStream_t stream) noexcept;

}  // namespace kvseek::kernels::cuda

#endif  // KVSEEK_KERNELS_CUDA_LADDER_ENCODE_H_
