#!/usr/bin/env python3
"""Measures FAISS on recorded attention heads, one thread.

faiss_bench.py TRACES HEAD... [--prefix code32] [--steps 128] [--out FILE.json]

TRACES holds PREFIX.HEAD.safetensors (`k`, bf16) and PREFIX.queries.safetensors (`HEAD.q_decode`, bf16), as
tests/data and `kvseek eval` have them; HEAD is for example layer15.kv1. Every query may see all keys.

Needs NumPy and FAISS: `python3 -m venv VENV && VENV/bin/pip install faiss-cpu numpy`. The wheel from PyPI has code
for AVX2 and AVX-512, the libraries of Debian and Ubuntu have SSE2 only; the output says which one ran.

For each index and setting, over all steps and query heads:
  recall_at_100   share of a query's true top 100 by inner product among the 100 that it returned; mean, and of
                  each query head
  keys_scored     distances to exact keys, as a share of all keys (IVF: centroids count as keys)
  codes_scored    distances to codes, as a share of all keys
  micros          a query's mean time in one thread, of a call with all query heads of a step
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import struct
import subprocess
import sys
import time

import faiss
import numpy

TOP = 100


def load(path, name):
    """A bf16 tensor of a safetensors file, as float32."""
    with open(path, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(header_bytes))[name]
        if entry["dtype"] != "BF16":
            sys.exit(f"{path}: {name} is {entry['dtype']}, not BF16")
        begin, end = entry["data_offsets"]
        file.seek(8 + header_bytes + begin)
        bits = numpy.frombuffer(file.read(end - begin), dtype="<u2")
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32).reshape(entry["shape"])


def cpu():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return f"{line.split(': ')[1].strip()}, {os.cpu_count()} cores"
    return platform.machine()


def simd():
    """The level that this build picked for this machine; older ones have a library for each level."""
    if hasattr(faiss, "SIMDConfig"):
        return faiss.SIMDConfig.get_level_name()
    return next((name for name in ("avx512", "avx2") if f"faiss.swigfaiss_{name}" in sys.modules), "generic")


def recalls(found, truth, group):
    """Of each query head, mean over the steps."""
    each = [len(numpy.intersect1d(f, t)) / TOP for f, t in zip(found, truth)]
    return numpy.mean(numpy.reshape(each, (-1, group)), axis=0)


PASSES = 3


def timed(search, queries, group):
    """The query heads of a step in one call, as a decoder would; the fastest pass, since machines are shared."""
    best = math.inf
    for _ in range(PASSES):
        start = time.perf_counter()
        found = [search(queries[i : i + group], TOP)[1] for i in range(0, len(queries), group)]
        best = min(best, time.perf_counter() - start)
    return numpy.concatenate(found), best / len(queries) * 1e6


def hnsw(keys, degree, efs):
    """HNSW with `degree` neighbours on the lowest level, which FAISS calls M = degree / 2."""
    index = faiss.IndexHNSWFlat(keys.shape[1], degree // 2, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 200
    index.add(keys)
    stats = faiss.cvar.hnsw_stats
    for ef in efs:
        index.hnsw.efSearch = ef
        stats.reset()
        yield {"ef_search": ef}, index.search, lambda searches: (stats.ndis / searches / len(keys), 0.0)


def ivf(keys, lists, probes):
    index = faiss.index_factory(keys.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(keys)
    index.add(keys)
    stats = faiss.cvar.indexIVF_stats
    for probe in probes:
        index.nprobe = probe
        stats.reset()
        yield {"nprobe": probe}, index.search, lambda searches: ((stats.ndis / searches + lists) / len(keys), 0.0)


def pq(keys, subspaces, factors):
    """4-bit product codes scanned with byte shuffles, the best `factor` x 100 scored again exactly."""
    index = faiss.index_factory(keys.shape[1], f"PQ{subspaces}x4fs,RFlat", faiss.METRIC_INNER_PRODUCT)
    index.train(keys)
    index.add(keys)
    for factor in factors:
        index.k_factor = factor
        share = factor * TOP / len(keys)
        yield {"k_factor": factor}, index.search, lambda searches, s=share: (s, 1.0)


def measure(head, group, keys, queries, truth):
    families = [
        ("HNSW", {"degree": 32, "ef_construction": 200}, lambda: hnsw(keys, 32, [100, 200, 400, 800, 1600, 3200])),
        ("IVF-Flat", {"lists": 512}, lambda: ivf(keys, 512, [4, 8, 16, 32, 64, 128])),
        ("PQ32x4fs + refine", {"bytes_a_key": 16}, lambda: pq(keys, 32, [1, 4, 10, 20, 40])),
        ("PQ64x4fs + refine", {"bytes_a_key": 32}, lambda: pq(keys, 64, [1, 4, 10, 20, 40])),
    ]
    for name, settings, family in families:
        start = time.process_time()
        build = None
        for setting, search, shares in family():
            if build is None:
                build = time.process_time() - start
            found, micros = timed(search, queries, group)
            scored, codes = shares(PASSES * len(queries))
            by_head = recalls(found, truth, group)
            yield {
                "head": head,
                "index": name,
                "settings": settings | setting,
                "recall_at_100": round(float(by_head.mean()), 4),
                "recall_at_100_by_head": [round(float(r), 4) for r in by_head],
                "keys_scored": round(scored, 5),
                "codes_scored": codes,
                "micros": round(micros, 1),
                "build_core_seconds": round(build, 2),
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=pathlib.Path)
    parser.add_argument("heads", nargs="+", metavar="HEAD")
    parser.add_argument("--prefix", default="code32")
    parser.add_argument("--steps", type=int, default=128, help="evenly spread")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    results = []
    for head in arguments.heads:
        keys = numpy.ascontiguousarray(load(arguments.traces / f"{arguments.prefix}.{head}.safetensors", "k"))
        decode = load(arguments.traces / f"{arguments.prefix}.queries.safetensors", f"{head}.q_decode")
        steps = min(arguments.steps, len(decode))
        chosen = decode[[i * len(decode) // steps for i in range(steps)]]
        queries = numpy.ascontiguousarray(chosen.reshape(-1, keys.shape[1]))
        truth = numpy.argpartition(-(queries @ keys.T), TOP, axis=1)[:, :TOP]
        for result in measure(head, decode.shape[1], keys, queries, truth):
            print(json.dumps(result), file=sys.stderr)
            results.append(result)
    report = {
        "machine": {"cpu": cpu(), "faiss_code": simd()},
        "command": f"bench/faiss_bench.py TRACES {' '.join(arguments.heads)} --prefix {arguments.prefix} "
        f"--steps {arguments.steps}",
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
        ).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "faiss": faiss.__version__,
        "faiss_built_for": faiss.get_compile_options().split(),
        "threads": 1,
    }
    lines = ",\n".join(json.dumps(result) for result in results)
    text = json.dumps(report, indent=1)[:-2] + f',\n "results": [\n{lines}\n]}}\n'
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
