// Asks for memory ahead of its use.
#ifndef KVSEEK_KERNELS_CPU_PREFETCH_H_
#define KVSEEK_KERNELS_CPU_PREFETCH_H_

#include <cstddef>

namespace kvseek::kernels {

/// Prefetches every cache line of [data, data + bytes) for reading, into the second level: a core
/// waits for more lines at once there than in the first (docs/performance.md). A hint; any address
/// is fine.
inline void PrefetchRange(const void* data, size_t bytes) {
  constexpr size_t kLine = 64;
  const char* line = static_cast<const char*>(data);
  for (size_t offset = 0; offset < bytes; offset += kLine) {
    __builtin_prefetch(line + offset, 0, 2);
  }
}

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_PREFETCH_H_
