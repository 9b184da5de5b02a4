#!/usr/bin/env bash
# Measures the GPU side on a machine with a GPU: run in the repository's root, with build/device/bin of
# scripts/device_build.sh (targets kvseekd gpu_bench decode_bench) in place.
#   scripts/device_bench.sh OUT [kernels|latency|doorbell|steps...]      default: all of them; results go to OUT/*.json
# Environment: TRANSPORT, unix (default) or shm; DAEMON_FLAGS for kvseekd; HOST_BYTES_MAX, what it may take for one case (default 90e9).
set -euo pipefail
out=$(realpath -m "${1:?folder for the results}")
shift
cd "$(dirname "$0")/.."
parts=("$@")
((${#parts[@]})) || parts=(kernels latency doorbell steps)
bin=build/device/bin
mkdir -p "$out"
for folder in /usr/local/cuda/lib64 /usr/local/cuda/targets/x86_64-linux/lib; do
  LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
done
export LD_LIBRARY_PATH

socket=$(mktemp -d)/kvseek.sock
daemon=
stop() { [[ -z $daemon ]] || { kill "$daemon" && wait "$daemon"; } 2>/dev/null || true; }
trap stop EXIT
# Fresh for each group of cases: memory that one left behind is not the next one's.
start() {
  stop
  # shellcheck disable=SC2086  # flags are words
  "$bin/kvseekd" --listen "unix:$socket" --memory 110GiB --log-level warn ${DAEMON_FLAGS:-} &
  daemon=$!
  for _ in {1..100}; do [[ -S $socket ]] && break; sleep 0.1; done
}
decode() {
  local name=$1
  shift
  start
  "$bin/decode_bench" --daemon "${TRANSPORT:-unix}:$socket" --host-bytes-max "${HOST_BYTES_MAX:-90e9}" \
    --json "$out/decode_bench.$name.json" "$@"
}

for part in "${parts[@]}"; do
  case $part in
    kernels)
      "$bin/gpu_bench" --json "$out/gpu_bench.json"
      python3 bench/sdpa_bench.py | tee "$out/sdpa_bench.jsonl" || echo "sdpa_bench.py did not run: is PyTorch there?"
      ;;
    latency)  # what a layer takes beyond the daemon's own time
      DAEMON_FLAGS=${DAEMON_FLAGS:---workers 12 --io-spin-us 2000 --worker-spin-us 2000}
      decode latency --tokens 32768 --attention state,rows --steps 200 --warm-up 20
      decode latency_alone --attention-only --tokens 32768 --attention state --steps 200 --warm-up 20
      ;;
    doorbell)  # the same, asked by kernels: as calls, then as one graph a step
      DAEMON_FLAGS=${DAEMON_FLAGS:---workers 12 --io-spin-us 2000 --worker-spin-us 2000 --doorbell-spin-us 5000}
      decode doorbell --far-path doorbell --tokens 32768 --attention state --steps 200 --warm-up 20
      decode doorbell_alone --far-path doorbell --graph --attention-only --tokens 32768 --attention state \
        --steps 200 --warm-up 20
      decode doorbell_whole --far-path doorbell --graph --attention-only --whole-steps --layers 32 --tokens 32768 --attention state \
        --steps 200 --warm-up 20
      decode doorbell_graph --far-path doorbell --graph --tokens 32768 --attention state --steps 200 --warm-up 20
      ;;
    steps)
      decode 8b.128k --tokens 131072 --batch 1,4,7,8,16 --attention full,state --steps 8
      decode 8b.512k --tokens 524288 --batch 1,2,4 --attention full,state --steps 8
      decode 8b.32k --tokens 32768 --batch 1,8,32 --attention full,state,rows --steps 8
      decode 70b.128k --model llama3-70b-tp8 --tokens 131072 --batch 8,32 --attention full,state --steps 8
      ;;
    *) echo "no part $part" >&2; exit 2 ;;
  esac
done
