// The fixed random rotation of the ladder's codes: two rounds of (random signs, Walsh-Hadamard
// transform). It spreads the energy of a residual key evenly over its dimensions, which is what
// makes sign codes unbiased (RaBitQ, arXiv 2405.12497).
#ifndef KVSEEK_KERNELS_CPU_ROTATION_H_
#define KVSEEK_KERNELS_CPU_ROTATION_H_

#include <cstdint>

namespace kvseek::kernels {

/// Dimension after padding: the next power of two, at least 64. REQUIRES: 1 <= dim <= 512.
constexpr int PaddedDim(int dim) {
  int padded = 64;
  while (padded < dim) padded *= 2;
  return padded;
}

/// Whether dimension `i` changes its sign in `round` 0 or 1: a fixed hash (the finaliser of
/// SplitMix64), so that codes written once can be read for ever.
constexpr bool RotationFlips(int padded_dim, int round, int i) {
  auto x = (static_cast<uint64_t>(padded_dim) << 32) | static_cast<uint64_t>(round << 16 | i);
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return ((x ^ (x >> 31)) >> 63) != 0;
}

/// out (count, PaddedDim(dim)) := R in (count, dim). Orthonormal: keeps inner products. The result
/// is the same bits on every machine and in every version: each round flips signs, the second one
/// also divides by the padded dimension, and then runs the transform's stages in ascending stride.
/// in and out do not overlap.
void Rotate(const float* in, int count, int dim, float* out) noexcept;

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_ROTATION_H_
