"""Every picture of a table inspected, in parallel; what an earlier scan saw of a file is kept."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.console import progress
from twotower.data.pairs import PairTable
from twotower.data.places import state_of
from twotower.quality.picture import THUMB, Inspected, Limits, inspect

log = logging.getLogger(__name__)

VERSION = b"1"  # of what `inspect` finds; another number makes earlier scans void
CHUNK = 64  # files a task
AHEAD = 4  # tasks a worker that wait
SCHEMA = pa.schema(
    [
        ("path", pa.large_string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("fault", pa.string()),
        ("reason", pa.string()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("traits", pa.list_(pa.string())),
        ("bytes_hash", pa.binary(16)),
        ("pixels_hash", pa.binary(16)),
        ("thumb", pa.binary(THUMB)),
    ]
)


def scan(pairs: PairTable, limits: Limits, num_workers: int, kept: Path) -> pa.Table:
    """What every picture is: a row of `SCHEMA` for each row of `pairs`.

    Files whose size and time are those of the scan in the file `kept` are not read again; the new
    scan takes its place, and so does what there is of one that is stopped.

    Args:
        num_workers: processes; 0 is one a core, 1 works in this process.

    Raises:
        ConfigError: `kept` cannot be written.
    """
    paths = [os.path.abspath(pairs.path(row)) for row in range(len(pairs))]
    known = _known(kept, limits)
    earlier = np.array([_seen_before(path, known) for path in paths], np.int64)
    new = np.flatnonzero(earlier < 0)
    workers = num_workers or len(os.sched_getaffinity(0))
    tables = [SCHEMA.empty_table()] if known is None else [known.table]
    places = earlier.copy()
    places[new] = len(tables[0]) + np.arange(len(new))
    try:
        with progress("verifying", len(paths), "images") as line:
            line.skip(len(paths) - len(new))
            for table in _inspect_all([paths[row] for row in new], limits, workers):
                tables.append(table)
                line.advance(len(table))
    except BaseException:  # stopped by the user, say: the next scan goes on from here
        _keep(pa.concat_tables(tables), limits, kept)
        raise
    found = pa.concat_tables(tables).take(pa.array(places)).combine_chunks()
    if len(new) or known is None or len(known.table) != len(found):
        _keep(found, limits, kept)
    return found


def _keep(found: pa.Table, limits: Limits, kept: Path) -> None:
    with replacing(kept) as temporary:
        pq.write_table(found.replace_schema_metadata(_metadata(limits)), temporary)


class _Known:
    """An earlier scan, and where its files stand in it."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.places = {path: row for row, path in enumerate(table["path"].to_pylist())}
        self.sizes = table["size"].to_numpy()
        self.times = table["mtime_ns"].to_numpy()


def _metadata(limits: Limits) -> dict[bytes, bytes]:
    return {b"scan": b"%b/%d/%d" % (VERSION, limits.max_pixels, limits.min_side)}


def _known(kept: Path, limits: Limits) -> _Known | None:
    if not kept.is_file():
        return None
    try:
        table = pq.read_table(kept)
    except (OSError, pa.ArrowException):
        log.warning("%s is damaged; every picture is verified anew", kept)
        return None
    if table.schema.metadata != _metadata(limits) or table.column_names != SCHEMA.names:
        return None
    return _Known(table.replace_schema_metadata(None).cast(SCHEMA))


def _seen_before(path: str, known: _Known | None) -> int:
    """The row of an unchanged file in an earlier scan; -1 if there is none."""
    row = -1 if known is None else known.places.get(path, -1)
    if known is None or row < 0:
        return -1
    try:
        state = state_of(path)
    except OSError:
        return -1
    same = state == (known.sizes[row], known.times[row])
    return row if same else -1


def inspect_files(paths: Sequence[str], limits: Limits) -> pa.Table:
    """A row of `SCHEMA` a file."""
    return _table(paths, [inspect(Path(path), limits) for path in paths])


def _table(paths: Sequence[str], found: Sequence[Inspected]) -> pa.Table:
    columns = [pa.array(paths, SCHEMA.field(0).type)]
    columns += [
        pa.array(column, SCHEMA.field(name).type)
        for name, column in zip(Inspected._fields, zip(*found, strict=True), strict=True)
    ]
    return pa.table(columns, schema=SCHEMA)


def _inspect_all(paths: Sequence[str], limits: Limits, workers: int) -> Iterator[pa.Table]:
    """The files' rows, in order, whatever the number of processes."""
    chunks = [paths[first : first + CHUNK] for first in range(0, len(paths), CHUNK)]
    if workers == 1 or len(chunks) < 2:
        for chunk in chunks:
            yield inspect_files(chunk, limits)
        return
    done = 0
    while done < len(chunks):
        try:
            for table in _in_processes(chunks[done:], limits, min(workers, len(chunks))):
                yield table
                done += 1
        except BrokenProcessPool:
            yield pa.concat_tables([_alone(path, limits) for path in chunks[done]])
            done += 1


def _in_processes(
    chunks: Sequence[Sequence[str]], limits: Limits, workers: int
) -> Iterator[pa.Table]:
    with _pool(workers) as pool:
        waiting: dict[int, Future[pa.Table]] = {}
        sent = 0
        for number in range(len(chunks)):
            while sent < len(chunks) and len(waiting) < AHEAD * workers:
                waiting[sent] = pool.submit(inspect_files, chunks[sent], limits)
                sent += 1
            yield waiting.pop(number).result()


def _alone(path: str, limits: Limits) -> pa.Table:
    """A file in a process of its own, since one of its chunk has ended a process."""
    with _pool(1) as pool:
        future = pool.submit(inspect_files, [path], limits)
        wait([future], return_when=FIRST_COMPLETED)
        if not isinstance(future.exception(), BrokenProcessPool):
            return future.result()
    return _table([path], [Inspected(fault="unreadable", reason="it ends the decoder's process")])


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not plain forks: this process has threads (torch's, the progress bar's) that hold locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["twotower.quality.scan"])
    return ProcessPoolExecutor(workers, context, _leave_signals)


def _leave_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer


def thumbs_of(found: pa.Table) -> npt.NDArray[np.uint8]:
    """The thumbs of rows that all have one: (N, THUMB) uint8, without a copy where possible."""
    column = found["thumb"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    start = column.offset * THUMB
    values = np.frombuffer(column.buffers()[1] or b"", np.uint8)
    return values[start : start + len(column) * THUMB].reshape(len(column), THUMB)


def has_picture(found: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows decode without a fault: (N,)."""
    there: npt.NDArray[np.bool_] = np.asarray(pc.equal(found["fault"], ""))
    return there
