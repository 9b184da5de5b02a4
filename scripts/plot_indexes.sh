#!/usr/bin/env bash
# Measures every index on recorded heads and draws the plots of docs/indexes.md.
#   scripts/plot_indexes.sh TRACES OUT [HEAD...]      default: all heads of TRACES
# TRACES has PREFIX.HEAD.safetensors and PREFIX.queries.safetensors, as tests/data has. OUT gets, for each PREFIX,
# indexes.PREFIX.HEAD.svg and indexes.PREFIX.json (groups), and indexes.PREFIX.per_head.json (each query head by
# itself, to set beside bench/faiss_bench.py).
# Environment: KVSEEK, the tool (build/release/bin/kvseek); STEPS, decode steps of a head (128).
set -euo pipefail
traces=$(realpath "${1:?folder with traces}")
out=$(realpath -m "${2:?folder for the results}")
shift 2
cd "$(dirname "$0")/.."
kvseek=${KVSEEK:-build/release/bin/kvseek}
steps=${STEPS:-128}
mkdir -p "$out"
parts=$(mktemp -d)
trap 'rm -r "$parts"' EXIT

# All results of one kind, with what it takes to get them again.
collect() {
  python3 - "$1" "$2" "${@:3}" <<'PYTHON'
import json, platform, re, subprocess, sys, datetime
out, command, parts = sys.argv[1], sys.argv[2], sys.argv[3:]
cpu = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read())
cores = subprocess.run(["nproc"], capture_output=True, text=True).stdout.strip()
commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
loaded = [json.load(open(part)) for part in parts]
report = {
    "machine": {"cpu": f"{cpu.group(1) if cpu else platform.machine()}, {cores} cores", "simd_level": loaded[0]["simd_level"]},
    "command": command,
    "commit": commit,
    "date": datetime.date.today().isoformat(),
}
lines = ",\n".join(json.dumps(result) for one in loaded for result in one["results"])
head = json.dumps(report, indent=1)[:-2]
open(out, "w").write(f'{head},\n "results": [\n{lines}\n]}}\n')
PYTHON
}

for queries in "$traces"/*.queries.safetensors; do
  prefix=$(basename "$queries" .queries.safetensors)
  groups=() alone=()
  for kv in "$traces/$prefix".layer*.safetensors; do
    head=$(basename "$kv" .safetensors)
    head=${head#"$prefix".}
    (($#)) && [[ " $* " != *" $head "* ]] && continue
    common=(--kv "$kv" --queries "$queries" --head "$head" --steps "$steps" --audit 0 --format json)
    echo "$prefix $head"
    "$kvseek" eval "${common[@]}" --index exact,ladder,landmark,cluster,graph,oracle --scan sign1,sign2,pq11,pq22 \
      --summary minmax,mean --candidates 256,512,1024,2048,4096,8192 --exact 64,128,256,512,1024,2048,4096,8192 \
      --plot "$out/indexes.$prefix.$head.svg" >"$parts/$prefix.$head.json"
    "$kvseek" eval "${common[@]}" --index ladder,cluster,graph --per-head \
      --candidates 240,480,960,1920 --exact 64 >"$parts/$prefix.$head.alone.json"
    groups+=("$parts/$prefix.$head.json")
    alone+=("$parts/$prefix.$head.alone.json")
  done
  ((${#groups[@]})) || continue
  collect "$out/indexes.$prefix.json" "STEPS=$steps scripts/plot_indexes.sh TRACES OUT" "${groups[@]}"
  collect "$out/indexes.$prefix.per_head.json" "STEPS=$steps scripts/plot_indexes.sh TRACES OUT" "${alone[@]}"
done
