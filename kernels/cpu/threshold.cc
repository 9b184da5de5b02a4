#include "kernels/cpu/threshold.h"

#include <array>
#include <bit>
#include <limits>

namespace kvseek::kernels {
namespace {

/// Maps floats to integers of the same order.
uint32_t OrderedBits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

float FromOrderedBits(uint32_t ordered) {
  const uint32_t bits = (ordered & 0x80000000U) != 0 ? ordered & 0x7fffffffU : ~ordered;
  return std::bit_cast<float>(bits);
}

constexpr int kDigitBits = 11;
constexpr uint32_t kBuckets = 1U << kDigitBits;

}  // namespace

float RankThreshold(const float* values, int64_t count, int64_t rank, uint32_t* work) noexcept {
  if (rank <= 0) return std::numeric_limits<float>::infinity();
  if (rank > count) return -std::numeric_limits<float>::infinity();
  std::array<uint32_t, kBuckets> histogram{};
  for (int64_t i = 0; i < count; ++i) {
    work[i] = OrderedBits(values[i]);
    ++histogram[work[i] >> (32 - kDigitBits)];
  }
  // Digits from the top: find the bucket that holds the rank, keep its members, look at their next
  // digit.
  int64_t left = count;
  int shift = 32 - kDigitBits;
  uint32_t mask = kBuckets - 1;
  while (true) {
    uint32_t bucket = mask;
    while (rank > static_cast<int64_t>(histogram[bucket])) rank -= histogram[bucket--];
    int64_t kept = 0;
    for (int64_t i = 0; i < left; ++i) {
      if (((work[i] >> shift) & mask) == bucket) work[kept++] = work[i];
    }
    left = kept;
    if (shift == 0 || left == 1) break;
    const int next_shift = shift > kDigitBits ? shift - kDigitBits : 0;
    mask = (1U << (shift - next_shift)) - 1;
    shift = next_shift;
    histogram.fill(0);
    for (int64_t i = 0; i < left; ++i) ++histogram[(work[i] >> shift) & mask];
  }
  return FromOrderedBits(work[0]);
}

}  // namespace kvseek::kernels
