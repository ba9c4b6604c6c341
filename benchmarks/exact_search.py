"""`index=exact` beside FAISS's IndexFlatIP, default and tuned, on CLIP-like vectors.

    python benchmarks/exact_search.py                                   # 1,000,000 x 512, 2 threads
    python benchmarks/exact_search.py --rows 100000 --tier torch
    python benchmarks/exact_search.py --queries 1 16 --cross            # queries of another cone

The contenders take turns within a round, each with as many threads; ratios are of medians. Between
two there is a pause, as the one's threads would be waiting for work while the other is timed. Tuned
is the best of one thread, and of FAISS's matrix product at any number of queries. Rows of both
sides lie on huge pages: FAISS searches ours where its own copy would not (`knn` takes any array).
The index learns which part of its codes is best read first, and is timed once it knows. The
machine's read bandwidth and int8 rates are measured in the same rounds; shares are of their
medians, and may be above 1 where not all codes were read. The rates are those of vectors and, where
there is AMX, of matrices: `vector_share` and `int8_share`, else these two are the same.
Needs a C compiler for both limits. Answers are compared with FAISS's, up to ties.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from twotower.machine import processor
from twotower.retrieval.exact import ExactConfig, ExactIndex
from twotower.retrieval.faiss_index import import_faiss
from twotower.retrieval.index import FloatArray
from twotower.retrieval.scan.codes import huge_pages
from twotower.retrieval.scan.native_scan import NATIVE_QUERIES
from twotower.retrieval.scan.tiers import Tier, choose_tier, describe
from twotower.retrieval.synthetic import clip_like, queries_of

PAUSE = (
    0.1  # seconds: threads of BLAS and OpenMP wait for more work, and take time from whom is next
)
LEARNING = 20  # searches: which way is fastest, an index learns from three of each, and tries again
HEADINGS = "Q k ours_ms default_ms tuned_ms x_default x_tuned read_share vector_share int8_share"


def main() -> None:
    """Print a line for each number of queries and of results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 16, 256, 4096])
    parser.add_argument("--k", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="3 at most from 4096 queries on")
    parser.add_argument("--tier", choices=[tier.name for tier in Tier], default="auto")
    parser.add_argument("--cross", action="store_true", help="text-like queries: another cone")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds, on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss = import_faiss()
    faiss.omp_set_num_threads(options.threads)
    rows = clip_like(options.rows, options.dim)
    queries = queries_of(rows, max(options.queries), options.cross)
    index = ExactIndex(ExactConfig(tier=Tier[options.tier]), options.dim)
    started = time.perf_counter()
    index.add(rows, normalized=True)
    built = time.perf_counter() - started
    write(f"processor: {processor()}, {options.threads} threads; {describe()}")
    tier = choose_tier(Tier[options.tier]).name
    write(f"measured: tier {tier}, {options.rows:,} x {options.dim}")
    write(f"faiss {faiss.__version__}, {faiss.get_compile_options().strip()}")
    write(f"built in {built:.1f} s, {options.rows / built:,.0f} rows/s, {index.nbytes:,} bytes")
    with tempfile.TemporaryDirectory() as folder:
        limits = Limits(Path(folder), options.threads)
        write(" ".join(f"{name:>12}" for name in HEADINGS.split()))
        for count in options.queries:
            for k in options.k:
                compare(index, rows, queries[:count], k, limits, options)


def write(text: str) -> None:
    """To the terminal, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Limits:
    """What the machine can do, by limits.c."""

    def __init__(self, folder: Path, threads: int) -> None:
        source, library = Path(__file__).with_name("limits.c"), folder / "limits.so"
        flags = ["-O3", "-std=c11", "-fPIC", "-shared", "-pthread"]
        subprocess.run(["cc", *flags, "-o", library, source], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.read_rate.restype = self._library.int8_rate.restype = ctypes.c_double
        self._library.int8_name.restype = ctypes.c_char_p
        self.levels = [self._library.int8_level(vectors) for vectors in (True, False)]
        self._threads = ctypes.c_int64(threads)
        self._memory = huge_pages(1 << 29)
        self._memory[:] = 1

    def read(self) -> float:
        """Bytes a second."""
        start, size = self._memory.ctypes.data, self._memory.size
        rate = self._library.read_rate(ctypes.c_void_p(start), ctypes.c_int64(size), self._threads)
        return float(rate)

    def int8(self) -> list[float]:
        """Multiplications and additions a second: of vectors, and of matrices where they can be."""
        rates: dict[int, float] = {}
        for level in set(self.levels):
            steps = ctypes.c_int64(10_000_000)
            rates[level] = float(self._library.int8_rate(steps, self._threads, level))
        return [rates[level] for level in self.levels]

    def name(self, level: int) -> str:
        """Of what there is a rate."""
        return str(self._library.int8_name(level).decode())


class Contender(NamedTuple):
    name: str
    search: Callable[[], Any]


def contenders(
    index: ExactIndex, rows: FloatArray, queries: FloatArray, k: int, threads: int
) -> list[Contender]:
    """Ours, FAISS as it is, and FAISS as it may be set."""
    faiss = import_faiss()
    usual = faiss.cvar.distance_compute_blas_threshold

    def theirs(num_threads: int = threads, threshold: int = usual) -> Any:
        faiss.omp_set_num_threads(num_threads)
        faiss.cvar.distance_compute_blas_threshold = threshold
        try:
            return faiss.knn(queries, rows, k, metric=faiss.METRIC_INNER_PRODUCT)
        finally:
            faiss.omp_set_num_threads(threads)
            faiss.cvar.distance_compute_blas_threshold = usual

    made = [Contender("ours", lambda: index.search(queries, k)), Contender("default", theirs)]
    if len(queries) < 4096:  # beyond, the default is the matrix product with all threads
        made.append(Contender("one thread", lambda: theirs(num_threads=1)))
        made.append(Contender("product", lambda: theirs(threshold=1)))
    return made


def compare(
    index: ExactIndex,
    rows: FloatArray,
    queries: FloatArray,
    k: int,
    limits: Limits,
    options: argparse.Namespace,
) -> None:
    """Print one line."""
    clock = time.process_time if options.cpu else time.perf_counter
    sides = contenders(index, rows, queries, k, options.threads)
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    read, int8 = [], []
    answers = {side.name: side.search() for side in sides}  # and warm caches
    for _ in range(LEARNING if len(queries) <= NATIVE_QUERIES else LEARNING // 2):
        index.search(queries, k)
    rounds = min(options.rounds, 3) if len(queries) >= 4096 else options.rounds
    for _ in range(rounds):
        for side in sides:
            time.sleep(PAUSE)
            start = clock()
            side.search()
            seconds[side.name].append(clock() - start)
        read.append(limits.read())
        int8.append(limits.int8())
    check(answers["ours"], answers["default"])
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ours, default = median.pop("ours"), median["default"]
    tuned = min(median.values())
    codes = options.rows * options.dim
    peaks = [statistics.median(rates) for rates in zip(*int8, strict=True)]
    shares = [float("nan")] * 3
    if not options.cpu:  # the limits are in seconds of the clock on the wall
        shares[0] = codes / ours / statistics.median(read)
        done = 2 * codes * len(queries) / ours
        shares[1:] = [done / peak if peak else float("nan") for peak in peaks]
    times = [f"{1000 * value:12.2f}" for value in (ours, default, tuned)]
    ratios = [f"{value:12.2f}" for value in (default / ours, tuned / ours, *shares)]
    write(" ".join([f"{len(queries):>12} {k:>12}", *times, *ratios]))
    fastest = min(median, key=lambda name: median[name])
    bandwidth = statistics.median(read) / 1e9
    rates = dict(zip(limits.levels, peaks, strict=True))  # one, if vectors are all there is
    names = ", ".join(f"{limits.name(level)} {rate / 1e9:.0f}" for level, rate in rates.items())
    write(f"# tuned: {fastest}; read {bandwidth:.1f} GB/s; {names} GOP/s")


def check(ours: Any, theirs: Any) -> None:
    """Ids agree but for rows whose scores fp32 cannot tell apart."""
    differ = ours.ids != theirs[1]
    if np.abs(ours.scores - theirs[0])[differ].max(initial=0) > 2e-6:
        sys.exit("the answers differ")


if __name__ == "__main__":
    main()
