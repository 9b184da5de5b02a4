// Which SIMD instructions the kernels use. Each kernel is one source, compiled for several levels
// and chosen at run time (Highway's dynamic dispatch).
#ifndef KVSEEK_KERNELS_CPU_SIMD_LEVEL_H_
#define KVSEEK_KERNELS_CPU_SIMD_LEVEL_H_

#include <string>
#include <string_view>
#include <vector>

namespace kvseek::kernels {

/// Names of the levels that this build has and this machine can run, best first; the last is always
/// "scalar". On x86-64: "avx512-vbmi" (also VNNI, BITALG), "avx512", "avx2", "scalar".
std::vector<std::string> SupportedSimdLevels();

/// Name of the level in force.
std::string SimdLevel();

/// Uses at most `level` from now on; "" goes back to the best. False, and no change, for a level
/// that is not supported here. Not thread-safe against running kernels: call at start-up and in
/// tests. The same request gives the same bits at the same level, and nearly the same at another;
/// codes are the same bits at all of them (ladder_codes.h).
bool ForceSimdLevel(std::string_view level);

/// ForceSimdLevel(getenv("KVSEEK_SIMD")) where that is set; false where it names no supported
/// level.
bool ApplySimdLevelFromEnvironment();

}  // namespace kvseek::kernels

#endif  // KVSEEK_KERNELS_CPU_SIMD_LEVEL_H_
