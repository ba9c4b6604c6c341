"""Bytes a vector, rows a second and milliseconds a query of each index, for docs/scale.md.

    python benchmarks/bytes_per_vector.py                              # 25,000 and 50,000 x 512
    python benchmarks/bytes_per_vector.py --rows 500000 --threads 8 --only exact SQ8

Bytes are what the second half of the rows adds, so that centroids and the like do not count: in the
memory of the index (`nbytes`, without rows that stay in their file) and in the folder of a save.
Rows are built and one query a call is searched with `--threads` threads, on the machine as it is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from twotower.config import IndexConfig
from twotower.machine import processor
from twotower.retrieval import INDEXES
from twotower.retrieval.exact import ExactConfig, RowMemory
from twotower.retrieval.faiss_index import FaissConfig, import_faiss
from twotower.retrieval.index import FloatArray, VectorIndex
from twotower.retrieval.milvus.collection import MilvusConfig
from twotower.retrieval.saved import save_index
from twotower.retrieval.synthetic import clip_like, queries_of

CASES: dict[str, IndexConfig] = {
    "exact, rows in their file": ExactConfig(memory=RowMemory.stored),
    "exact fp16": ExactConfig(memory=RowMemory.fp16),
    "exact fp32": ExactConfig(),
    "Flat": FaissConfig(),
    "SQ8": FaissConfig(factory="SQ8"),
    "IVF256,SQ8": FaissConfig(factory="IVF256,SQ8", nprobe=16),
    "IVF256,PQ64": FaissConfig(factory="IVF256,PQ64", nprobe=16),
    "IVF256,RaBitQ": FaissConfig(factory="IVF256,RaBitQ", nprobe=16),
    "HNSW32": FaissConfig(factory="HNSW32", ef_search=64),
    "milvus-lite": MilvusConfig(),
}


class Measured(NamedTuple):
    """An index of some rows: bytes in memory and in its folder, seconds to build, ms a query."""

    memory: int
    folder: int
    seconds: float
    query: float


def main() -> None:
    """Print a line for each index."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="indexes whose names begin so")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import_faiss().omp_set_num_threads(options.threads)
    write(f"processor: {processor()}, {options.threads} threads; {options.rows:,} x {options.dim}")
    write(f"{'index':<28}{'memory':>8}{'folder':>8}{'rows/s':>10}{'ms/query':>10}")
    rows = clip_like(options.rows, options.dim)
    queries = queries_of(rows, 30, True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "rows.npy", rows)
        mapped = np.load(folder / "rows.npy", mmap_mode="r")
        for case, config in CASES.items():
            if options.only and not case.startswith(tuple(options.only)):
                continue
            half, whole = (
                measure(config, mapped[:count], queries, folder / f"{case} {count}")
                for count in (len(rows) // 2, len(rows))
            )
            added = len(rows) - len(rows) // 2
            memory, kept = (
                (whole.memory - half.memory) / added,
                (whole.folder - half.folder) / added,
            )
            speed = len(rows) / whole.seconds
            write(f"{case:<28}{memory:>8.0f}{kept:>8.0f}{speed:>10,.0f}{whole.query:>10.2f}")


def measure(config: IndexConfig, rows: FloatArray, queries: FloatArray, folder: Path) -> Measured:
    """Build an index of rows (N, D) that lie in a file, save it, and search it."""
    index = INDEXES.build(config, rows.shape[1])
    started = time.perf_counter()
    index.train(np.array(rows), normalized=True)
    index.add(rows, normalized=True)
    seconds = time.perf_counter() - started
    save_index(index, folder)
    places = [folder]
    if isinstance(config, MilvusConfig):
        places.append(Path(index.collection.uri))  # type: ignore[attr-defined]
    size = sum(file.stat().st_size for place in places for file in place.rglob("*"))
    in_file = rows.nbytes if config == CASES["exact, rows in their file"] else 0
    return Measured(index.nbytes - in_file, size, seconds, milliseconds(index, queries))


def milliseconds(index: VectorIndex, queries: FloatArray) -> float:
    """The median of one query a call, after three to warm up."""
    times = []
    for query in queries:
        started = time.perf_counter()
        index.search(query[None], 10)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[3:])


def write(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
