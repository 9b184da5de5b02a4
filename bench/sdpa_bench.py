#!/usr/bin/env python3
"""Decode attention of PyTorch, and of FlashInfer where it is installed, on the shapes of gpu_bench.

One query token, 8 KV heads, 4 query heads each, 128 dimensions, bf16. Prints a JSON line for each
measurement: the bytes of keys and values, and the median time of a call that finds them cold.

Usage: sdpa_bench.py [--batch 1,16] [--rows 4096,16384,131072]
"""

import argparse
import json
import statistics

import torch
from torch.nn.functional import scaled_dot_product_attention

KV_HEADS, GROUP, DIM = 8, 4, 128
PAGE_TOKENS = 16
COLD_BYTES = 400 << 20
REPEATS = 7


def median_seconds(call):
    """`call` gets a running number, to rotate its data."""

    def seconds(calls, first):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for number in range(first, first + calls):
            call(number)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls

    seconds(2, 0)
    calls = max(3, min(400, int(3e-3 / seconds(3, 2))))
    return statistics.median(seconds(calls, 5 + i * calls) for i in range(REPEATS))


def report(engine, batch, rows, byte_count, seconds):
    line = {
        "engine": engine,
        "device": torch.cuda.get_device_name(),
        "batch": batch,
        "rows": rows,
        "bytes": byte_count,
        "us": seconds * 1e6,
        "gb_s": byte_count / seconds * 1e-9,
    }
    print(json.dumps(line), flush=True)


def measure_sdpa(batch, rows):
    byte_count = 2 * batch * KV_HEADS * rows * DIM * 2
    variants = COLD_BYTES // byte_count + 1
    kv = torch.randn(variants, 2, batch, KV_HEADS, rows, DIM, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(batch, KV_HEADS * GROUP, 1, DIM, device="cuda", dtype=torch.bfloat16)

    def call(number):
        keys, values = kv[number % variants]
        scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    report("torch " + torch.__version__, batch, rows, byte_count, median_seconds(call))


def measure_flashinfer(flashinfer, batch, rows):
    byte_count = 2 * batch * KV_HEADS * rows * DIM * 2
    variants = COLD_BYTES // byte_count + 1
    pages = batch * rows // PAGE_TOKENS
    cache = torch.randn(
        variants, pages, 2, KV_HEADS, PAGE_TOKENS, DIM, device="cuda", dtype=torch.bfloat16
    )
    query = torch.randn(batch, KV_HEADS * GROUP, DIM, device="cuda", dtype=torch.bfloat16)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device="cuda") * (rows // PAGE_TOKENS),
        torch.randperm(pages, device="cuda").int(),
        torch.full((batch,), PAGE_TOKENS, dtype=torch.int32, device="cuda"),
        KV_HEADS * GROUP,
        KV_HEADS,
        DIM,
        PAGE_TOKENS,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    seconds = median_seconds(lambda number: wrapper.run(query, cache[number % variants]))
    report("flashinfer " + flashinfer.__version__, batch, rows, byte_count, seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="1,16", help="sequences, comma list")
    parser.add_argument("--rows", default="4096,16384,131072", help="of a sequence, comma list")
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return
    try:
        import flashinfer
    except ImportError:
        flashinfer = None
    for batch in map(int, flags.batch.split(",")):
        for rows in map(int, flags.rows.split(",")):
            measure_sdpa(batch, rows)
            if flashinfer is not None:
                measure_flashinfer(flashinfer, batch, rows)


if __name__ == "__main__":
    main()
