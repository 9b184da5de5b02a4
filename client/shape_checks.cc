#include "client/shape_checks.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "proto/status_code.h"

namespace kvseek::client {

uint64_t Product(std::initializer_list<uint64_t> factors) {
  uint64_t product = 1;
  for (const uint64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) {
      return std::numeric_limits<uint64_t>::max();
    }
  }
  return product;
}

absl::Status CheckShape(const ModelShape& shape, absl::string_view prefix) {
  const auto invalid = [](absl::string_view field, absl::string_view message) {
    return proto::FieldError(absl::StatusCode::kInvalidArgument, field, message);
  };
  const auto field = [prefix](absl::string_view name) { return absl::StrCat(prefix, name); };
  if (shape.layers == 0) return invalid(field("layers"), "must not be 0");
  if (shape.kv_heads == 0) return invalid(field("kv_heads"), "must not be 0");
  if (shape.query_heads == 0 || shape.query_heads % shape.kv_heads != 0) {
    return invalid(field("query_heads"), "must be a multiple of kv_heads");
  }
  if (shape.key_dim == 0) return invalid(field("key_dim"), "must not be 0");
  if (shape.value_dim == 0) return invalid(field("value_dim"), "must not be 0");
  if (shape.dtype != DType::kBf16 && shape.dtype != DType::kFp16) {
    return invalid(field("dtype"), "must be bf16 or fp16");
  }
  return absl::OkStatus();
}

}  // namespace kvseek::client
