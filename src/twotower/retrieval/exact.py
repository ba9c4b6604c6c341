"""Exact top-k in torch: blocks of fp32 scores against a running threshold, then a re-rank in fp64.

An fp32 score is off by at most `slack`: the error bound of a dot product, whatever its order of
summation (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). So a row can only be among
the best k if its score plus slack reaches the k-th best score minus slack. The scan keeps every
such row and the re-rank decides in fp64: the answer does not depend on blocks, threads or batch.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower.config import IndexConfig, Metric
from twotower.retrieval.candidates import (
    GROUP,
    Candidates,
    Float64Array,
    above_threshold,
    keep_possible,
    products,
    rank_in_query,
    round_to_24_bits,
)
from twotower.retrieval.index import (
    INDEXES,
    NO_ID,
    AnyFloatArray,
    IdArray,
    RowIds,
    SearchResult,
    as_searched,
    check_query,
    check_rows,
    divisors,
    no_hits,
    norms_of,
)
from twotower.settings import ConfigError, setting

QUERY_BLOCK = 256  # queries scored at a time: with 8,192 rows 8 MB of scores
PENDING = 1 << 21  # candidates that may wait for the re-rank
RERANK = 256  # candidates re-ranked at a time: 1 MB at 512 dimensions, which stays in the cache
LARGEST_NORM = 1e38  # beyond it a partial sum could overflow fp32


class RowMemory(enum.Enum):
    """How the rows are kept."""

    fp32 = "fp32"
    stored = "stored"


@dataclass(kw_only=True)
class ExactConfig(IndexConfig):
    """Exact search over all rows."""

    block_rows: int = setting(8192, "rows scored at a time", ge=1)
    memory: RowMemory = setting(
        RowMemory.fp32,
        "fp32: rows in memory, fastest; stored: as the store has them, memory-mapped",
    )


class _Part(NamedTuple):
    """Rows of one `add`: (n, dim) fp32 or fp16, their norms (n,), the position of the first."""

    rows: Tensor
    norms: Float64Array
    start: int


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 products in fp32: TF32 or bf16, which training may allow, break the error bound."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tensor(rows: AnyFloatArray) -> Tensor:
    with warnings.catch_warnings():
        # A store's files are mapped read-only; torch warns of writing, and nothing here writes.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(rows)


class ExactIndex:
    """Exact top-k by cosine or inner product; see the module for why it is exact."""

    train_rows = 0

    def __init__(self, config: ExactConfig, dim: int) -> None:
        self.config = config
        self.dim = dim
        self._parts: list[_Part] = []
        self._ids = RowIds()
        self._size = 0
        # d products and sums; eight roundings more for the query, the bounds, the result.
        self._relative_slack = (dim + 8) * 2.0**-24 * 1.01
        # Products that underflow, or are flushed to zero.
        self._absolute_slack = (dim + 1) * 2.0**-126

    def __len__(self) -> int:
        return self._size

    @property
    def nbytes(self) -> int:
        """Bytes of rows, norms and ids."""
        rows = sum(part.rows.nbytes + part.norms.nbytes for part in self._parts)
        return int(rows + self._ids.array.nbytes)

    def train(self, rows: AnyFloatArray, *, normalized: bool = False) -> None:
        """There is nothing to learn."""

    def add(
        self, rows: AnyFloatArray, ids: IdArray | None = None, *, normalized: bool = False
    ) -> None:
        """Add rows (N, dim); see `VectorIndex.add`.

        Raises:
            ConfigError: also if a norm is beyond 1e38, where fp32 scores would overflow.
        """
        check_rows(rows, self.dim)
        kept = self._kept(rows, normalized)
        norms = norms_of(kept.numpy())
        if len(norms) and norms.max() > LARGEST_NORM:
            raise ConfigError(f"row {norms.argmax()} has norm {norms.max():.3g}, beyond 1e38")
        self._ids.extend(len(rows), ids)
        if len(rows):
            self._parts.append(_Part(kept, norms, self._size))
            self._size += len(rows)

    def _kept(self, rows: AnyFloatArray, normalized: bool) -> Tensor:
        as_it_is = normalized or self.config.metric is Metric.ip
        stored = self.config.memory is RowMemory.stored
        if stored and as_it_is and rows.dtype.itemsize <= 4:
            kept = _tensor(rows)
            return kept if isinstance(rows, np.memmap) else kept.clone()
        kept = _tensor(as_searched(rows, self.config.metric, normalized))
        # What is the caller's array still is copied: he may go on writing into it.
        return kept.clone() if np.may_share_memory(kept.numpy(), rows) else kept

    def search(self, queries: AnyFloatArray, k: int) -> SearchResult:
        """The k best rows of each query (Q, dim); see `VectorIndex.search`."""
        check_query(queries, self.dim, k)
        result = no_hits(len(queries), k)
        if not self._size:
            return result
        with torch.inference_mode(), _full_precision():
            for start in range(0, len(queries), QUERY_BLOCK):
                block = queries[start : start + QUERY_BLOCK].astype(np.float64)
                self._search_block(block, min(k, self._size), start, result)
        return result

    def score(self, queries: AnyFloatArray, ids: IdArray) -> tuple[Float64Array, Float64Array]:
        """The exact scores (Q, k) of rows by their ids (Q, k), and by how much a tie may differ.

        Where the id is -1 the score is -inf. Two scores tie within 1e-6 * |query| * |row|.

        Raises:
            ConfigError: an id is not in the index, or the queries cannot be searched.
        """
        check_query(queries, self.dim, 1)
        known = self._ids.array
        there = ids != NO_ID
        order = np.argsort(known, kind="stable")
        place = np.searchsorted(known, ids[there], sorter=order)
        if there.any() and (place.max() == len(known) or (known[order[place]] != ids[there]).any()):
            raise ConfigError("an id that is to be scored is not in the index")
        position, query = order[place], np.nonzero(there)[0]
        wide = queries.astype(np.float64)
        scores, ties = np.full(ids.shape, -np.inf), np.zeros(ids.shape)
        scores[there] = self._exact_scores(wide, query, position)
        norms = np.concatenate([part.norms for part in self._parts] or [np.empty(0)])
        scale = 1.0 if self.config.metric is Metric.cosine else norms_of(wide)[query]
        ties[there] = 1e-6 * scale * norms[position]
        return scores, ties

    def _search_block(
        self, queries: Float64Array, k: int, first_row: int, result: SearchResult
    ) -> None:
        """Search up to `QUERY_BLOCK` queries (Q, dim) fp64; into `result` from `first_row` on."""
        found, exact = self._best(self._scan(queries, k), queries, k)
        rank = rank_in_query(found.query)
        with np.errstate(over="ignore"):  # a score beyond fp32 is returned as infinity
            result.scores[first_row + found.query, rank] = exact
        result.ids[first_row + found.query, rank] = self._ids.array[found.position]

    def _scan(self, queries: Float64Array, k: int) -> Candidates:
        """Every row that may be among the best k of a query; bounds are those of the unit query."""
        unit = torch.from_numpy((queries / divisors(queries)[:, None]).astype(np.float32))
        best = torch.full((len(unit), k), -torch.inf)  # k lower bounds of distinct rows
        # One buffer: fresh pages for each block would cost more than the comparison.
        buffer = torch.empty(len(unit) * min(self.config.block_rows, self._size))
        pending: list[Candidates] = []
        limit = PENDING + 4 * k * len(unit)
        for rows, start, largest in self._blocks():
            scores = products(unit, rows, buffer)
            slack = largest * self._relative_slack + self._absolute_slack
            found, best = above_threshold(scores, best, slack, k)
            pending.append(found._replace(position=found.position + start))
            if sum(len(part.query) for part in pending) > limit:
                kept, _ = self._best(Candidates.join(pending), queries, k)
                pending = [kept.widened(self._absolute_slack)]
        return Candidates.join(pending)

    def _best(
        self, found: Candidates, queries: Float64Array, k: int
    ) -> tuple[Candidates, Float64Array]:
        """The best k of each query's candidates, with exact bounds, and their scores.

        Ranked by the score rounded as fp32 rounds it, then by id: scores that the user sees as
        equal stand in order of id.
        """
        found = keep_possible(found, k)
        scores = self._exact_scores(queries, found.query, found.position)
        cosine = self.config.metric is Metric.cosine
        unit = scores if cosine else scores / divisors(queries)[found.query]
        ids = self._ids.array[found.position]
        order = np.lexsort((ids, -round_to_24_bits(scores), found.query))
        order = order[rank_in_query(found.query[order]) < k]
        return found._replace(lower=unit, upper=unit).select(order), scores[order]

    def _blocks(self) -> Iterator[tuple[Tensor, int, float]]:
        """Blocks of fp32 rows with the position of the first and the largest norm.

        A length is a multiple of GROUP or below it, so that groups come out even.
        """
        step = self.config.block_rows
        for part in self._parts:
            for start in range(0, len(part.rows), step):
                stop = min(start + step, len(part.rows))
                even = start + (stop - start) // GROUP * GROUP
                for low, high in ((start, even), (even, stop)):
                    if low < high:
                        largest = float(part.norms[low:high].max())
                        yield part.rows[low:high].float(), part.start + low, largest

    def _exact_scores(
        self, queries: Float64Array, query: IdArray, position: IdArray
    ) -> Float64Array:
        """Scores (n,) of pairs, accumulated in fp64 in an order that only the dimension decides."""
        scores = np.empty(len(query))
        for start in range(0, len(query), RERANK):
            part = slice(start, start + RERANK)
            product = self._gather(position[part]) * queries[query[part]]
            scores[part] = product.sum(axis=1)
        if self.config.metric is Metric.cosine:
            scores /= divisors(queries)[query]
        return scores + 0.0  # a zero row scores 0, never -0

    def _gather(self, position: IdArray) -> Float64Array:
        """The rows (n, dim) at the given positions, in fp64."""
        rows = np.empty((len(position), self.dim))
        starts = [part.start for part in self._parts]
        owner = np.searchsorted(starts, position, side="right") - 1
        for number in np.unique(owner):
            mine = owner == number
            part = self._parts[number]
            rows[mine] = part.rows.numpy()[position[mine] - part.start]
        return rows

    def write(self, file: Path) -> None:
        """Write rows and ids to a safetensors file."""
        tensors = {f"rows.{i:06d}": part.rows.contiguous() for i, part in enumerate(self._parts)}
        save_file({"ids": torch.from_numpy(self._ids.array), **tensors}, file)

    def read(self, file: Path) -> None:
        """Take over rows and ids of a file that `write` wrote."""
        tensors = load_file(file)
        ids = tensors.pop("ids").numpy()
        for name in sorted(tensors):
            rows = tensors[name]
            self._parts.append(_Part(rows, norms_of(rows.numpy()), self._size))
            self._size += len(rows)
        self._ids.extend(self._size, ids)


@INDEXES.register("exact", ExactConfig)
def build_exact(config: ExactConfig, dim: int) -> ExactIndex:
    """An empty exact index."""
    return ExactIndex(config, dim)
