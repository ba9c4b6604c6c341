"""The C scan (scan.c) by ctypes, from where the package's build put it if there was a compiler."""

from __future__ import annotations

import ctypes
import enum
import logging
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from twotower.retrieval.index import AnyFloatArray, Float64Array, FloatArray, IdArray
from twotower.retrieval.scan.certificate import CodedRows, QueryCodes
from twotower.retrieval.scan.codes import PANEL, QUARTER, Bytes, Shard, huge_pages

log = logging.getLogger(__name__)

PEAKS = PANEL // QUARTER  # kept of a panel and query where not all is read at once
STREAM_BYTES = 1 << 23  # of codes that a thread takes at a time, at most
TURNED = 4  # vectors that are rotated at once
AMX = 3  # the level of tiles


class Stage(enum.IntEnum):
    """What is read of the codes of all rows."""

    head = 0
    front = 1  # and the head
    all = 2


class Scratch(NamedTuple):
    """Memory for what the first stage says: PEAKS a panel and query, PANEL a panel of one query.

    It may be for fewer panels than there are, and for none if all codes are read at once.
    """

    peaks: FloatArray
    dots: npt.NDArray[np.int32]
    kept: Bytes

    @classmethod
    def of(cls, count: int, panels: int) -> Scratch:
        """For so many queries and panels."""
        single = panels if count == 1 else 0
        peaks = huge_pages(4 * PEAKS * count * panels).view(np.float32)
        return cls(peaks, huge_pages(4 * PANEL * single).view(np.int32), huge_pages(single))


class _Shard(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("head", "front", "back")),
        ("scale", c_void_p),
        ("error", c_void_p),
        ("norm", c_void_p),
        ("tail_norm", c_void_p),
        ("back_norm", c_void_p),
        ("panels", c_int64),
        ("first", c_int64),
    ]


class _Part(Structure):
    _fields_ = [("rows", c_void_p), ("first", c_int64), ("half", c_int64)]


class _Job(Structure):
    _fields_ = [
        ("shards", POINTER(_Shard)),
        ("parts", POINTER(_Part)),
        ("ids", c_void_p),
        *((name, c_int64) for name in ("num_shards", "num_parts", "dim", "words")),
        *((name, c_int64) for name in ("head_words", "front_words", "back_words", "stage")),
        *((name, c_void_p) for name in ("query_codes", "query_scale", "query_error")),
        *((name, c_void_p) for name in ("query_tail_norm", "query_back_norm")),
        *((name, c_void_p) for name in ("queries", "query_norm", "query_centre")),
        *((name, c_int64) for name in ("num_queries", "k", "cosine", "threads", "level")),
        *((name, c_void_p) for name in ("peaks", "dots", "kept")),
        ("num_peaks", c_int64),
        *((name, c_void_p) for name in ("position", "score", "count")),
    ]


class CodedQueries(NamedTuple):
    """Queries (Q, dim) in fp64, their norms and products with the centre (Q,), and their codes.

    The codes' width is that of the rows, and so are their `parts`: head, front and back.
    """

    queries: Float64Array
    norm: Float64Array
    centre: Float64Array
    coded: QueryCodes
    parts: Sequence[tuple[int, int]]


class Found(NamedTuple):
    """Positions (Q, k) of the best rows, -1 beyond them, their scores, and the work it took.

    `read` is the share of the codes that was read, where that was not done at once; what is read
    again counts twice.
    """

    position: IdArray
    score: Float64Array
    collected: int
    reranked: int
    read: float | None = None


@cache
def library() -> ctypes.CDLL | None:
    """The C scan, or None where it was not built or cannot be loaded."""
    for file in sorted(Path(__file__).parent.glob("_scan*")):
        try:
            loaded = ctypes.CDLL(str(file))
            loaded.tt_search.argtypes = [POINTER(_Job)]
            loaded.tt_level_name.argtypes = [c_int]
            loaded.tt_level_name.restype = c_char_p
            loaded.tt_turn.restype = None
            loaded.tt_layout.restype = c_int64
            layout = 1000 * ctypes.sizeof(_Job) + ctypes.sizeof(_Shard)
            if loaded.tt_layout() != layout:
                raise AttributeError("it was built from another source; run pip install again")
        except (OSError, AttributeError) as error:
            log.debug("cannot use %s: %s", file, error)
            continue
        return loaded
    return None


def turn(vectors: Float64Array, columns: Sequence[FloatArray], threads: int) -> Float64Array:
    """Vectors (n, dim) times the matrices that stand along a diagonal, given by their columns.

    What `numpy.matmul` does; but BLAS keeps its threads spinning after a product, and a scan of a
    few milliseconds would share the processors with them.
    """
    loaded = library()
    assert loaded is not None
    dim = vectors.shape[1]
    padded = np.zeros((-(-len(vectors) // TURNED) * TURNED, dim))
    padded[: len(vectors)] = vectors
    out, start = np.empty_like(padded), 0
    for block in columns:
        where = (ctypes.c_void_p(array.ctypes.data + 8 * start) for array in (padded, out))
        source, target = where
        sizes = (ctypes.c_int64(size) for size in (len(padded), len(block), dim))
        turned = ctypes.c_void_p(_pointer(block))
        loaded.tt_turn(source, turned, *sizes, target, ctypes.c_int64(threads))
        start += len(block)
    return out[: len(vectors)]


@cache
def level() -> int:
    """Which variant of the scan this processor runs: 0 is plain C."""
    loaded = library()
    return loaded.tt_level() if loaded else 0


def level_name(number: int) -> str:
    """A level in words."""
    loaded = library()
    return loaded.tt_level_name(number).decode() if loaded else "none"


def search(
    shards: Sequence[Shard],
    parts: Sequence[tuple[int, AnyFloatArray]],
    ids: IdArray,
    queries: CodedQueries,
    k: int,
    *,
    cosine: bool,
    threads: int,
    level: int,
    stage: Stage,
    scratch: Scratch,
) -> Found:
    """The best k rows of each query; `parts` are rows, fp32 or fp16, with the first's position.

    `scratch` is what it takes to read some parts of the codes before others.

    Raises:
        MemoryError: there was not enough memory for the candidates.
    """
    loaded = library()
    assert loaded is not None
    position = np.full((len(queries.queries), k), -1, np.int64)
    score = np.empty(position.shape)
    count = np.zeros(4, np.int64)
    if position.size:
        wide = (queries.queries, queries.norm, queries.centre)
        job = _Job(
            (_Shard * len(shards))(*map(_shard, shards)),
            (_Part * len(parts))(*(_part(first, rows) for first, rows in parts)),
            _pointer(ids),
            *(len(shards), len(parts), queries.queries.shape[1]),
            queries.coded.codes.shape[1] // 4,
            *(*((stop - start) // 4 for start, stop in queries.parts), stage),
            *(_pointer(array) for array in (*queries.coded, *wide)),
            *(len(queries.queries), k, cosine, threads, level),
            *(_pointer(scratch.peaks), _pointer(scratch.dots), _pointer(scratch.kept)),
            scratch.peaks.size,
            *(_pointer(array) for array in (position, score, count)),
        )
        if loaded.tt_search(ctypes.byref(job)):
            raise MemoryError("no memory for the candidates of an exact search")
    read = 1 - float(count[3] / count[2]) if count[2] else None
    return Found(position, score, int(count[0]), int(count[1]), read)


def _shard(shard: Shard) -> _Shard:
    columns = (getattr(shard, name) for name in CodedRows._fields[1:])
    places = map(_pointer, (*shard.codes, *columns))
    return _Shard(*places, -(-shard.used // PANEL), shard.first)


def _part(first: int, rows: AnyFloatArray) -> _Part:
    assert rows.dtype in (np.float32, np.float16)
    return _Part(_pointer(rows), first, rows.dtype == np.float16)


def _pointer(array: npt.NDArray[np.generic]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
