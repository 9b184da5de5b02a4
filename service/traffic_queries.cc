#include "service/traffic_queries.h"

#include <utility>

#include "kernels/cpu/convert.h"

namespace kvseek::service {
namespace {

void Convert(const float* from, size_t count, kernels::DType dtype, uint16_t* to) {
  if (dtype == kernels::DType::kFp16) {
    kernels::ConvertToFp16(from, count, to);
    return;
  }
  for (size_t i = 0; i < count; ++i) to[i] = kernels::FloatToBf16(from[i]);
}

}  // namespace

bool TrafficQueries::Prepare(const Shape& shape, MemoryBudget& budget) {
  if (!batch_.rows.empty()) return true;
  const size_t elements = kBatchTokens * shape.TokenElements();
  auto memory = budget.Reserve(elements * sizeof(uint16_t), "queries");
  if (!memory.ok()) return false;
  batch_.memory = *std::move(memory);
  batch_.rows.resize(elements);
  return true;
}

std::optional<TrafficQueries::Batch> TrafficQueries::Add(const Token& token, const Shape& shape,
                                                         MemoryBudget& budget) {
  const std::lock_guard lock(mutex_);
  const int64_t stretch = token.position / kStride;
  if (stretch != stretch_) {
    if (!Prepare(shape, budget)) return std::nullopt;
    stretch_ = stretch;
    missing_ = shape.kv_heads;
    taken_.assign(shape.kv_heads, false);
  }
  if (missing_ == 0) return std::nullopt;
  const size_t head_elements = shape.group * shape.key_dim;
  uint16_t* const row = batch_.rows.data() + batch_.positions.size() * shape.TokenElements();
  for (size_t i = 0; i < token.kv_heads.size(); ++i) {
    const uint32_t head = token.kv_heads[i];
    if (taken_[head]) continue;
    Convert(token.queries + i * head_elements, head_elements, shape.dtype,
            row + head * head_elements);
    taken_[head] = true;
    --missing_;
  }
  if (missing_ > 0) return std::nullopt;
  batch_.positions.push_back(static_cast<uint64_t>(token.position));
  if (batch_.positions.size() < kBatchTokens) return std::nullopt;
  return std::exchange(batch_, {});
}

}  // namespace kvseek::service
