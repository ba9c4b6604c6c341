"""Queries in, the nearest rows of one or several collections out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twotower.embedding.encoder import Encoder
from twotower.embedding.pictures import Picture
from twotower.retrieval.index import NO_ID, AnyFloatArray, IdArray, SearchResult
from twotower.retrieval.search.collection import Collection, merge
from twotower.retrieval.search.distinct import distinct
from twotower.retrieval.search.query import Query, as_queries
from twotower.retrieval.search.query_vectors import query_vectors
from twotower.search_config import ALL_SCORES
from twotower.settings import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """One row found: its rank from 1, its score (by default the cosine), picture and caption."""

    rank: int
    score: float
    row_id: int
    path: Path
    caption: str
    collection: str = ""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked of an answer, whatever the query.

    Attributes:
        k: results a query, at most.
        threshold: results with at least this score only.
        templates: prompts with `{}`, whose mean stands for a text; none takes the text as it is.
        filter: a condition on the metadata (see `filter_grammar`); none if empty.
        duplicates: the cosine from which on two results are near-duplicates, of which the better
            one stays; None keeps all.
    """

    k: int = 25
    threshold: float = ALL_SCORES
    templates: tuple[str, ...] = ()
    filter: str = ""
    duplicates: float | None = None


class Searcher:
    """Searches collections with the encoder that made their embeddings."""

    def __init__(self, encoder: Encoder, *collections: Collection) -> None:
        self.encoder = encoder
        self.collections = collections

    def __len__(self) -> int:
        return sum(map(len, self.collections))

    def search(self, queries: Sequence[Query | str], options: Options) -> list[list[Hit]]:
        """The best rows of each query, as typed or made, best first.

        Raises:
            ConfigError: a query or the filter cannot be read, or k is beyond the rows.
        """
        self.check(options)
        asked = as_queries(queries)
        return self.search_vectors(query_vectors(asked, self.encoder, options.templates), options)

    def search_texts(self, texts: Sequence[str], k: int) -> list[list[Hit]]:
        """The best k rows of each text, taken as words whatever it looks like.

        Raises:
            ConfigError: a text is blank or not valid Unicode, or k is beyond the rows.
        """
        return self.search([Query.of_text(text) for text in texts], Options(k=k))

    def search_images(self, images: Sequence[Picture], k: int) -> list[list[Hit]]:
        """The best k rows of each picture, best first.

        Raises:
            ConfigError: a picture cannot be read, or k is beyond the rows.
        """
        return self.search([Query.of_image(image) for image in images], Options(k=k))

    def search_vectors(self, queries: AnyFloatArray, options: Options) -> list[list[Hit]]:
        """The best rows of each query vector (Q, D), best first.

        An approximate index may find fewer than k.

        Raises:
            ConfigError: the filter cannot be read, k is beyond the rows, or the vectors cannot be
                searched.
        """
        selected = self.check(options)
        count = sum(len(ids) for ids in selected if ids is not None)
        if options.filter and count < options.k:
            few = f"only {count} rows pass" if count else "no row passes"
            log.warning("%s the filter %s", few, options.filter)
        if options.duplicates is None:
            found, source = self._best(queries, options.k, selected)
            rows = zip(found.scores, found.ids, source, strict=True)
            return [self._hits(*row, options) for row in rows]
        return [self._distinct(query[None], options, selected) for query in queries]

    def check(self, options: Options) -> list[IdArray | None]:
        """Refuse what cannot be asked; the ids that pass the filter in each collection.

        Raises:
            ConfigError: k is beyond the rows, or the filter cannot be read.
        """
        if options.k > len(self):
            names = ", ".join(str(collection.name) for collection in self.collections)
            what = "the store" if len(self.collections) == 1 else "the collections"
            raise ConfigError(
                f"search.k is {options.k}, but {what} {names} has {len(self)} rows; "
                f"use search.k={len(self)} or less"
            )
        if not options.filter:
            return [None] * len(self.collections)
        return [collection.passing(options.filter) for collection in self.collections]

    def _best(
        self, queries: AnyFloatArray, k: int, selected: Sequence[IdArray | None]
    ) -> tuple[SearchResult, IdArray]:
        """The k best rows of each query and the numbers of their collections, each (Q, k)."""
        results = [
            collection.search(queries, min(k, len(collection)), ids)
            for collection, ids in zip(self.collections, selected, strict=True)
        ]
        return merge(results, k)

    def _distinct(
        self, query: AnyFloatArray, options: Options, selected: Sequence[IdArray | None]
    ) -> list[Hit]:
        """The best k rows of one query (1, D) of which no two are near-duplicates."""
        assert options.duplicates is not None
        fetched = 16 + 2 * options.k
        while True:
            fetched = min(fetched, len(self))
            found, source = self._best(query, fetched, selected)
            scores, ids, source = found.scores[0], found.ids[0], source[0]
            real = (ids != NO_ID) & (scores >= options.threshold)
            scores, ids, source = scores[real], ids[real], source[real]
            kept = distinct(self._vectors(ids, source), options.duplicates, options.k)
            # All there is has been looked at where the last results are padding or too low.
            if len(kept) == options.k or fetched == len(self) or not real[-1]:
                return self._hits(scores[kept], ids[kept], source[kept], options)
            fetched *= 4

    def vectors(self, hits: Sequence[Hit]) -> AnyFloatArray:
        """The vectors (N, D) of hits of this searcher, as the stores hold them."""
        number = {collection.name: place for place, collection in enumerate(self.collections)}
        ids = np.array([hit.row_id for hit in hits], np.int64)
        # A hit does not say which collection it is of where there is one alone.
        source = np.array([number.get(hit.collection, 0) for hit in hits], np.int64)
        return self._vectors(ids, source)

    def _vectors(self, ids: IdArray, source: IdArray) -> AnyFloatArray:
        """The vectors (N, D) of rows of several collections."""
        rows = np.empty((len(ids), self.encoder.dim), np.float32)
        for number, collection in enumerate(self.collections):
            mine = source == number
            if mine.any():
                rows[mine] = collection.vectors(ids[mine])
        return rows

    def _hits(
        self, scores: AnyFloatArray, ids: IdArray, source: IdArray, options: Options
    ) -> list[Hit]:
        """The hits of one query's rows (n,), best first."""
        known = (ids != NO_ID) & (scores >= options.threshold)
        several = len(self.collections) > 1
        hits = []
        for rank, place in enumerate(np.flatnonzero(known), start=1):
            collection = self.collections[source[place]]
            (row,) = collection.store.metadata([int(ids[place])])
            path, caption = Path(row["image_path"]), row["caption"] or ""
            name = collection.name if several else ""
            hits.append(Hit(rank, float(scores[place]), row["row_id"], path, caption, name))
        return hits
