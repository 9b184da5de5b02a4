#!/usr/bin/env python3
"""Checks that the folders are layers: who may include whom, and which third-party headers where.

The table is the one of docs/architecture.md. Usage: layers_test.py REPOSITORY
"""

import pathlib
import re
import sys

# Folder -> folders of ours that it may include (itself is always fine).
LAYERS = {
    "kernels": set(),
    "proto": set(),
    "transport": set(),
    "index": {"kernels"},
    "service": {"index", "kernels", "proto", "transport"},
    "client": {"kernels", "proto", "transport"},
    "cli": {"client", "service", "index", "kernels", "proto", "transport"},
    "examples": {"client", "kernels"},
    "bench": {"cli", "client", "service", "index", "kernels", "proto", "transport", "tests"},
    "tests": {"bench", "cli", "client", "service", "index", "kernels", "proto", "transport"},
}
OURS = set(LAYERS)

# Third-party include prefix -> folders that may use it; what is not listed is the standard library or the system.
LIBRARIES = {
    r"hwy/": {"kernels", "cli"},
    r"(cuda|cublas)": {"kernels", "client", "examples", "tests", "bench"},
    r"absl/": OURS - {"kernels"},
    r"google/protobuf/": {"proto", "service", "client", "tests"},
    r"xxhash\.h": {"proto"},
    r"(faiss/|omp\.h)": {"index", "bench"},
    r"boost/": {"service", "client", "transport", "tests"},
    r"spdlog/": {"service", "cli"},
    r"CLI/": {"service", "cli", "bench"},
    r"nlohmann/": {"cli", "tests", "bench"},
    r"(gtest|gmock)/": {"tests"},
    r"benchmark/": {"bench"},
}
# Asio is a matter of the network files alone.
BOOST_FILES = re.compile(
    r"^(service/(answer_writer|connection|server|daemon|listener)|client/(channel|kv_client|connector)|transport/)\S*\.(cc|h)$|^tests/"
)
# FAISS runs k-means for the cluster index, and stands beside ours in benchmarks.
FAISS_FILES = re.compile(r"^(index/kmeans\.cc$|bench/)")
# CUDA is for the GPU kernels and for the decoder's files that move rows; all else builds without it.
CUDA_FILES = re.compile(
    r"^(kernels/cuda/|tests/kernels/cuda/|client/sparse_decoder\.|tests/client/decoder/(decoder|sparse_decoder)_"
    r"|client/decoder/(block_uploader|decode_step|decoder_options|far_store|gpu_memory|prefill)\.|examples/|bench/)"
)
# Vector intrinsics stay in the CPU kernels.
INTRINSICS = re.compile(r"^(immintrin|x86intrin|arm_neon)\.h$")

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]')


def problems(root):
    for path in sorted(root.rglob("*")):
        if path.suffix not in {".cc", ".h", ".cu", ".cuh"}:
            continue
        name = path.relative_to(root).as_posix()
        folder = name.split("/")[0]
        if folder not in LAYERS or "/consumer/" in name:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            header = match.group(1)
            where = f"{name}:{number}"
            top = header.split("/")[0]
            if "/" in header and top in OURS:
                if top != folder and top not in LAYERS[folder]:
                    yield f"{where}: {folder} may not include {header}"
                continue
            if INTRINSICS.match(header) and not name.startswith("kernels/cpu/"):
                yield f"{where}: intrinsics belong in kernels/cpu"
            for pattern, folders in LIBRARIES.items():
                if re.match(pattern, header) and folder not in folders:
                    yield f"{where}: {folder} may not use {header}"
            if re.match(r"cuda|cublas|kernels/cuda/", header) and not CUDA_FILES.match(name):
                yield f"{where}: CUDA belongs in the GPU's files"
            if re.match(r"faiss/|omp\.h", header) and not FAISS_FILES.match(name):
                yield f"{where}: FAISS belongs in index/kmeans.cc"
            if header.startswith("boost/") and not BOOST_FILES.match(name):
                yield f"{where}: Boost belongs in the network files"


def main():
    root = pathlib.Path(sys.argv[1])
    found = list(problems(root))
    for line in found:
        print(line)
    # The check itself must be able to fail.
    assert INCLUDE.match('#include "service/daemon.h"').group(1) == "service/daemon.h"
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
