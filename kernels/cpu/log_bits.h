// Weights made of 16-bit logarithms (Schraudolph, Neural Computation 11, 1999): a number of bf16,
// its bits taken for an integer, is linear in the logarithm between powers of two, and the integer
// read as bf16 is the exponential, up to 6 % too large.
#ifndef KVSEEK_KERNELS_CPU_LOG_BITS_H_
#define KVSEEK_KERNELS_CPU_LOG_BITS_H_

namespace kvseek::kernels {

inline constexpr int kLogBinade = 128;                      ///< for a factor of two
inline constexpr float kLogNat = kLogBinade * 1.44269504F;  ///< for a factor of e
inline constexpr int kLogOne = 127 * kLogBinade;            ///< the bits of 1
inline constexpr float kLogExcess = 7.36F;  ///< too large by so much, on average over a mantissa
/// 2^-100; weights are no smaller, unless they are zero. What is made of them must not become
/// subnormal, which Intel's cores take a hundred cycles for.
inline constexpr int kLogLeast = kLogOne - 100 * kLogBinade;
inline constexpr float kExponentMax = 80.0F;  ///< of a weight, in nats

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_LOG_BITS_H_
