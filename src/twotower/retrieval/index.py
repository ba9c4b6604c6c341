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
Float64Array = npt.NDArray[np.float64]
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


def norms_of(rows: AnyFloatArray) -> Float64Array:
    """The Euclidean norms (N,) of rows (N, D), in fp64 so that none over- or underflows."""
    norms = np.empty(len(rows), np.float64)
    for start, chunk in chunks(rows):
        wide = chunk.astype(np.float64)
        norms[start : start + len(chunk)] = np.sqrt((wide * wide).sum(axis=1))
    return norms


def divisors(rows: AnyFloatArray) -> Float64Array:
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
