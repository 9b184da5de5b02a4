#include "kernels/cpu/rotation.h"
#include "kernels/cuda/encode_keys.cuh"
#include "kernels/cuda/encode_values.cuh"
#include "kernels/cuda/ladder_encode.h"
#include "kernels/cuda/launch.h"

namespace kvseek::kernels::cuda {
namespace {

bool IsValid(const LadderRows& rows) {
  const bool has_strides = rows.key_token_stride % 8 == 0 && rows.key_head_stride % 8 == 0 &&
                           rows.value_token_stride % 8 == 0 && rows.value_head_stride % 8 == 0;
  return rows.heads >= 0 && rows.heads <= kMaxEncodeHeads && rows.segments >= 0 &&
         rows.segments <= kMaxEncodeSegments && IsRowDim(rows.key_dim) &&
         IsRowDim(rows.value_dim) && DTypeBytes(rows.dtype) == 2 && has_strides &&
         (rows.scan_bits == 1 || rows.scan_bits == 2);
}

bool HasPointers(const LadderRows& rows, const LadderCodes& codes) {
  return IsAligned(rows.keys) && IsAligned(rows.values) && IsAligned(codes.centres) &&
         IsAligned(codes.scan_blocks) && IsAligned(codes.scan_noise) &&
         IsAligned(codes.fine_records) && IsAligned(codes.fine_factors) &&
         IsAligned(codes.block_means);
}

template <int kDim>
RotationSigns SignsOf() {
  using Share = KeyShare<kDim>;
  RotationSigns signs{};
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < kDim; ++i) {
      const int lane = i % 16 / Share::kRun;
      const int e = i / 16 * Share::kRun + i % Share::kRun;
      if (RotationFlips(kDim, round, i)) signs.flips[round][lane] |= uint64_t{1} << e;
    }
  }
  return signs;
}

dim3 BlockGrid(const LadderRows& rows) {
  return dim3(static_cast<unsigned>(rows.segments * kSegmentBlocks),
              static_cast<unsigned>(rows.heads));
}

template <typename Element, int kDim>
cudaError_t EncodeKeys(const LadderRows& rows, const LadderCodes& codes, float* noise,
                       cudaStream_t stream) {
  const auto kernel =
      rows.scan_bits == 1 ? EncodeKeysKernel<Element, kDim, 1> : EncodeKeysKernel<Element, kDim, 2>;
  static const RotationSigns signs = SignsOf<kDim>();
  return Launch(kernel, BlockGrid(rows), KeyShare<kDim>::kThreads, 0, stream, rows, signs, codes,
                FineRecordBytes(kDim, rows.value_dim), noise);
}

template <typename Element>
cudaError_t Encode(const LadderRows& rows, const LadderCodes& codes, float* noise,
                   cudaStream_t stream) {
  const int padded_dim = PaddedDim(rows.key_dim);
  const dim3 segments(static_cast<unsigned>(rows.segments), static_cast<unsigned>(rows.heads));
  cudaError_t error =
      Launch(CentreKernel<Element>, segments, kEncodeThreads, 0, stream, rows, codes.centres);
  if (error != cudaSuccess) return error;
  error = padded_dim == 64    ? EncodeKeys<Element, 64>(rows, codes, noise, stream)
          : padded_dim == 128 ? EncodeKeys<Element, 128>(rows, codes, noise, stream)
                              : EncodeKeys<Element, 256>(rows, codes, noise, stream);
  if (error != cudaSuccess) return error;
  return Launch(EncodeValuesKernel<Element>, BlockGrid(rows), kEncodeThreads, 0, stream, rows,
                codes, FineRecordBytes(padded_dim, rows.value_dim), FineValueOffset(padded_dim));
}

}  // namespace

size_t EncodeLadderScratchBytes(const LadderRows& rows) noexcept {
  return static_cast<size_t>(rows.heads) * rows.segments * kSegmentKeys * sizeof(float);
}

cudaError_t EncodeLadder(const LadderRows& rows, const LadderCodes& codes, void* scratch,
                         cudaStream_t stream) noexcept {
  if (!IsValid(rows)) return cudaErrorInvalidValue;
  if (rows.heads == 0 || rows.segments == 0) return cudaSuccess;
  if (!HasPointers(rows, codes) || !IsAligned(scratch)) return cudaErrorInvalidValue;
  auto* noise = static_cast<float*>(scratch);
  const cudaError_t error = rows.dtype == DType::kBf16
                                ? Encode<Bf16Element>(rows, codes, noise, stream)
                                : Encode<Fp16Element>(rows, codes, noise, stream);
  if (error != cudaSuccess) return error;
  const size_t segments = static_cast<size_t>(rows.heads) * rows.segments;
  const size_t grid = (segments * kSegmentBlocks + kEncodeThreads - 1) / kEncodeThreads;
  return Launch(MeanNoiseKernel, dim3(static_cast<unsigned>(grid)), kEncodeThreads, 0, stream,
                noise, segments, codes.scan_noise);
}

}  // namespace kvseek::kernels::cuda
