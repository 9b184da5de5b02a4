// The pattern of every kernel source under kernels/cpu, which this one shows at its smallest:
//
//   1. HWY_TARGET_INCLUDE names the file itself; foreach_target.h then includes it once per level.
//   2. Between HWY_BEFORE_NAMESPACE and HWY_AFTER_NAMESPACE, in HWY_NAMESPACE: the kernel, compiled
//      for that level. Helpers that several sources share live in *-inl.h with a per-target guard.
//      Whole loops are in here, because a call from one level into another is not inlined.
//   3. Under HWY_ONCE: HWY_EXPORT, and the public function, which dispatches once for all its rows.
//
// HWY_SCALAR, the baseline with older compilers, has one lane and lacks the operations that move
// lanes; code that needs them is written twice, under #if HWY_TARGET == HWY_SCALAR.
#include "kernels/cpu/simd_level.h"

#include <cstdint>
#include <cstdlib>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/simd_level.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvseek::kernels {
namespace HWY_NAMESPACE {

int64_t CompiledTarget() { return HWY_TARGET; }

}  // namespace HWY_NAMESPACE
}  // namespace kvseek::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvseek::kernels {
namespace {

HWY_EXPORT(CompiledTarget);

const char* LevelName(int64_t target) {
  switch (target) {
    case HWY_AVX3_DL:
      return "avx512-vbmi";
    case HWY_AVX3:
      return "avx512";
    case HWY_AVX2:
      return "avx2";
    case HWY_NEON:
      return "neon";
    default:
      return "scalar";
  }
}

std::vector<int64_t> FindTargets() {
  std::vector<int64_t> targets;
  constexpr int64_t kScalar = HWY_SCALAR | HWY_EMU128;
  for (int64_t left = hwy::SupportedTargets() & HWY_TARGETS & ~kScalar; left != 0;
       left &= left - 1) {
    targets.push_back(left & -left);
  }
  targets.push_back(HWY_TARGETS & kScalar);
  return targets;
}

/// Targets that were compiled and run here, best (lowest bit) first; the scalar one is always last.
/// Found once, because hwy::SupportedTargets() goes back to the best one as a side effect.
const std::vector<int64_t>& Targets() {
  static const auto* targets = new std::vector<int64_t>(FindTargets());
  return *targets;
}

}  // namespace

std::vector<std::string> SupportedSimdLevels() {
  std::vector<std::string> names;
  for (const int64_t target : Targets()) names.emplace_back(LevelName(target));
  return names;
}

std::string SimdLevel() { return LevelName(HWY_DYNAMIC_DISPATCH(CompiledTarget)()); }

bool ForceSimdLevel(std::string_view level) {
  int64_t allowed = 0;
  bool found = level.empty();
  for (const int64_t target : Targets()) {
    found = found || level == LevelName(target);
    if (found) allowed |= target;
  }
  if (!found) return false;
  hwy::GetChosenTarget().Update(allowed);
  return true;
}

bool ApplySimdLevelFromEnvironment() {
  const char* level = std::getenv("KVSEEK_SIMD");
  return level == nullptr || ForceSimdLevel(level);
}

}  // namespace kvseek::kernels
#endif  // HWY_ONCE
