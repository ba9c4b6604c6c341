"""The rows of an exact index as they are searched, and their exact scores."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.config import Metric
from twotower.retrieval.index import (
    AnyFloatArray,
    Float64Array,
    IdArray,
    as_searched,
    divisors,
    norms_of,
)
from twotower.retrieval.row_files import RowFile
from twotower.retrieval.row_ids import RowIds
from twotower.settings import ConfigError

RERANK = 256  # rows scored exactly at a time: 1 MB at 512 dimensions, which stays in the cache
LARGEST_NORM = 1e38  # beyond it a partial sum could overflow fp32
MERGE_ROWS = 1 << 17  # parts are merged up to here, so that adding one by one makes no long list
KeptRows = tuple[AnyFloatArray, RowFile | None]  # rows, and where they lie outside of the index


class Part(NamedTuple):
    """Rows (n, dim) fp32 or fp16, their norms (n,), the position of the first.

    `file` says where they lie if that is outside of the index.
    """

    rows: AnyFloatArray
    norms: Float64Array
    start: int
    file: RowFile | None = None

    @property
    def tensor(self) -> Tensor:
        """The same rows for torch."""
        with warnings.catch_warnings():
            # A store's files are mapped read-only; torch warns of writing, and nothing here writes.
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(self.rows)


class Rows:
    """Rows in parts, one an `add` or several, with their ids; deleted rows keep their positions."""

    def __init__(self, dim: int, metric: Metric) -> None:
        self.dim = dim
        self.metric = metric
        self.parts: list[Part] = []
        self.ids = RowIds()
        self.size = 0  # positions, those of deleted rows with them
        self.at_random = False  # whether a search reads but a few rows, here and there

    def __len__(self) -> int:
        return self.ids.alive

    @property
    def nbytes(self) -> int:
        """Bytes of rows, norms and ids."""
        rows = sum(part.rows.nbytes + part.norms.nbytes for part in self.parts)
        return int(rows + self.ids.array.nbytes)

    def append(
        self, rows: AnyFloatArray, ids: IdArray | None, norms: Float64Array | None = None
    ) -> None:
        """Take over rows (n, dim), fp32 or fp16, with their ids, and their norms if known.

        Raises:
            ConfigError: an id is negative or taken, or a norm is beyond 1e38.
        """
        norms = norms_of(rows) if norms is None else norms
        if len(norms) and norms.max() > LARGEST_NORM:
            raise ConfigError(f"row {norms.argmax()} has norm {norms.max():.3g}, beyond 1e38")
        self.ids.extend(len(rows), ids)
        if not len(rows):
            return
        file = RowFile.of(rows)
        if file:  # a map of our own, which can be advised otherwise than the caller's
            rows = file.rows(at_random=self.at_random)
        self.parts.append(Part(rows, norms, self.size, file))
        self.size += len(rows)
        while len(self.parts) > 1 and _alike(*self.parts[-2:]):
            one, other = self.parts[-2:]
            joined = np.concatenate([one.rows, other.rows])
            norms = np.concatenate([one.norms, other.norms])
            self.parts[-2:] = [Part(joined, norms, one.start)]

    def restore(
        self, parts: Sequence[KeptRows], norms: Float64Array, ids: IdArray, next_id: int
    ) -> None:
        """Take over saved rows, all norms (N,) and ids (N,); deleted ones are negative."""
        self.ids.restore(ids, next_id)
        for rows, file in parts:
            stop = self.size + len(rows)
            self.parts.append(Part(rows, norms[self.size : stop], self.size, file))
            self.size = stop

    def part_of(self, position: IdArray) -> IdArray:
        """Which part each position is in."""
        starts = [part.start for part in self.parts]
        return np.searchsorted(starts, position, side="right") - 1

    def gather(self, position: IdArray) -> Float64Array:
        """The rows (n, dim) at the given positions, in fp64."""
        rows = np.empty((len(position), self.dim))
        owner = self.part_of(position)
        for number in np.unique(owner):
            mine = owner == number
            part = self.parts[number]
            rows[mine] = part.rows[position[mine] - part.start]
        return rows

    def norms(self) -> Float64Array:
        """The norms of all rows, by position."""
        return np.concatenate([np.empty(0), *(part.norms for part in self.parts)])

    def scores(self, queries: Float64Array, query: IdArray, position: IdArray) -> Float64Array:
        """Exact scores (n,) of pairs, summed in fp64 in an order that only the dimension decides.

        The order is that of scan.c: products are folded in halves.
        """
        scores = np.empty(len(query))
        padded = 1 << (self.dim - 1).bit_length()
        for start in range(0, len(query), RERANK):
            part = slice(start, start + RERANK)
            product = np.zeros((len(position[part]), padded))
            np.multiply(
                self.gather(position[part]), queries[query[part]], out=product[:, : self.dim]
            )
            width = padded
            while width > 1:
                width //= 2
                product = product[:, :width] + product[:, width : 2 * width]
            scores[part] = product[:, 0]
        if self.metric is Metric.cosine:
            scores /= divisors(queries)[query]
        return scores + 0.0  # a zero row scores 0, never -0


def as_stored(rows: AnyFloatArray, metric: Metric, normalized: bool) -> AnyFloatArray:
    """Rows as they are searched without a copy of what is mapped: as they stand, or of unit norm.

    What is the caller's array still is copied: he may go on writing into it.
    """
    if (normalized or metric is Metric.ip) and rows.dtype in (np.float32, np.float16):
        read_only = isinstance(rows, np.memmap) and rows.mode == "r"
        mapped = read_only and rows.flags.c_contiguous
        return rows if mapped else np.array(rows, order="C")
    kept = as_searched(rows, metric, normalized)
    return kept.copy() if np.may_share_memory(kept, rows) else kept


def _alike(one: Part, other: Part) -> bool:
    """Whether two neighbours are to be merged: both in memory, and the first not much larger.

    A row is then copied a few times at most, however many are added one by one.
    """
    total = len(one.rows) + len(other.rows)
    in_memory = not any(isinstance(part.rows, np.memmap) for part in (one, other))
    same = one.rows.dtype == other.rows.dtype
    return in_memory and same and total <= MERGE_ROWS and len(one.rows) <= 2 * len(other.rows)
