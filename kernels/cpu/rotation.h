// The fixed random rotation of the ladder's codes: two rounds of (random signs, Walsh-Hadamard
// transform). It spreads the energy of a residual key evenly over its dimensions, which is what
// makes sign codes unbiased (RaBitQ, arXiv 2405.12497).
#ifndef KVSEEK_KERNELS_CPU_ROTATION_H_
#define KVSEEK_KERNELS_CPU_ROTATION_H_

namespace kvseek::kernels {

/// Dimension after padding: the next power of two, at least 64. REQUIRES: 1 <= dim <= 512.
int PaddedDim(int dim);

/// out (count, PaddedDim(dim)) := R in (count, dim). Orthonormal: keeps inner products. The signs
/// are a fixed function of the padded dimension, the same on every machine and in every version. in
/// and out do not overlap.
void Rotate(const float* in, int count, int dim, float* out) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_ROTATION_H_
