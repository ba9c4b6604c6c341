"""Rows that are searched under a name: all of a store or a part of it, through an index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.build import shards_of
from twotower.retrieval.exact import ExactConfig, ExactIndex
from twotower.retrieval.index import (
    NO_ID,
    AnyFloatArray,
    IdArray,
    Modality,
    SearchResult,
    VectorIndex,
    no_hits,
)
from twotower.retrieval.scan.tiers import Tier
from twotower.retrieval.search.filter_grammar import parse_filter
from twotower.retrieval.search.filters import passing

FEW_ROWS = 20_000  # as many are read and searched exactly at once, whatever the index
MOST_FETCHED = 4096  # results beyond the k best that an index is asked for
KEPT_FILTERS = 16  # whose ids are remembered
BLOCK_ROWS = 65_536  # rows of the store in memory at a time: 128 MB at 512 dimensions


class Collection:
    """Rows of a store, the index that holds them, and filters on their metadata.

    Attributes:
        name: what hits say where they are from.
        row_ids: of the rows, if they are not all of the store; ascending.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        index: VectorIndex,
        *,
        name: str = "",
        modality: Modality = Modality.images,
        row_ids: IdArray | None = None,
    ) -> None:
        self.store = store
        self.index = index
        self.name = name or str(store.folder)
        self.modality = modality
        self.row_ids = row_ids
        self._passing: dict[str, IdArray] = {}
        self._deleted: IdArray = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.index)

    def delete(self, ids: IdArray) -> None:
        """Delete rows by their ids from what is searched; the store keeps them.

        Deleting them in the index alone would leave them among what a filter selects.

        Raises:
            ConfigError: as `VectorIndex.delete` does.
        """
        self.index.delete(ids)
        self._deleted = np.union1d(self._deleted, ids)

    def passing(self, filter_text: str) -> IdArray:
        """The ids of the rows that pass a filter, ascending.

        Raises:
            ConfigError: the filter is malformed or names no column of the store.
        """
        if filter_text not in self._passing:
            ids = passing(self.store, parse_filter(filter_text, self.store.schema()))
            if self.row_ids is not None:
                ids = np.intersect1d(ids, self.row_ids, assume_unique=True)
            if len(self._passing) == KEPT_FILTERS:
                del self._passing[next(iter(self._passing))]
            self._passing[filter_text] = ids
        return np.setdiff1d(self._passing[filter_text], self._deleted, assume_unique=True)

    def vectors(self, row_ids: IdArray) -> AnyFloatArray:
        """The vectors (N, D) of these rows, as the store holds them."""
        texts = self.modality is Modality.texts
        return self.store.text_rows(row_ids) if texts else self.store.image_rows(row_ids)

    def search(
        self, queries: AnyFloatArray, k: int, selected: IdArray | None = None
    ) -> SearchResult:
        """The k best rows of each query (Q, D), of all or of those with the selected ids.

        The selected ids are ascending. Few rows are searched exactly; of many the index is asked
        for more results, until k of them are selected ones. A query for which that takes too many
        is searched exactly too, so that there are always k results if so many are selected.
        """
        if selected is None:
            return self.index.search(queries, k)
        result = no_hits(len(queries), k)
        wanted = min(k, len(selected))
        left = np.arange(len(queries))
        if len(selected) > FEW_ROWS and wanted:
            fetched = 16 + 2 * k * len(self) // len(selected)
            while len(left) and fetched <= min(MOST_FETCHED + k, len(self)):
                left = self._fetch(queries, left, fetched, selected, result)
                fetched *= 4
        if len(left) and wanted:
            exact = self._exactly(queries[left], wanted, selected)
            result.scores[left, :wanted], result.ids[left, :wanted] = exact
        return result

    def _fetch(
        self,
        queries: AnyFloatArray,
        left: npt.NDArray[np.int64],
        fetched: int,
        selected: IdArray,
        result: SearchResult,
    ) -> npt.NDArray[np.int64]:
        """Fill in the queries for which `fetched` results hold k selected ones; return the rest."""
        k = result.ids.shape[1]
        found = self.index.search(queries[left], fetched)
        passes = among(found.ids, selected)
        enough = passes.sum(axis=1) >= k
        for place in np.flatnonzero(enough):
            best = np.flatnonzero(passes[place])[:k]
            result.scores[left[place]] = found.scores[place, best]
            result.ids[left[place]] = found.ids[place, best]
        rest: npt.NDArray[np.int64] = left[~enough]
        return rest

    def _exactly(self, queries: AnyFloatArray, k: int, selected: IdArray) -> SearchResult:
        """The k best of the selected rows, of which a block is in memory at a time."""
        best = no_hits(len(queries), k)
        # Each block is searched once: codes would cost more than they save.
        config = ExactConfig(metric=self.index.config.metric, tier=Tier.reference)
        for ids, rows in self._blocks(selected):
            index = ExactIndex(config, self.index.dim)
            index.add(rows, ids, normalized=self.store.manifest.normalized)
            found = index.search(queries, min(k, len(ids)))
            best, _ = merge([best, found], k)
        return best

    def _blocks(self, selected: IdArray) -> Iterator[tuple[IdArray, AnyFloatArray]]:
        shards = shards_of(self.store, self.modality)
        places, inside = self.store.locate(selected)
        for place in np.unique(places):
            here = np.flatnonzero(places == place)
            here = here[np.argsort(inside[here], kind="stable")]
            for start in range(0, len(here), BLOCK_ROWS):
                part = here[start : start + BLOCK_ROWS]
                yield selected[part], shards[place][inside[part]]


def among(ids: IdArray, selected: IdArray) -> npt.NDArray[np.bool_]:
    """Which of the ids, of any shape, are among the selected ones, which are ascending."""
    if not len(selected):
        return np.zeros(ids.shape, bool)
    place = np.minimum(np.searchsorted(selected, ids), len(selected) - 1)
    found: npt.NDArray[np.bool_] = (selected[place] == ids) & (ids != NO_ID)
    return found


def merge(results: Sequence[SearchResult], k: int) -> tuple[SearchResult, npt.NDArray[np.int64]]:
    """The k best of several results of the same queries, and which of them each is from (Q, k).

    Equal scores stand in the order of the results, then of the ids.
    """
    scores = np.concatenate([result.scores for result in results], axis=1)
    ids = np.concatenate([result.ids for result in results], axis=1)
    widths = [result.ids.shape[1] for result in results]
    source = np.broadcast_to(np.repeat(np.arange(len(results)), widths), ids.shape)
    # Where the score is the same, padding stands behind all that was found.
    order = np.lexsort((ids, source, ids == NO_ID, -scores))[:, :k]
    best = SearchResult(np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1))
    return best, np.take_along_axis(source, order, 1)
