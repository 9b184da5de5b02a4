// How fast this machine reads memory: the roof of every scan.
#ifndef KVSEEK_CLI_MEMORY_ROOF_H_
#define KVSEEK_CLI_MEMORY_ROOF_H_

#include <cstdint>

namespace kvseek::cli {

/// Bytes a second that `threads` threads read together from buffers larger than the caches: the
/// best of a few access patterns. Takes about a second and 256 MiB a thread (2 GiB at most).
double MeasureMemoryRoof(int threads);

/// Memory that can still be taken without swapping, in bytes; 0 if unknown.
uint64_t AvailableMemoryBytes();

}  // namespace kvseek::cli

#endif  // KVSEEK_CLI_MEMORY_ROOF_H_
