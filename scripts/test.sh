#!/usr/bin/env bash
# Builds and runs the whole test suite: scripts/test.sh [preset ...]. Without arguments the release build; with
# `asan-ubsan` or `tsan` the same tests under sanitizers. Installs what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh
if (($# == 0)); then set -- release; fi
for preset in "$@"; do
  ./scripts/build.sh "$preset"
  echo "tests: $preset"
  ctest --preset "$preset" -j "$(nproc)"
done
