#!/usr/bin/env bash
# Times FAISS's IVF-Flat and HNSW at a recall beside the 2-bit ladder, one thread each, in one run on the same recorded
# heads: all query heads of a step at a time, repetitions in alternation (bench/faiss_compare.py).
#   scripts/faiss_compare.sh TRACES [OUT.json] [options of bench/faiss_compare.py ...]
# TRACES has PREFIX.HEAD.safetensors and PREFIX.queries.safetensors, as tests/data has. FAISS comes from PyPI, whose wheel has code for
# AVX-512, into a virtual environment of its own. Takes a few minutes; wants a machine with nothing else to do.
# Environment: KVSEEK, the tool (default build/release/bin/kvseek).
set -euo pipefail
traces=$(realpath "${1:?folder with traces}")
out=()
if (($# > 1)); then out=(--out "$(realpath -m "$2")"); fi
shift $(($# > 1 ? 2 : 1))
cd "$(dirname "$0")/.."
kvseek=${KVSEEK:-build/release/bin/kvseek}
[[ -x $kvseek ]] || ./scripts/build.sh release kvseek
python=build/faiss-venv/bin/python
if ! "$python" -c 'import faiss, numpy' 2>/dev/null; then
  python3 -m venv build/faiss-venv || { echo "python3 -m venv does not work: install python3-venv" >&2; exit 1; }
  "$python" -m pip install --quiet faiss-cpu numpy
fi
exec "$python" bench/faiss_compare.py "$traces" "${out[@]}" --kvseek "$kvseek" \
  --command "scripts/faiss_compare.sh TRACES OUT.json${*:+ $*}" "$@"
