"""The C scan (scan.c) by ctypes, from where the package's build put it if there was a compiler."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from twotower.retrieval.certificate import Float64Array, QueryCodes
from twotower.retrieval.codes import PANEL, Shard
from twotower.retrieval.index import AnyFloatArray, FloatArray, IdArray

log = logging.getLogger(__name__)

HEAD_QUERIES = 6  # TILE of scan.c: so many queries, at most, are scanned by their heads first
HEAD_NUMBERS = 65  # that are then kept of a panel and query
GROUP_BYTES = 1 << 23  # of codes that a thread takes at a time, at most
TURNED = 4  # vectors that are rotated at once


class _Shard(Structure):
    _fields_ = [
        ("codes", c_void_p),
        ("tail", c_void_p),
        ("scale", c_void_p),
        ("error", c_void_p),
        ("norm", c_void_p),
        ("tail_norm", c_void_p),
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
        ("head", c_int64),
        *((name, c_void_p) for name in ("query_codes", "query_scale", "query_error")),
        ("query_tail_norm", c_void_p),
        *((name, c_void_p) for name in ("queries", "query_norm", "query_centre")),
        *((name, c_int64) for name in ("num_queries", "k", "cosine", "threads", "level")),
        ("said", c_void_p),
        ("said_size", c_int64),
        *((name, c_void_p) for name in ("position", "score", "count")),
    ]


class CodedQueries(NamedTuple):
    """Queries (Q, dim) in fp64, their norms and products with the centre (Q,), and their codes.

    The codes' width is that of the rows, and the head's as many dimensions.
    """

    queries: Float64Array
    norm: Float64Array
    centre: Float64Array
    coded: QueryCodes
    head: int


class Found(NamedTuple):
    """Positions (Q, k) of the best rows, -1 beyond them, their scores, and the work it took.

    `opened` is the share of panels that had to be read beyond their heads, where these came first.
    """

    position: IdArray
    score: Float64Array
    collected: int
    reranked: int
    opened: float | None = None


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
    scratch: npt.NDArray[np.int32],
) -> Found:
    """The best k rows of each query; `parts` are rows, fp32 or fp16, with the first's position.

    `scratch` is what a few queries need to be scanned by their heads first; it may be empty.

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
            *(queries.coded.codes.shape[1] // 4, queries.head // 4),
            *(_pointer(array) for array in (*queries.coded, *wide)),
            *(len(queries.queries), k, cosine, threads, level),
            *(_pointer(scratch), scratch.size),
            *(_pointer(array) for array in (position, score, count)),
        )
        if loaded.tt_search(ctypes.byref(job)):
            raise MemoryError("no memory for the candidates of an exact search")
    opened = float(count[3] / count[2]) if count[2] else None
    return Found(position, score, int(count[0]), int(count[1]), opened)


def _shard(shard: Shard) -> _Shard:
    columns = (shard.codes, shard.tail, shard.scale, shard.error, shard.norm, shard.tail_norm)
    return _Shard(*map(_pointer, columns), -(-shard.used // PANEL), shard.first)


def _part(first: int, rows: AnyFloatArray) -> _Part:
    assert rows.dtype in (np.float32, np.float16)
    return _Part(_pointer(rows), first, rows.dtype == np.float16)


def _pointer(array: npt.NDArray[np.generic]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
