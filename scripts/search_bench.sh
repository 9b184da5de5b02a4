#!/usr/bin/env bash
# Measures searches through shared memory, one layer's request after the other, on a machine with many cores: run in the
# repository's root. Daemon and client are separate processes; layers are cycled, so that what a request touches is cold. PyTorch's
# full attention of the same shape is timed first where there is a GPU, and the memory's bandwidth in each run.
#   scripts/search_bench.sh OUT [INDEX:TOKENS:LAYERS[:CANDIDATES[:SESSIONS[:CLIENTS]]]...]
# INDEX: exact, sign1, sign2 (the ladder's scan codes) or product. CANDIDATES: 4096. SESSIONS: 1; several are asked for in one request,
# or by so many CLIENTS at the same time, each for its share of them. Results go to OUT/search_latency.json, a line a run to the terminal.
# A session's youngest 64 to 1087 tokens have no codes yet and are read exactly: TAIL (512) tokens are added to a case's.
# Environment: BIN, the programs' folder (default build/release/bin); WORKERS (default: all cores but two); SECONDS_EACH (default 3); TAIL.
set -euo pipefail
out=$(realpath -m "${1:?folder for the results}")
shift
cd "$(dirname "$0")/.."
cases=("$@")
((${#cases[@]})) || cases=(sign1:32768:8 product:32768:8 exact:131072:8 sign1:131072:8 sign2:131072:8 product:131072:8
  sign1:524288:3 product:524288:3 product:524288:3:15729
  sign1:32768:2:4096:16 product:32768:2:4096:16 exact:131072:2:4096:4 sign1:131072:2:4096:8 product:131072:2:4096:2
  product:131072:2:4096:4 product:131072:2:4096:8 product:131072:2:4096:2:2 product:131072:2:4096:4:4)
bin=${BIN:-build/release/bin}
workers=${WORKERS:-$(($(nproc) > 3 ? $(nproc) - 2 : $(nproc)))}
mkdir -p "$out"

socket=$(mktemp -d)/kvseek.sock
daemon=
stop() { [[ -z $daemon ]] || { kill "$daemon" && wait "$daemon"; } 2>/dev/null || true; }
trap stop EXIT
# Fresh for each case: what one left behind is not the next one's.
start() {
  stop
  "$bin/kvseekd" --listen "unix:$socket" --memory 100GiB --workers "$workers" --build-threads "$workers" --io-spin-us 2000 \
    --worker-spin-us 2000 --log-level warn &
  daemon=$!
  for _ in {1..100}; do [[ -S $socket ]] && break; sleep 0.1; done
}

: >"$out/sdpa.jsonl"
if command -v nvidia-smi >/dev/null; then
  python3 bench/sdpa_bench.py --batch 1 --rows 32768,131072,524288 | tee "$out/sdpa.jsonl"
fi
number=0
for case in "${cases[@]}"; do
  IFS=: read -r name tokens layers candidates sessions clients <<<"$case"
  index=ladder bits=1 build=() batch=()
  tokens=$((tokens + ${TAIL:-512}))
  # Several clients sleep until their answers come: looking, they would take the workers' cores.
  spin=$((${clients:-1} > 1 ? 0 : 2000))
  ((${sessions:-1} == 1)) || batch=(--batch)
  case $name in
    sign1) ;;
    sign2) bits=2 ;;
    exact) index=exact ;;
    product) index=product build=(--build product) ;;
    *) echo "no index $name" >&2; exit 2 ;;
  esac
  start
  "$bin/kvseek" bench --via "shm:$socket" --connections "${clients:-1}" --spin-us "$spin" --shape llama3-8b --layers "$layers" \
    --tokens "$tokens" --sessions "${sessions:-1}" "${batch[@]}" --rate 0 --duration "${SECONDS_EACH:-3}" --scan-bits "$bits" \
    --index "$index" --candidates "${candidates:-4096}" "${build[@]}" --format json >"$out/run.$number.json"
  number=$((number + 1))  # not in the line above, whose words a child process expands
done
stop
python3 - "$out" "$workers" "${cases[@]}" <<'PYTHON'
import json, pathlib, sys

out, workers, cases = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
sdpa = [json.loads(line) for line in (out / "sdpa.jsonl").read_text().splitlines() if line.startswith("{")]
runs = []
for number, case in enumerate(cases):
    path = out / f"run.{number}.json"
    run = json.loads(path.read_text())
    path.unlink()
    request, roof = run["request"], run["memory_roof_bytes_per_second"]
    touched = request["bytes_touched"]
    sessions = request["sessions"]
    runs.append({
        "case": case,
        "daemon_micros_p50": run["daemon_micros_p50"],
        "micros": run["micros"],
        "bytes_touched": round(touched),
        "floor_micros": round(touched / roof * 1e6, 1),
        "sessions_a_request": sessions,
        "sessions_per_second": round(run["achieved_per_second"] * sessions, 1),
        "micros_per_session_p50": round(request["micros_per_session_p50"], 1),
        "daemon_bytes_per_second": round(request["daemon_bytes_per_second"]),
        "daemon_of_roof": round(request["of_roof"], 3),
        "of_roof": round(run["bytes_touched_per_second"] / roof, 3),
        "worker_micros_a_request": {phase: round(micros, 1) for phase, micros in run["worker_micros_a_request"].items()},
        "exact_daemon_micros_p50": run["exact_daemon_micros_p50"],
        "of_exact": run["of_exact"],
        "memory_read_roof_bytes_per_second": round(roof),
        "answered": run["answered"],
    })
    print(f"{case:28} daemon p50 {run['daemon_micros_p50']:6.0f} us, with the way p50 {run['micros']['p50']:6.0f} p99 "
          f"{run['micros']['p99']:6.0f}, {touched / 1e6:6.1f} MB, floor {touched / roof * 1e6:5.0f} us; {sessions:.0f} sessions a request, "
          f"{request['micros_per_session_p50']:6.0f} us and {1e6 / (run['achieved_per_second'] * sessions):6.0f} us of the clock each, "
          f"{request['of_roof']:.2f} of the roof in its time, {run['bytes_touched_per_second'] / roof:.2f} by the clock"
          + (f"; {run['of_exact']:.3f} of exact" if run["of_exact"] is not None else ""))
(out / "sdpa.jsonl").unlink()
result = {"workers": workers, "sdpa": sdpa, "runs": runs}
(out / "search_latency.json").write_text(json.dumps(result, indent=1) + "\n")
PYTHON
