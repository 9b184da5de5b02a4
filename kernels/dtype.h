// Element types of keys, values and queries, and their conversion to float.
#ifndef KVSEEK_KERNELS_DTYPE_H_
#define KVSEEK_KERNELS_DTYPE_H_

#include <bit>
#include <cstddef>
#include <cstdint>

namespace kvseek::kernels {

/// Element type of a tensor. The numeric values travel on the wire (docs/protocol.md).
enum class DType : uint8_t {
  kBf16 = 1,  ///< bfloat16: the upper half of a float
  kFp16 = 2,  ///< IEEE 754 binary16
  kFp32 = 3,  ///< IEEE 754 binary32; queries and states only, never stored keys or values
};

/// Bytes of one element; 0 for a value that is no DType.
constexpr size_t DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kBf16:
    case DType::kFp16:
      return 2;
    case DType::kFp32:
      return 4;
  }
  return 0;
}

constexpr const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kBf16:
      return "bf16";
    case DType::kFp16:
      return "fp16";
    case DType::kFp32:
      return "fp32";
  }
  return "?";
}

constexpr float Bf16ToFloat(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

/// Rounds to nearest even. NaN stays NaN.
constexpr uint16_t FloatToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

constexpr float Fp16ToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fU;
  const uint32_t mantissa = bits & 0x3ffU;
  if (exponent == 0x1fU) return std::bit_cast<float>(sign | 0x7f800000U | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112U) << 23) | (mantissa << 13));
}

/// Rounds to nearest even; overflow becomes infinity.
constexpr uint16_t FloatToFp16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);
  if (magnitude >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);
  if (magnitude < 0x38800000U) {  // subnormal or zero: let the float unit do the rounding
    const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000U));
  }
  const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U) - 0x38000000U;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

/// Reads element `index` of a tensor of any DType.
inline float LoadElement(const void* data, DType dtype, size_t index) {
  switch (dtype) {
    case DType::kBf16:
      return Bf16ToFloat(static_cast<const uint16_t*>(data)[index]);
    case DType::kFp16:
      return Fp16ToFloat(static_cast<const uint16_t*>(data)[index]);
    case DType::kFp32:
      return static_cast<const float*>(data)[index];
  }
  return 0.0F;
}

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_DTYPE_H_
