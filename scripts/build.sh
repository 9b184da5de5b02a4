#!/usr/bin/env bash
# Configures and builds one preset: scripts/build.sh [release|debug|asan-ubsan|tsan|device] [ninja targets].
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:-release}
shift || true
log=build/$preset/configure.log
mkdir -p "build/$preset"
cmake --preset "$preset" >"$log" 2>&1 || { cat "$log"; exit 1; }
# Heavy template code takes about 1.5 GB a compiler: no more jobs than memory carries.
jobs=$(nproc)
by_memory=$(awk '/MemAvailable/ {print int($2 / 1500000)}' /proc/meminfo)
if ((by_memory < jobs)); then jobs=$((by_memory > 0 ? by_memory : 1)); fi
if (($# > 0)); then
  cmake --build "build/$preset" -j "$jobs" --target "$@"
else
  cmake --build "build/$preset" -j "$jobs"
fi
