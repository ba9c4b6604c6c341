"""`index=exact memory=stored` on a store larger than memory should hold: build, search, save, load.

    python benchmarks/exact_store.py --folder /data                      # 5,000,000 x 512, fp32
    python benchmarks/exact_store.py --rows 20000 --dtype fp16 --threads 1

The store is CLIP-like (exact_search.py) and is removed afterwards; it takes 10 GB, the saved index
2.7 GB. One process builds, searches and saves, another loads and searches. Memory is the peak of
RssAnon + RssShmem of the whole process, imports included, sampled every 5 ms: what the kernel
cannot drop. Pages of mapped files (RssFile) it can, so they are printed apart, as held at the end.
`cold` latencies are those of the first queries once the store's files have left the page cache.
Answers are compared with scores in fp64 of all rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from store import make

from twotower.retrieval.index import AnyFloatArray, FloatArray, VectorIndex
from twotower.retrieval.synthetic import ClipLike, queries_of

GIGABYTES = 4.0  # that no phase may hold
K = 10
ROUNDS = {1: 20, 16: 10, 256: 3}  # searches by the number of queries
CHECKED = 4  # queries compared with all rows


class Phases:
    """Seconds and peak memory in GB of what a process does, one thing after the other."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, held())
            time.sleep(0.005)

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, float]]:
        """Time a phase; more can be noted in what is yielded."""
        noted: dict[str, float] = {}
        self._peak = held()
        start = time.perf_counter()
        yield noted
        seconds = time.perf_counter() - start
        peak = max(self._peak, held()) / 1e9
        self.found[name] = {"seconds": seconds, "gb": peak, "file_gb": held("File") / 1e9, **noted}


def held(*kinds: str) -> int:
    """Bytes of this process in memory that belong to no file, or of another kind."""
    names = [f"Rss{kind}:" for kind in kinds or ("Anon", "Shmem")]
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.split()[0] in names)


def search(index: VectorIndex, queries: FloatArray, noted: dict[str, float]) -> None:
    """Note the median milliseconds of searches with 1, 16 and 256 queries."""
    for count, rounds in ROUNDS.items():
        times = []
        for number in range(rounds):
            first = number * count % (len(queries) - count + 1)
            start = time.perf_counter()
            index.search(queries[first : first + count], K)
            times.append(time.perf_counter() - start)
        noted[f"ms at Q={count}"] = 1e3 * statistics.median(times)


def build(root: Path, threads: int, out: Path) -> None:
    """Build the index of the store, search it, save it."""
    import torch

    from twotower.embedding.store import EmbeddingStore
    from twotower.retrieval.build import build_index
    from twotower.retrieval.exact import ExactConfig, RowMemory
    from twotower.retrieval.saved import save_index

    torch.set_num_threads(threads)
    phases = Phases()
    with phases.phase("build"):
        store = EmbeddingStore.open(root / "store")
        index = build_index(ExactConfig(memory=RowMemory.stored), store)
    queries = queries_for(root)
    with phases.phase("search") as noted:
        search(index, queries, noted)
    with phases.phase("save"):
        save_index(index, root / "index")
    phases.found["save"]["index_gb"] = size_of(root / "index") / 1e9
    out.write_text(json.dumps(phases.found))


def load(root: Path, threads: int, out: Path) -> None:
    """Load the index, search it while the rows are on disk alone, and once more."""
    import torch

    from twotower.retrieval.saved import load_index

    torch.set_num_threads(threads)
    queries = queries_for(root)
    phases = Phases()
    with phases.phase("load"):
        index = load_index(root / "index")
    forget(root / "store")
    with phases.phase("search, cold") as noted:
        times = []
        for query in queries[-ROUNDS[1] :]:
            start = time.perf_counter()
            index.search(query[None], K)
            times.append(time.perf_counter() - start)
        noted["ms at Q=1"] = 1e3 * statistics.median(times)
        noted["ms of the first"] = 1e3 * times[0]
    with phases.phase("search, warm") as noted:
        search(index, queries, noted)
    check(root, index, queries[:CHECKED])
    out.write_text(json.dumps(phases.found))


def queries_for(root: Path) -> FloatArray:
    """As many queries as are needed, near rows of the first shard."""
    rows = np.load(root / "store" / "img_emb" / "img_emb_0000.npy", mmap_mode="r")
    return queries_of(np.array(rows[:20_000], np.float32), max(ROUNDS) + ROUNDS[1], False)


def forget(folder: Path) -> None:
    """Let the files of a folder leave the page cache, as far as no process has them mapped."""
    for path in folder.rglob("*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(root: Path, index: VectorIndex, queries: FloatArray) -> None:
    """Compare answers with the scores of all rows, summed in fp64."""
    from twotower.embedding.store import EmbeddingStore

    best = np.full((len(queries), K), -np.inf)
    for rows in EmbeddingStore.open(root / "store").image_shards():
        for start in range(0, len(rows), 4096):
            part: AnyFloatArray = rows[start : start + 4096].astype(np.float64)
            both = np.concatenate([best, queries.astype(np.float64) @ part.T], axis=1)
            best = -np.sort(-both, axis=1)[:, :K]
    found = index.search(queries, K).scores
    np.testing.assert_allclose(found, best / np.linalg.norm(queries, axis=1)[:, None], rtol=1e-6)


def size_of(folder: Path) -> int:
    """The bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> int:
    """Print a line a phase."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", choices=["fp16", "fp32"], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where store and index go; default /tmp")
    options = parser.parse_args()
    place = options.folder or Path(tempfile.gettempdir())
    needed = options.rows * (options.dim * (5 if options.dtype == "fp32" else 3) + 300)
    free = shutil.disk_usage(place).free
    if free < needed * 1.05:
        parser.error(f"{place} has {free / 1e9:.1f} GB free, and this takes {needed / 1e9:.1f} GB")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of NumPy in the processes to come
    write, spawn = sys.stdout.write, multiprocessing.get_context("spawn")
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=place, prefix="exact-store-") as name:
        root = Path(name)
        start = time.perf_counter()
        chunks = ClipLike(options.rows, options.dim).chunks()  # as many rows each as a shard
        drawn = (root / "store", options.rows, options.dim, 0, options.dtype)
        make(*drawn, draw=lambda rng, count, dim: next(chunks))
        about = (
            f"{options.rows:,} rows of {options.dim}, {options.dtype}, {options.threads} threads"
        )
        size, seconds = size_of(root / "store") / 1e9, time.perf_counter() - start
        write(f"{about}; {size:.2f} GB, made in {seconds:.0f} s\n")
        for step in (build, load):
            out = root / "found.json"
            process = spawn.Process(target=step, args=(root, options.threads, out))
            process.start()
            process.join()
            if process.exitcode:
                return 1
            for phase, found in json.loads(out.read_text()).items():
                if phase == "build":
                    found["rows/s"] = options.rows / found["seconds"]
                worst = max(worst, found["gb"])
                also = "".join(f"  {value:,.4g} {what}" for what, value in list(found.items())[3:])
                write(
                    f"{phase:<13} {found['seconds']:8.2f} s  {found['gb']:5.2f} GB in memory, "
                    f"{found['file_gb']:5.2f} of files{also}\n"
                )
                sys.stdout.flush()
    good = worst < GIGABYTES
    write(f"peak memory {worst:.2f} GB {'keeps' if good else 'BREAKS'} {GIGABYTES:g} GB\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
