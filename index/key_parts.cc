#include "index/key_parts.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "index/selection.h"
#include "kernels/dtype.h"

namespace kvseek::index {
namespace {

/// The nearest bf16 that is not below (`up`) or not above the value.
uint16_t RoundOutward(float value, bool up) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto toward_zero = static_cast<uint16_t>(bits >> 16);
  const bool negative = (bits >> 31) != 0;
  const bool exact = (bits & 0xffffU) == 0;
  return static_cast<uint16_t>(toward_zero + (exact || up == negative ? 0 : 1));
}

/// Sums over the keys of every part.
struct Sums {
  Sums(int count, const KvShape& shape)
      : keys(static_cast<size_t>(count) * shape.key_dim),
        squares(keys.size()),
        low(keys.size(), std::numeric_limits<float>::infinity()),
        high(keys.size(), -std::numeric_limits<float>::infinity()),
        values(static_cast<size_t>(count) * shape.value_dim) {}
  std::vector<double> keys, squares;
  std::vector<float> low, high;
  std::vector<double> values;
};

void AddRow(const KvShape& shape, const uint16_t* key, const uint16_t* value, size_t part,
            Sums& sums) {
  const auto key_dim = static_cast<size_t>(shape.key_dim);
  const auto value_dim = static_cast<size_t>(shape.value_dim);
  for (size_t d = 0; d < key_dim; ++d) {
    const float element = kernels::LoadElement(key, shape.dtype, d);
    const size_t at = part * key_dim + d;
    sums.keys[at] += element;
    sums.squares[at] += static_cast<double>(element) * element;
    sums.low[at] = std::min(sums.low[at], element);
    sums.high[at] = std::max(sums.high[at], element);
  }
  for (size_t d = 0; d < value_dim; ++d) {
    sums.values[part * value_dim + d] += kernels::LoadElement(value, shape.dtype, d);
  }
}

}  // namespace

std::shared_ptr<const KeyParts> KeyParts::Make(const KvView& view, int64_t begin,
                                               absl::Span<const uint16_t> part_of, int count,
                                               bool bounds) {
  std::shared_ptr<KeyParts> made(new KeyParts);
  const KvShape& shape = view.shape;
  KeyParts& parts = *made;
  parts.begin_ = begin;
  parts.starts_.resize(static_cast<size_t>(count) + 1);
  for (const uint16_t part : part_of) ++parts.starts_[size_t{part} + 1];
  for (size_t p = 1; p < parts.starts_.size(); ++p) parts.starts_[p] += parts.starts_[p - 1];
  std::vector<uint32_t> next(parts.starts_.begin(), parts.starts_.end() - 1);
  parts.members_.resize(part_of.size());
  for (size_t i = 0; i < part_of.size(); ++i) {
    parts.members_[next[part_of[i]]++] = static_cast<uint16_t>(i);
  }

  Sums sums(count, shape);
  VisitRows(view, begin, begin + static_cast<int64_t>(part_of.size()),
            [&](const uint16_t* keys, const uint16_t* values, int64_t first, int tokens) {
              for (int t = 0; t < tokens; ++t) {
                AddRow(shape, keys + static_cast<ptrdiff_t>(t) * shape.key_dim,
                       values + static_cast<ptrdiff_t>(t) * shape.value_dim,
                       part_of[static_cast<size_t>(first - begin + t)], sums);
              }
            });
  const auto key_dim = static_cast<size_t>(shape.key_dim);
  parts.mean_keys_.resize(sums.keys.size());
  parts.key_variances_.resize(sums.keys.size());
  parts.mean_values_.resize(sums.values.size());
  for (size_t i = 0; i < sums.keys.size(); ++i) {
    const auto size = static_cast<double>(parts.Members(static_cast<int>(i / key_dim)).size());
    const double mean = sums.keys[i] / size;
    parts.mean_keys_[i] = static_cast<float>(mean);
    parts.key_variances_[i] = kernels::FloatToBf16(
        static_cast<float>(std::max(sums.squares[i] / size - mean * mean, 0.0)));
  }
  const auto value_dim = static_cast<size_t>(shape.value_dim);
  for (size_t i = 0; i < sums.values.size(); ++i) {
    const auto size = static_cast<double>(parts.Members(static_cast<int>(i / value_dim)).size());
    parts.mean_values_[i] = kernels::FloatToBf16(static_cast<float>(sums.values[i] / size));
  }
  if (!bounds) return made;
  for (size_t i = 0; i < sums.low.size(); ++i) {
    parts.lower_.push_back(RoundOutward(sums.low[i], false));
    parts.upper_.push_back(RoundOutward(sums.high[i], true));
  }
  return made;
}

size_t KeyParts::Bytes() const {
  return starts_.size() * sizeof(uint32_t) + mean_keys_.size() * sizeof(float) +
         (members_.size() + key_variances_.size() + lower_.size() + upper_.size() +
          mean_values_.size()) *
             sizeof(uint16_t);
}

}  // namespace kvseek::index
