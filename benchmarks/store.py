"""A large synthetic store: the time and memory to open it, and to merge and verify it in a stream.

    python benchmarks/store.py --rows 1000000 --dim 512

Each measurement runs in a process of its own, which imports first and is measured after that. The
bounds are those that the project keeps: opened in less than 0.5 s and 100 MB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

SECONDS, MEGABYTES = 0.5, 100.0


def unit_noise(random: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Unit vectors (count, dim) fp32 of any direction."""
    vectors = random.standard_normal((count, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make(
    folder: Path,
    rows: int,
    dim: int,
    first: int,
    dtype: str = "fp16",
    draw: Callable[[np.random.Generator, int, int], np.ndarray] = unit_noise,
) -> None:
    """Write a finished store of drawn vectors, a shard after the other."""
    from twotower.embedding.layout import STATE_SCHEMA, Manifest
    from twotower.embedding.writer import ShardRows, StoreWriter

    mark = hashlib.sha256(str(folder).encode()).hexdigest()
    plan = Manifest(
        source_rows=rows,
        dim=dim,
        dtype=dtype,
        texts=False,
        shard_rows=65536,
        source=folder.name,
        source_fingerprint=mark,
        preprocessing="none",
    )
    writer = StoreWriter.begin(folder, plan)
    random = np.random.default_rng(first)
    for shard in writer.missing():
        ids = np.array(writer.plan.shard_range(shard))
        vectors = draw(random, len(ids), dim).astype(writer.plan.numpy_dtype)
        names = [f"/pictures/{first + n:09d}.jpg" for n in ids]
        metadata = pa.table(
            {
                "image_path": names,
                "caption": [f"picture number {first + n}" for n in ids],
                "row_id": ids,
                "source_row": ids,
            }
        )
        ones, empty = np.ones(len(ids), np.int64), [""] * len(ids)
        states = pa.table(
            [pa.array(names, pa.large_string()), ids, ones, ones, ones, empty, empty, empty],
            schema=STATE_SCHEMA,
        )
        writer.commit(shard, ShardRows(vectors, None, metadata, states, errors=[]))
    writer.finish()


def peak() -> float:
    """The most memory that this process has held since `forget_peak`, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> float:
    """Let the peak begin at what is held now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def open_and_map(folder: Path, *_: Path) -> None:
    """Open a store and map its vectors, as a search does."""
    from twotower.embedding.store import EmbeddingStore

    store = EmbeddingStore.open(folder)
    assert sum(len(rows) for rows in store.image_shards()) == len(store)


def merge(folder: Path, other: Path, output: Path) -> None:
    """Join the two stores."""
    from twotower.embedding.merge import merge_stores

    merge_stores([folder, other], output)


def verify(folder: Path, *_: Path) -> None:
    """Read every byte of a store."""
    from twotower.embedding.store import EmbeddingStore
    from twotower.embedding.verify import verify_store

    verify_store(EmbeddingStore.open(folder), None, 0, seed=0)


def measure(step: Callable[..., None], folders: list[Path], out: Path) -> None:
    """Run a step in this process; write its seconds and the memory beyond the imports."""
    import twotower.embedding.legacy
    import twotower.embedding.merge
    import twotower.embedding.verify  # noqa: F401

    before = forget_peak()
    start = time.perf_counter()
    step(*folders)
    seconds = time.perf_counter() - start
    out.write_text(json.dumps({"seconds": seconds, "mb": peak() - before}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where the stores are written; default /tmp")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        folders = [Path(root) / name for name in ("a", "b", "merged")]
        for number, count in enumerate((arguments.rows, max(1, arguments.rows // 10))):
            make(folders[number], count, arguments.dim, number * arguments.rows)
        write = sys.stdout.write
        size = sum(file.stat().st_size for file in folders[0].rglob("*") if file.is_file())
        write(f"{arguments.rows:,} rows of {arguments.dim}, fp16, {size / 1e6:,.0f} MB\n")
        found = {}
        for step in (open_and_map, merge, verify):
            out = Path(root) / "out.json"
            process = spawn.Process(target=measure, args=(step, folders, out))
            process.start()
            process.join()
            found[step.__name__] = json.loads(out.read_text())
            seconds, megabytes = found[step.__name__]["seconds"], found[step.__name__]["mb"]
            write(f"{step.__name__:<13} {seconds:8.3f} s  {megabytes:8.1f} MB\n")
    opened = found["open_and_map"]
    good = opened["seconds"] < SECONDS and opened["mb"] < MEGABYTES
    write(f"opening {'keeps' if good else 'BREAKS'} {SECONDS} s and {MEGABYTES:.0f} MB\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
