"""What every search index does, whatever is inside, and what all of them do alike."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from twotower.config import IndexConfig, Metric
from twotower.retrieval.engine import IndexRegistry
from twotower.settings import ConfigError

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]
AnyFloatArray = npt.NDArray[np.floating]

NO_ID = -1
_CHUNK = 8192  # rows widened to fp64 at a time: 32 MB at 512 dimensions


class Modality(enum.Enum):
    """Which embeddings of a store are searched."""

    images = "images"
    texts = "texts"


class SearchResult(NamedTuple):
    """The best k rows a query, best first: scores (Q, k) float32 and ids (Q, k) int64.

    Scores that are equal in fp32 stand in ascending order of id. An index with fewer than k rows
    pads with score -inf and id -1.
    """

    scores: FloatArray
    ids: IdArray


class VectorIndex(Protocol):
    """Rows of dimension `dim` with int64 ids, searched by cosine or inner product.

    Built empty by `INDEXES.build(config, dim)`; saved and loaded by `retrieval/saved.py`.
    """

    @property
    def config(self) -> IndexConfig:
        """What it was built from."""

    @property
    def dim(self) -> int:
        """Values a vector."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes that the index holds."""

    @property
    def train_rows(self) -> int:
        """How many rows it wants to `train` on before the first `add`; 0 if it learns nothing."""

    def train(self, rows: AnyFloatArray, *, normalized: bool = False) -> None:
        """Learn centroids and the like from a sample (N, dim), if there is anything to learn.

        Raises:
            ConfigError: too few rows for what is to be learnt.
        """

    def add(
        self, rows: AnyFloatArray, ids: IdArray | None = None, *, normalized: bool = False
    ) -> None:
        """Add rows (N, dim), by default with the next ids.

        With metric=cosine rows are divided by their norm once, here; `normalized` says that they
        are of unit norm already, as a store's are, and are to be used exactly as they stand.

        Raises:
            ConfigError: another dimension, a value NaN or infinite, an id negative or taken.
        """

    def delete(self, ids: IdArray) -> None:
        """Delete rows (N,) by their ids, which are not given again by themselves.

        Raises:
            ConfigError: an id is not in the index or stands there twice, or this kind of index
                cannot delete.
        """

    def search(self, queries: AnyFloatArray, k: int) -> SearchResult:
        """The k best rows of each query (Q, dim).

        Raises:
            ConfigError: k is below 1, the dimension differs, or a value is NaN or infinite.
        """

    def write(self, file: Path) -> None:
        """Write the rows and what was learnt to a new file."""

    def read(self, file: Path) -> None:
        """Take over what `write` wrote; the index must be empty."""


INDEXES: IndexRegistry[VectorIndex] = IndexRegistry("index")


class RowIds:
    """The ids of an index's rows in the order of adding: unique, not negative, never changed.

    The place of a deleted row holds a negative number.
    """

    def __init__(self) -> None:
        self._parts: list[IdArray] = []
        self._next = 0
        self._size = 0
        self._order: IdArray | None = None  # places by id, until there are others
        self._deleted: IdArray = np.empty(0, np.int64)  # places, ascending

    @property
    def alive(self) -> int:
        """How many there are."""
        return self._size - len(self._deleted)

    def offer(self, count: int, ids: IdArray | None) -> IdArray:
        """`count` ids that may be taken, by default the next ones; none is taken yet.

        Raises:
            ConfigError: there are not `count` of them, or one is negative or taken.
        """
        if ids is None:
            return np.arange(self._next, self._next + count, dtype=np.int64)
        new = np.array(ids, dtype=np.int64)
        if new.shape != (count,):
            raise ConfigError(f"{count} rows cannot have ids of shape {new.shape}")
        self._check(new)
        return new

    def extend(self, count: int, ids: IdArray | None) -> IdArray:
        """Take `count` more ids, by default the next ones, and return them; see `offer`."""
        new = self.offer(count, ids)
        if count:
            self._parts.append(new)
            self._next = max(self._next, int(new.max()) + 1)
            self._size += count
            self._order = None
        return new

    def restore(self, array: IdArray) -> None:
        """Take over what `array` gave, deleted places with it; there must be no ids yet."""
        self._deleted = np.flatnonzero(array < 0)
        array[self._deleted] = NO_ID - 1 - self._deleted
        self._parts, self._size = [array], len(array)
        self._next = max(0, int(array.max()) + 1) if len(array) else 0

    def places(self, ids: IdArray) -> IdArray:
        """The places (N,) of ids (N,); -1 for one that is not there."""
        known = self.array
        if self._order is None:
            self._order = np.argsort(known, kind="stable")
        if not len(known):
            return np.full(len(ids), -1)
        place = np.searchsorted(known, ids, sorter=self._order)
        found = self._order[np.minimum(place, len(known) - 1)]
        places: IdArray = np.where((known[found] == ids) & (ids >= 0), found, -1)
        return places

    def check(self, ids: IdArray) -> IdArray:
        """The places of ids that are to be deleted.

        Raises:
            ConfigError: one is not there, or stands there twice.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        places = self.places(ids)
        if (places < 0).any():
            raise ConfigError(f"row id {ids[places.argmin()]} is not in the index")
        values, counts = np.unique(ids, return_counts=True)
        if len(values) < len(ids):
            raise ConfigError(f"row id {values[counts.argmax()]} cannot be deleted twice")
        return places

    def delete(self, ids: IdArray) -> IdArray:
        """Forget ids, and return their places.

        Raises:
            ConfigError: one is not there, or stands there twice.
        """
        places = self.check(ids)
        if len(places):
            array = self.array.copy()  # a search may hold the other
            array[places] = NO_ID - 1 - places
            self._parts, self._order = [array], None
            self._deleted = np.union1d(self._deleted, places)
        return places

    def deleted(self, start: int, stop: int) -> IdArray:
        """The places of deleted rows from start to stop - 1, counted from start."""
        low, high = np.searchsorted(self._deleted, (start, stop))
        return self._deleted[low:high] - start

    def _check(self, new: IdArray) -> None:
        if not len(new):
            return
        if new.min() < 0:
            raise ConfigError(f"row ids must not be negative, but one is {new.min()}")
        if new[0] >= self._next and bool((np.diff(new) > 0).all()):
            return  # ascending beyond the known ones, as a store's shards are: nothing to compare
        values, counts = np.unique(np.concatenate([self.array, new]), return_counts=True)
        if counts.max() > 1:
            raise ConfigError(f"row id {values[counts.argmax()]} is taken already; ids are unique")

    @property
    def array(self) -> IdArray:
        """All ids (N,) int64, in the order of adding."""
        if len(self._parts) != 1:
            joined = np.concatenate(self._parts) if self._parts else np.empty(0, np.int64)
            self._parts = [joined]
        return self._parts[0]


def chunks(rows: AnyFloatArray) -> Iterator[tuple[int, AnyFloatArray]]:
    """`rows` a few thousand at a time, each with the number of its first row."""
    for start in range(0, len(rows), _CHUNK):
        yield start, rows[start : start + _CHUNK]


def check_rows(rows: AnyFloatArray, dim: int, what: str = "row") -> AnyFloatArray:
    """`rows` as it is, if it is (N, dim), floating and finite in fp32.

    Raises:
        ConfigError: it is not; the sentence names the first bad row.
    """
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise ConfigError(
            f"{what}s have shape {rows.shape}, but this index holds vectors of dimension {dim}"
        )
    if not np.issubdtype(rows.dtype, np.floating):
        raise ConfigError(f"{what}s must be floating-point numbers, not {rows.dtype}")
    largest = np.finfo(np.float32).max
    for start, chunk in chunks(rows):
        # False for NaN too; fp64 values that fp32 cannot hold count as infinite.
        good = (np.abs(chunk) <= largest).all(axis=1)
        if not good.all():
            raise ConfigError(
                f"{what} {start + int(good.argmin())} holds NaN or infinity; encode it again, or "
                "leave it out"
            )
    return rows


def norms_of(rows: AnyFloatArray) -> npt.NDArray[np.float64]:
    """The Euclidean norms (N,) of rows (N, D), in fp64 so that none over- or underflows."""
    norms = np.empty(len(rows), np.float64)
    for start, chunk in chunks(rows):
        wide = chunk.astype(np.float64)
        norms[start : start + len(chunk)] = np.sqrt((wide * wide).sum(axis=1))
    return norms


def divisors(rows: AnyFloatArray) -> npt.NDArray[np.float64]:
    """Norms (N,) to divide by; 1 for a zero row, which stays zero."""
    norms = norms_of(rows)
    return np.where(norms > 0, norms, 1)


def unit_rows(rows: AnyFloatArray) -> FloatArray:
    """Rows (N, D) divided by their norms in fp64, as fp32; a zero row stays zero."""
    unit = np.empty(rows.shape, np.float32)
    for start, chunk in chunks(rows):
        unit[start : start + len(chunk)] = chunk / divisors(chunk)[:, None]
    return unit


def as_searched(rows: AnyFloatArray, metric: Metric, normalized: bool) -> FloatArray:
    """Rows or queries as the inner product takes them, fp32 (N, D): of unit norm for the cosine."""
    if metric is Metric.cosine and not normalized:
        return unit_rows(rows)
    return np.ascontiguousarray(rows, np.float32)


def check_query(queries: AnyFloatArray, dim: int, k: int) -> None:
    """Refuse what no index can answer.

    Raises:
        ConfigError: k is below 1, the dimension differs, or a value is NaN or infinite.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, not {k}")
    check_rows(queries, dim, "query")


def no_hits(num_queries: int, k: int) -> SearchResult:
    """A result of padding only: scores -inf, ids -1."""
    return SearchResult(
        np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), NO_ID, np.int64)
    )
