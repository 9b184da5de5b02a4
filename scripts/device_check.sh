#!/usr/bin/env bash
# Checks the GPU side on a machine with a GPU, in under four minutes: run in the repository's root, with build/device/bin of
# scripts/device_build.sh in place. One line for each check; the output of a check that fails. Exit status 1 if one did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

bin=build/device/bin
work=$(mktemp -d)
daemon=
failed=0
# shellcheck disable=SC2317  # called by the trap
finish() {
  [[ -z $daemon ]] || { kill "$daemon" && wait "$daemon"; } 2>/dev/null
  rm -rf "$work"
}
trap finish EXIT

# check NAME SECONDS COMMAND...: runs it with a limit; its output is in $work/NAME. False if it failed.
check() {
  local name=$1 limit=$2 begun=$SECONDS status
  shift 2
  timeout "$limit" "$@" >"$work/$name" 2>&1
  status=$?
  # A GPU is what this is about: a test that skips has not passed.
  if ((status == 0)) && grep -qE '^\[ +SKIPPED|^skipped' "$work/$name"; then status=skipped; fi
  if [[ $status == 0 ]] && grep -qE 'SUMMARY: [1-9]' "$work/$name"; then status=findings; fi
  if grep -q 'Device not supported' "$work/$name"; then
    echo "skip  $name: not supported on this machine"
  elif [[ $status == 0 ]]; then
    echo "ok    $name ($((SECONDS - begun)) s)"
  else
    echo "FAIL  $name ($((SECONDS - begun)) s, status $status)"
    grep -vE '^\[ +(OK|RUN) ' "$work/$name" | tail -40
    failed=1
    return 1
  fi
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"

check cuda_test 40 "$bin/cuda_test" --gtest_brief=1
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [[ -n $sanitizer ]]; then
  check memcheck 60 "$sanitizer" --tool memcheck --error-exitcode 9 "$bin/cuda_test" --gtest_brief=1 \
    --gtest_filter='-*OneLongGroup*'
  check racecheck 60 "$sanitizer" --tool racecheck --error-exitcode 9 "$bin/cuda_test" --gtest_brief=1 \
    --gtest_filter='*DimTest*/1:*SameBits*:*SeveralTokens*:*InPlace*:*SeveralLists*'
else
  echo "skip  memcheck, racecheck: no compute-sanitizer"
fi

if check gpu_bench 60 "$bin/gpu_bench" --quick; then cat "$work/gpu_bench"; fi

"$bin/kvseekd" --listen "unix:$work/kvseek.sock" >"$work/kvseekd" 2>&1 &
daemon=$!
for _ in {1..100}; do
  [[ -S $work/kvseek.sock ]] && break
  sleep 0.1
done
if check sparse_decode 40 "$bin/sparse_decode" "unix:$work/kvseek.sock"; then
  cat "$work/sparse_decode"
else
  tail -20 "$work/kvseekd"
fi
exit $failed
