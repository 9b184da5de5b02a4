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

# cuBLAS is this machine's own.
for folder in /usr/local/cuda/lib64 /usr/local/cuda/targets/x86_64-linux/lib; do
  LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
done
export LD_LIBRARY_PATH

check cuda_test 40 "$bin/cuda_test" --gtest_brief=1
check ladder_encode 40 "$bin/cuda_ladder_encode_test" --gtest_brief=1
check query_statistics 40 "$bin/cuda_query_statistics_test" --gtest_brief=1
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
# sanitize NAME TOOL TEST FILTER
sanitize() {
  check "$1" 60 "$sanitizer" --tool "$2" --error-exitcode 9 "$bin/$3" --gtest_brief=1 "--gtest_filter=$4"
}
if [[ -n $sanitizer ]]; then
  sanitize memcheck memcheck cuda_test '-*OneLongGroup*'
  sanitize racecheck racecheck cuda_test '*DimTest*/1:*SameBits*:*SeveralTokens*:*InPlace*:*SeveralLists*'
  sanitize memcheck_encode memcheck cuda_ladder_encode_test '*UnequalDims*'
  sanitize racecheck_encode racecheck cuda_ladder_encode_test '*UnequalDims*'
  sanitize memcheck_statistics memcheck cuda_query_statistics_test '*EqualScores*:*FarMassOfExtremes*:*Moments*'
  sanitize racecheck_statistics racecheck cuda_query_statistics_test '*EqualScores*:*FarMassOfExtremes*:*Moments*'
else
  echo "skip  memcheck, racecheck: no compute-sanitizer"
fi
check sparse_decoder 90 "$bin/sparse_decoder_test" --gtest_brief=1
check decoder_faults 60 "$bin/decoder_faults_test" --gtest_brief=1

"$bin/kvseekd" --listen "unix:$work/kvseek.sock" >"$work/kvseekd" 2>&1 &
daemon=$!
for _ in {1..100}; do
  [[ -S $work/kvseek.sock ]] && break
  sleep 0.1
done
if check sparse_decode 60 "$bin/sparse_decode" "unix:$work/kvseek.sock"; then
  cat "$work/sparse_decode"
else
  tail -20 "$work/kvseekd"
fi
exit $failed
