"""What a benchmark is measured on: the pictures of a store, or synthetic rows, and queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from twotower.benchmark_config import BenchmarkConfig, QueryKind
from twotower.config import Config, IndexConfig
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.build import gather, sample_positions, shards_of, store_fingerprint
from twotower.retrieval.index import AnyFloatArray, FloatArray, IdArray, Modality, VectorIndex
from twotower.retrieval.kept import open_named
from twotower.retrieval.synthetic import ClipLike
from twotower.runs import store_path
from twotower.settings import ConfigError

QUERY_POOL = 256  # distinct queries, at least, where the store has so many rows


class Queries(NamedTuple):
    """Queries (Q, dim) fp32 of one kind, what they are, and the rows that they are themselves.

    `own` (Q,) are ids that count as no answer; None where a query is none of the rows.
    """

    vectors: FloatArray
    what: str
    own: IdArray | None = None


class Data(Protocol):
    """Rows with ids, a chunk at a time, and the queries that there are."""

    count: int
    dim: int
    normalized: bool
    ids: IdArray | None

    def chunks(self) -> Iterator[AnyFloatArray]:
        """All rows (n, dim), in the order of `ids`."""

    def sample(self, size: int, seed: int) -> AnyFloatArray:
        """At most `size` rows to train on."""

    def about(self) -> dict[str, object]:
        """What the rows are; equal for equal rows and queries."""

    def queries(self, count: int, seed: int) -> dict[QueryKind, Queries]:
        """At most `count` queries of each kind that there is."""

    def saved(self, folder: str, config: IndexConfig) -> VectorIndex:
        """The index of these rows that a folder holds, whatever kind it is of."""


class StoreData:
    """The pictures of a store, with its captions and with its pictures as queries."""

    def __init__(self, store: EmbeddingStore) -> None:
        self._store = store
        self.count, self.dim = len(store), store.manifest.dim
        self.normalized = store.manifest.normalized
        self.ids: IdArray | None = store.row_ids()

    def chunks(self) -> Iterator[AnyFloatArray]:
        """A memory map a shard."""
        yield from shards_of(self._store, Modality.images)

    def sample(self, size: int, seed: int) -> AnyFloatArray:
        """Rows drawn by seed from all of them."""
        return gather(
            shards_of(self._store, Modality.images), sample_positions(self.count, size, seed)
        )

    def about(self) -> dict[str, object]:
        """The folder, and the hash of its files."""
        return {
            "store": str(self._store.folder),
            "data": store_fingerprint(self._store, Modality.images)[:16],
            "dtype": self._store.manifest.dtype,
        }

    def queries(self, count: int, seed: int) -> dict[QueryKind, Queries]:
        """Captions where there are any, and pictures, which are rows and left out of the answer.

        They are in random order: the first few of them are from the whole store.
        """
        chosen = sample_positions(self.count, count, seed)
        order = np.random.default_rng(seed).permutation(len(chosen))
        own = self._store.row_ids()[chosen][order]
        pictures = self._rows(Modality.images, chosen)[order]
        found = {QueryKind.image: Queries(pictures, "pictures of the store itself", own)}
        if self._store.has_texts:
            texts = self._rows(Modality.texts, chosen)[order]
            found[QueryKind.text] = Queries(texts, "captions of the store")
        return found

    def saved(self, folder: str, config: IndexConfig) -> VectorIndex:
        """The index of the store that was saved there.

        Raises:
            ConfigError: there is none, or it is of other rows.
        """
        named = dataclasses.replace(config, folder=folder)
        return open_named(named, self._store, Modality.images)

    def _rows(self, modality: Modality, positions: IdArray) -> FloatArray:
        return gather(shards_of(self._store, modality), positions).astype(np.float32)


class SyntheticData:
    """Rows and queries of synthetic.py, made again whenever they are read."""

    normalized = True
    ids: IdArray | None = None

    def __init__(self, count: int, dim: int, seed: int) -> None:
        self._made = ClipLike(count, dim, seed)
        self.count, self.dim = count, dim

    def chunks(self) -> Iterator[AnyFloatArray]:
        """65,536 rows at a time."""
        yield from self._made.chunks()

    def sample(self, size: int, seed: int) -> AnyFloatArray:
        """The first rows: all are drawn alike."""
        return self._made.head(size)

    def about(self) -> dict[str, object]:
        """The generator's arguments."""
        made = self._made
        return {"data": f"synthetic, CLIP-like, {made.count} x {made.dim}, seed {made.seed}"}

    def queries(self, count: int, seed: int) -> dict[QueryKind, Queries]:
        """Pictures near rows, and texts in a cone of their own."""
        return {
            QueryKind.image: Queries(self._made.queries(count, cross=False), "synthetic pictures"),
            QueryKind.text: Queries(self._made.queries(count, cross=True), "synthetic texts"),
        }

    def saved(self, folder: str, config: IndexConfig) -> VectorIndex:
        """There is none: nothing is saved of synthetic rows.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"benchmark.saved names {folder}, but indexes are saved of stores; leave out "
            "benchmark.rows"
        )


def open_data(config: Config) -> Data:
    """The rows that the benchmark section asks for.

    Raises:
        ConfigError: the store is missing, or k is beyond the rows.
    """
    section = config.benchmark
    k = section.k_values[-1]
    if section.rows:
        if k > section.rows:
            raise ConfigError(f"benchmark.k is {k}, but benchmark.rows is {section.rows}")
        return SyntheticData(section.rows, section.dim, config.seed)
    store = EmbeddingStore.open(store_path(config))
    if k > len(store):
        raise ConfigError(
            f"benchmark.k is {k}, but the store {store.folder} has {len(store)} rows; use "
            f"benchmark.k={len(store)} or less"
        )
    return StoreData(store)


def draw_queries(data: Data, config: BenchmarkConfig, seed: int) -> dict[QueryKind, Queries]:
    """Queries of each kind, as many as a batch needs or the recall takes."""
    return data.queries(max([QUERY_POOL, config.recall_queries, *config.queries]), seed)


def timed_kind(queries: dict[QueryKind, Queries], asked: QueryKind) -> QueryKind:
    """Which kind is timed.

    Raises:
        ConfigError: there are none of the kind that is asked for.
    """
    if asked is QueryKind.auto:
        return QueryKind.text if QueryKind.text in queries else QueryKind.image
    if asked not in queries:
        raise ConfigError("benchmark.timed=text needs captions, and the store has none; use image")
    return asked
