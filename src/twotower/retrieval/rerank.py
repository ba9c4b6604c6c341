"""An exact second look at what an approximate index finds: fp64 scores by the rows themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from twotower.retrieval.index import (
    NO_ID,
    AnyFloatArray,
    IdArray,
    SearchResult,
    check_query,
    no_hits,
)
from twotower.retrieval.rows import Rows, as_stored
from twotower.settings import ConfigError

if TYPE_CHECKING:
    from twotower.retrieval.faiss_index import FaissConfig, FaissIndex


class RerankedIndex:
    """A FAISS index whose best k * rerank are scored again by their rows; the best k remain.

    The rows stay where they are: in the memory maps of a store, or in arrays that are added. They
    are not saved with the index; one that is loaded gets them by `attach`.
    """

    def __init__(self, inner: FaissIndex) -> None:
        self.inner = inner
        self._rows = Rows(inner.dim, inner.config.metric)

    @property
    def config(self) -> FaissConfig:
        """That of the index inside."""
        return self.inner.config

    @property
    def dim(self) -> int:
        """Values a vector."""
        return self.inner.dim

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def nbytes(self) -> int:
        """Bytes of the index inside, and of rows that are in memory."""
        held = (part.rows for part in self._rows.parts)
        return self.inner.nbytes + sum(
            rows.nbytes for rows in held if not isinstance(rows, np.memmap)
        )

    @property
    def train_rows(self) -> int:
        """As the index inside."""
        return self.inner.train_rows

    def search_with(self, **settings: float) -> None:
        """Change settings of the search, `rerank` among them."""
        self.inner.search_with(**settings)

    def train(self, rows: AnyFloatArray, *, normalized: bool = False) -> None:
        """Train the index inside; see `VectorIndex.train`."""
        self.inner.train(rows, normalized=normalized)

    def add(
        self, rows: AnyFloatArray, ids: IdArray | None = None, *, normalized: bool = False
    ) -> None:
        """Add rows (N, dim); see `VectorIndex.add`."""
        self._check()
        self.inner.add(rows, ids, normalized=normalized)
        self._append(rows, ids, normalized)

    def attach(
        self, shards: Sequence[AnyFloatArray], ids: IdArray, *, normalized: bool = False
    ) -> None:
        """Give a loaded index its rows, in parts, and their ids (N,) in the same order.

        Raises:
            ConfigError: there are not as many as in the index.
        """
        count = sum(len(shard) for shard in shards)
        if count != len(self.inner) or len(ids) != count:
            raise ConfigError(
                f"the index holds {len(self.inner)} rows, and {count} are to re-rank them"
            )
        self._rows = Rows(self.dim, self.config.metric)
        first = 0
        for shard in shards:
            self._append(shard, ids[first : first + len(shard)], normalized)
            first += len(shard)

    def _append(self, rows: AnyFloatArray, ids: IdArray | None, normalized: bool) -> None:
        kept = as_stored(rows, self.config.metric, normalized)
        # Nothing here asks for norms, and to know them every row of the store would be read.
        self._rows.append(kept, ids, norms=np.broadcast_to(np.nan, len(kept)))

    def _check(self) -> None:
        if len(self._rows) != len(self.inner):
            raise ConfigError(
                "index.rerank scores by the rows of the store, which are not saved with the "
                "index; open it with its store, or give it rows with `attach`"
            )

    def delete(self, ids: IdArray) -> None:
        """Delete rows by their ids; see `VectorIndex.delete`."""
        self._check()
        self.inner.delete(ids)
        self._rows.ids.delete(ids)

    def search(self, queries: AnyFloatArray, k: int) -> SearchResult:
        """The k best of the candidates of each query (Q, dim); see `VectorIndex.search`."""
        check_query(queries, self.dim, k)
        self._check()
        candidates = min(math.ceil(k * self.config.rerank), len(self))
        if not candidates or not len(queries):
            return no_hits(len(queries), k)
        ids = self.inner.search(queries, candidates).ids
        there = ids != NO_ID
        scores = np.full(ids.shape, -np.inf)
        query, position = np.nonzero(there)[0], self._rows.ids.places(ids[there])
        scores[there] = self._rows.scores(queries.astype(np.float64), query, position)
        with np.errstate(over="ignore"):  # a score beyond fp32 is returned as infinity
            rounded = scores.astype(np.float32)
        order = np.lexsort((ids, -rounded, ~there))[:, :k]
        result = no_hits(len(queries), k)
        width = order.shape[1]
        result.scores[:, :width] = np.take_along_axis(rounded, order, 1)
        result.ids[:, :width] = np.take_along_axis(ids, order, 1)
        return result

    def write(self, file: Path) -> None:
        """Write the index inside; its rows are the store's."""
        self.inner.write(file)

    def read(self, file: Path) -> None:
        """Take over what `write` wrote; `attach` gives the rows."""
        self.inner.read(file)
