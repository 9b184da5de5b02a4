#!/usr/bin/env bash
# clang-format and clang-tidy (version 14) over our sources: scripts/lint.sh [--fix-format] [--no-tidy] [files ...].
# clang-tidy needs build/release/compile_commands.json (scripts/build.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
fix=0
tidy=1
files=()
for argument in "$@"; do
  case $argument in
    --fix-format) fix=1 ;;
    --no-tidy) tidy=0 ;;
    *) files+=("$argument") ;;
  esac
done
if ((${#files[@]} == 0)); then
  mapfile -t files < <(git ls-files '*.cc' '*.h' '*.cu' '*.cuh')
fi
if ((fix)); then
  clang-format -i "${files[@]}"
else
  clang-format --dry-run --Werror "${files[@]}"
fi
if ((tidy)); then
  mapfile -t units < <(printf '%s\n' "${files[@]}" | grep '\.cc$')
  printf '%s\0' "${units[@]}" | xargs -0 -P "$(nproc)" -n 1 clang-tidy -p build/release --quiet 2>/dev/null
fi
