// Storage for the kernels that ask for aligned arrays.
#ifndef KVSEEK_TESTS_KERNELS_ALIGNED_H_
#define KVSEEK_TESTS_KERNELS_ALIGNED_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvseek::kernels {

/// 64-byte aligned storage.
template <class T>
class Aligned {
 public:
  explicit Aligned(size_t count, T value = T()) : storage_(count + 64 / sizeof(T), value) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    first_ = (64 - address % 64) % 64 / sizeof(T);
  }
  T* data() { return storage_.data() + first_; }
  const T* data() const { return storage_.data() + first_; }
  Aligned(Aligned&&) = default;  // a copy would be aligned otherwise
  T& operator[](size_t i) { return data()[i]; }

 private:
  std::vector<T> storage_;
  size_t first_;
};

}  // namespace kvseek::kernels

#endif  // KVSEEK_TESTS_KERNELS_ALIGNED_H_
