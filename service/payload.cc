#include "service/payload.h"

#include <array>
#include <bit>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "index/scratch.h"

namespace kvseek::service {
namespace {

using Array = index::AlignedArray<uint8_t>;

constexpr size_t kSizes = static_cast<size_t>(std::bit_width(kKeptMost / kKeptLeast));

constexpr bool IsKept(size_t bytes) { return bytes >= kKeptLeast && bytes <= kKeptMost; }

class Spares {
 public:
  Spares() {
    for (size_t i = 0; i < kSizes; ++i) arrays_[i].reserve(kSparePayloads / (kKeptLeast << i));
  }

  /// Null: there is none.
  Array Take(size_t capacity) {
    const std::lock_guard lock(mutex_);
    std::vector<Array>& some = arrays_[Number(capacity)];
    if (some.empty()) return nullptr;
    Array taken = std::move(some.back());
    some.pop_back();
    bytes_ -= capacity;
    return taken;
  }

  /// Where it does not fit, others of its size stay and those of other sizes go, largest first:
  /// what is not asked for any more does not stand in the way of what is.
  void Give(Array array, size_t capacity) noexcept {
    const std::lock_guard lock(mutex_);
    const size_t own = Number(capacity);
    for (size_t i = kSizes; i > 0 && bytes_ + capacity > kSparePayloads; --i) {
      while (i - 1 != own && !arrays_[i - 1].empty() && bytes_ + capacity > kSparePayloads) {
        arrays_[i - 1].pop_back();
        bytes_ -= kKeptLeast << (i - 1);
      }
    }
    if (bytes_ + capacity > kSparePayloads) return;
    bytes_ += capacity;
    arrays_[own].push_back(std::move(array));  // has the capacity
  }

  size_t bytes() {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }

 private:
  static size_t Number(size_t capacity) {
    return static_cast<size_t>(std::countr_zero(capacity / kKeptLeast));
  }

  std::mutex mutex_;
  std::array<std::vector<Array>, kSizes> arrays_ ABSL_GUARDED_BY(mutex_);
  size_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

/// Never destroyed: payloads may be given back while the process ends.
Spares& TheSpares() {
  static auto* const spares = new Spares;
  return *spares;
}

}  // namespace

void PayloadFree::operator()(uint8_t* data) const noexcept {
  Array array(data);
  if (IsKept(bytes)) TheSpares().Give(std::move(array), std::bit_ceil(bytes));
}

Payload MakePayload(size_t bytes) {
  const size_t capacity = IsKept(bytes) ? std::bit_ceil(bytes) : bytes;
  Array array = IsKept(bytes) ? TheSpares().Take(capacity) : nullptr;
  if (array == nullptr) array = index::MakeAligned<uint8_t>(capacity);
  return {{array.release(), PayloadFree{bytes}}, bytes};
}

size_t SparePayloadBytes() { return TheSpares().bytes(); }

}  // namespace kvseek::service
