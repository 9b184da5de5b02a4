#!/usr/bin/env python3
"""Times FAISS's IVF-Flat and HNSW at a recall beside the ladder, one thread each, on the same recorded heads.

faiss_compare.py TRACES [--heads HEAD,...] [--kvseek PROGRAM] [--steps 128] [--repetitions 5] [--recall 0.95]
                 [--command TEXT] [--out FILE.json]

TRACES as for faiss_bench.py, which has the tensors' names and what FAISS is set up with. scripts/faiss_compare.sh
installs what is needed and calls this.

All answer for the same steps, all query heads of a step at once. FAISS gets, of a few settings, the fastest whose mean
recall@100 is at least the one asked for; where none has it, the one that comes nearest. The ladder (`kvseek eval`, 2 bits a
dimension, 64 exact rows a head) gets the fewest candidates that have that recall, and its default 4096. FAISS's time is
that of finding ids, the ladder's that of whole answers. Times are medians over the steps, which neighbours on the
machine disturb least. Repetitions alternate between all; kept are the fastest repetition's time, and as ratios to the
ladder that of these times and the median of the repetitions'.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import time

import faiss
import numpy
from faiss_bench import TOP, cpu, load, recalls, simd

CANDIDATES = [512, 640, 768, 896, 1024, 1280, 1536, 2048, 4096]  # of the ladder, a group
DEFAULT = "ladder, 4096 candidates"
LISTS = [256, 512, 1024]
EFS = [200, 400, 800, 1600, 3200]


def ladder(arguments, head, candidates):
    """Exact, and the ladder with each of `candidates`: recall, the median time of a step in us, and bytes read."""
    command = [
        *(arguments.kvseek, "eval", "--kv", str(arguments.traces / f"{arguments.prefix}.{head}.safetensors")),
        *("--queries", str(arguments.traces / f"{arguments.prefix}.queries.safetensors"), "--head", head),
        *("--index", "exact,ladder", "--scan", "sign2", "--candidates", ",".join(map(str, candidates)), "--exact", "64"),
        *("--steps", str(arguments.steps), "--audit", "0", "--format", "json"),
    ]
    results = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["results"]
    found = {}
    for result in results:
        name = "exact" if result["index"] == "exact" else f"ladder, {result['settings']['candidates']} candidates"
        found[name] = {
            "recall_at_100": round(result["recall_at_100"], 4),
            "micros": result["micros"]["p50"],
            "bytes_read": round(result["bytes_read"]),
        }
    return found


class Subject:
    """A FAISS index at one setting."""

    def __init__(self, name, index, setting):
        self.name, self.index, self.setting = name, index, setting

    def apply(self):
        for key, value in self.setting.items():
            if key == "ef_search":
                self.index.hnsw.efSearch = value
            elif key == "nprobe":
                self.index.nprobe = value

    def measure(self, queries, truth, group):
        """Recall, and the median time of a step in us."""
        self.apply()
        found, seconds = [], []
        for i in range(0, len(queries), group):
            start = time.perf_counter()
            found.append(self.index.search(queries[i : i + group], TOP)[1])
            seconds.append(time.perf_counter() - start)
        return float(recalls(numpy.concatenate(found), truth, group).mean()), statistics.median(seconds) * 1e6


def smallest(low, high, good):
    """The smallest number of [low, high] that is good; high if none is."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle + 1, high)
    return low


def ivf(keys, queries, truth, group, recall):
    """For each number of lists the smallest nprobe with the recall."""
    for lists in LISTS:
        index = faiss.index_factory(keys.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(keys)
        index.add(keys)

        def good(nprobe):
            return Subject("", index, {"nprobe": nprobe}).measure(queries, truth, group)[0] >= recall

        yield Subject("FAISS IVF-Flat", index, {"lists": lists, "nprobe": smallest(1, lists, good)})


def hnsw(keys, queries, truth, group, recall):
    """The smallest of EFS with the recall, else the one that comes nearest."""
    index = faiss.IndexHNSWFlat(keys.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 200
    index.add(keys)
    subjects = [Subject("FAISS HNSW", index, {"degree": 32, "ef_search": ef}) for ef in EFS]
    best = None
    for subject in subjects:
        reached = subject.measure(queries, truth, group)[0]
        if reached >= recall:
            return subject
        if best is None or reached > best[0]:
            best = (reached, subject)
    return best[1]


def compare(arguments, head):
    keys = numpy.ascontiguousarray(load(arguments.traces / f"{arguments.prefix}.{head}.safetensors", "k"))
    decode = load(arguments.traces / f"{arguments.prefix}.queries.safetensors", f"{head}.q_decode")
    steps = min(arguments.steps, len(decode))
    chosen = decode[[i * len(decode) // steps for i in range(steps)]]
    group = decode.shape[1]
    queries = numpy.ascontiguousarray(chosen.reshape(-1, keys.shape[1]))
    truth = numpy.argpartition(-(queries @ keys.T), TOP, axis=1)[:, :TOP]
    wanted = (queries, truth, group, arguments.recall)
    fastest = min(ivf(keys, *wanted), key=lambda s: min(s.measure(queries, truth, group)[1] for _ in range(3)))
    subjects = [fastest, hnsw(keys, *wanted)]

    tried = ladder(arguments, head, CANDIDATES)
    fewest = next(c for c in CANDIDATES if tried[f"ladder, {c} candidates"]["recall_at_100"] >= arguments.recall)
    rounds = []
    for _ in range(arguments.repetitions):
        one = ladder(arguments, head, sorted({fewest, CANDIDATES[-1]}))
        for subject in subjects:
            recall, micros = subject.measure(queries, truth, group)
            one[subject.name] = {"recall_at_100": round(recall, 4), "micros": micros}
        rounds.append(one)
    settings = {subject.name: subject.setting for subject in subjects}
    for name in rounds[0]:
        times = [one[name]["micros"] for one in rounds]
        over = {}
        for title, reference in (("ladder", f"ladder, {fewest} candidates"), ("default_ladder", DEFAULT)):
            others = [one[reference]["micros"] for one in rounds]
            over[title] = {
                "of_fastest": round(min(times) / min(others), 2),
                "median": round(statistics.median(t / o for t, o in zip(times, others)), 2),
            }
        yield {
            "head": head,
            "group": group,
            "index": name,
            **({"settings": settings[name]} if name in settings else {}),
            **rounds[0][name],
            "micros": round(min(times), 1),
            "micros_all": [round(t, 1) for t in times],
            "times": over,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=pathlib.Path)
    parser.add_argument("--heads", default="layer2.kv1,layer15.kv1,layer20.kv0")
    parser.add_argument("--prefix", default="code32")
    parser.add_argument("--kvseek", default="build/release/bin/kvseek")
    parser.add_argument("--steps", type=int, default=128, help="evenly spread")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--command", default="", help="what the results say they were made with")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    results = []
    print(f"{'head':12} {'index':24} {'recall@100':>10} {'us a step':>10} {'x ladder':>9} {'x default':>9}  settings")
    for head in arguments.heads.split(","):
        for result in compare(arguments, head):
            print(
                f"{head:12} {result['index']:24} {result['recall_at_100']:10.3f} {result['micros']:10.0f} "
                f"{result['times']['ladder']['of_fastest']:9.2f} {result['times']['default_ladder']['of_fastest']:9.2f}  "
                f"{result.get('settings', '')}",
                flush=True,
            )
            results.append(result)
    report = {
        "machine": {"cpu": cpu(), "faiss_code": simd()},
        "command": arguments.command or " ".join(sys.argv),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
        ).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "faiss": faiss.__version__,
        "threads": 1,
        "steps": arguments.steps,
        "repetitions": arguments.repetitions,
        "recall_wanted": arguments.recall,
    }
    if arguments.out:
        lines = ",\n".join(json.dumps(result) for result in results)
        arguments.out.write_text(json.dumps(report, indent=1)[:-2] + f',\n "results": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
