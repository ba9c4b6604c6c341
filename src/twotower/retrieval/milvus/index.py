"""Search through Milvus, by the rules of every index."""

from __future__ import annotations

import json
import logging
import secrets
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np

from twotower.retrieval.index import (
    INDEXES,
    AnyFloatArray,
    IdArray,
    SearchResult,
    as_searched,
    check_query,
    check_rows,
    no_hits,
)
from twotower.retrieval.milvus.collection import (
    ID,
    PAGE,
    Hits,
    MilvusCollection,
    MilvusConfig,
    is_server,
    own_file,
)
from twotower.retrieval.row_ids import RowIds
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

SLOW_ROWS = 10_000  # beyond them milvus-lite is slow
ANSWER = 1_000_000  # results a request, some 20 MB


class MilvusIndex:
    """A collection of Milvus with our ids, our padding and our sentences.

    Attributes:
        collection: what holds the rows; made with the first of them.
    """

    train_rows = 0

    def __init__(self, config: MilvusConfig, dim: int) -> None:
        self.config = config
        self.dim = dim
        name = config.collection or f"twotower_{secrets.token_hex(16)}"
        self.collection = MilvusCollection(config, config.uri or own_file(), name)
        self._made = False
        self._ids: RowIds | None = RowIds()  # None: not yet asked of Milvus
        self._dropping: weakref.finalize[..., MilvusIndex] | None = None

    def __len__(self) -> int:
        return self.collection.count() if self._made else 0

    @property
    def nbytes(self) -> int:
        """Bytes of vectors and ids; Milvus does not tell those of its index."""
        return len(self) * (4 * self.dim + 8)

    def train(self, rows: AnyFloatArray, *, normalized: bool = False) -> None:
        """There is nothing to learn here; Milvus does so by itself."""

    def add(
        self, rows: AnyFloatArray, ids: IdArray | None = None, *, normalized: bool = False
    ) -> None:
        """Add rows (N, dim); see `VectorIndex.add`."""
        check_rows(rows, self.dim)
        if not len(rows):
            return
        known = self._known_ids()
        new = known.offer(len(rows), ids)
        if not self._made:
            self.create({}, "", kept=bool(self.config.collection))
        self.collection.insert(as_searched(rows, self.config.metric, normalized), new)
        known.extend(len(new), new)
        self.warn_of_size(known.alive)

    def delete(self, ids: IdArray) -> None:
        """Delete rows by their ids; see `VectorIndex.delete`."""
        ids = np.array(ids, np.int64).reshape(-1)
        self._known_ids().check(ids)
        self.collection.delete(ids)
        self._known_ids().delete(ids)

    def search(self, queries: AnyFloatArray, k: int, where: str = "") -> SearchResult:
        """The k best rows of each query (Q, dim); see `VectorIndex.search`.

        Args:
            where: an expression that `milvus.filters.translate` made: only rows that it holds for.

        Raises:
            ConfigError: also if k is beyond the 16,384 that Milvus returns, or nothing answers.
        """
        check_query(queries, self.dim, k)
        result = no_hits(len(queries), k)
        limit = min(k, len(self)) if len(queries) else 0
        if limit > PAGE:
            raise ConfigError(f"Milvus returns at most {PAGE} results a query, not {limit}")
        if not limit:
            return result
        searched = as_searched(queries, self.config.metric, normalized=False)
        step = min(1000, ANSWER // limit)
        for start in range(0, len(searched), step):
            found = self.collection.search(searched[start : start + step], limit, where)
            for number, hits in enumerate(found, start=start):
                _fill(result, number, hits)
        return result

    def write(self, file: Path) -> None:
        """Write where the collection is; the rows stay in Milvus."""
        if not self._made:
            self.create({}, "", kept=True)
        if not self.config.uri:
            log.warning("the collection ends with this process; give index.uri to keep it")
        self.collection.flush()
        if self._dropping is not None:
            self._dropping.detach()
        about = {"uri": self.collection.uri, "collection": self.collection.name}
        file.write_text(json.dumps(about) + "\n")

    def read(self, file: Path) -> None:
        """Take over the collection that `write` named.

        Raises:
            ConfigError: it is not there any more.
        """
        about = json.loads(file.read_text())
        self.collection = MilvusCollection(self.config, about["uri"], about["collection"])
        if not self.collection.exists():
            raise ConfigError(
                f"the Milvus collection {self.collection.name} at {self.collection.uri} is not "
                "there any more; build it again"
            )
        self.open()

    def create(self, fields: dict[str, str], description: str, *, kept: bool) -> None:
        """Make the collection, with fields by their Milvus types; one not `kept` ends with this."""
        self.collection.create(self.dim, fields, description)
        self._made = True
        if not kept:
            self._dropping = weakref.finalize(self, _drop, self.collection)

    def open(self) -> None:
        """Use the collection that is there."""
        self.collection.open()
        self._made, self._ids = True, None

    def warn_of_size(self, count: int) -> None:
        """Say that milvus-lite is slow, where it is."""
        if count > SLOW_ROWS and not is_server(self.collection.uri):
            log.warning(
                "milvus-lite is for trying: with %s rows a query takes long (seconds at 100,000); "
                "give the address of a server with index.uri=http://...",
                f"{count:,}",
            )

    def _known_ids(self) -> RowIds:
        """The ids of all rows, read from Milvus once."""
        if self._ids is None:
            self._ids = RowIds()
            stored = self.collection.ids()
            self._ids.extend(len(stored), stored)
        return self._ids


def _fill(result: SearchResult, number: int, hits: Hits) -> None:
    """Put the hits of one query in their places, by score and then by id."""
    scores = np.array([hit["distance"] for hit in hits], np.float32)
    ids = np.array([hit[ID] for hit in hits], np.int64)
    order = np.lexsort((ids, -scores))
    result.scores[number, : len(hits)], result.ids[number, : len(hits)] = scores[order], ids[order]


def _drop(collection: MilvusCollection) -> None:
    with suppress(ConfigError):  # the server or the file is gone, and with it the collection
        collection.drop()


@INDEXES.register("milvus", MilvusConfig)
def build_milvus(config: MilvusConfig, dim: int) -> MilvusIndex:
    """An empty collection of Milvus.

    Raises:
        ConfigError: pymilvus is not installed, or nothing answers at the uri.
    """
    return MilvusIndex(config, dim)
